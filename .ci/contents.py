"""Checks what is in the wheel and in the sdist.

python3 .ci/contents.py SOURCE DIST
"""

import sys
import tarfile
import zipfile
from pathlib import Path

source, dist = map(Path, sys.argv[1:])
(wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
package = {"sse_batcher_pytest.py"} | {
    path.relative_to(source).as_posix() for path in (source / "sse_batcher").rglob("*") if path.is_file()
}

with zipfile.ZipFile(wheel) as archive:
    in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    about = {name.partition(".dist-info/")[2] for name in archive.namelist() if ".dist-info/" in name}
with tarfile.open(sdist) as archive:
    in_sdist = {member.name.partition("/")[2] for member in archive if member.isfile()}

assert {"sse_batcher/py.typed", "sse_batcher/demo/static/demo.html"} <= package
assert {"sse_batcher/browser/sse-batcher.js", "sse_batcher/browser/sse-batcher.d.ts"} <= package
assert in_wheel == package, in_wheel ^ package  # all of the package, and no tests, benchmarks or examples
assert "licenses/LICENSE" in about, about
assert package | {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"} <= in_sdist, package - in_sdist
assert not [name for name in in_sdist if name.startswith(("tests/", "benchmarks/"))]
print(f"{wheel.name}: {len(in_wheel)} files; {sdist.name}: {len(in_sdist)} files")
