"""What the deployment guides show: their apps, and the files that stand beside them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .documents import files
from .repository import DOCS

GUIDES = DOCS / "guides"
DEPLOY = GUIDES / "deploy"

COMMAND = "gunicorn --config gunicorn.conf.py app:app"
"""What each of them runs, in the folder of the app."""


def app_of(page: Path) -> str:
    """Return the program of a page that is ``app.py``."""
    return files(page.read_text())["app.py"]


def unit(name: str) -> list[str]:
    """Return the values that this key has in the unit of systemd."""
    return re.findall(rf"^{name}=(.*)$", (DEPLOY / "shop.service").read_text(), flags=re.M)


def dockerfile(instruction: str) -> list[str]:
    """Return the arguments of each of these instructions."""
    from dockerfile_parse import DockerfileParser

    structure = DockerfileParser(str(DEPLOY / "Dockerfile")).structure
    return [step["value"] for step in structure if step["instruction"] == instruction]


def kubernetes(kind: str) -> Any:
    """Return the only object of this kind."""
    import yaml

    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    (found,) = [document for document in documents if document["kind"] == kind]
    return found
