"""The module for browsers, `sse-batcher.js`, and its types for TypeScript.

Pure. The files are read once, when this package is imported.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

SCRIPT_NAME = "sse-batcher.js"
TYPES_NAME = "sse-batcher.d.ts"
SCRIPT = (files(__name__) / SCRIPT_NAME).read_bytes()
TYPES = (files(__name__) / TYPES_NAME).read_bytes()

VERSION = hashlib.sha256(SCRIPT).hexdigest()[:12]
"""Names the content of the script, so that a cache may keep it for ever under a URL with this version."""
