"""Kaggle and Colab: their secrets, and the address of this repository in the notebooks' first cell and the README's badges.

The first cell of every notebook installs the package there by `install_hosted.sh`, beside the preinstalled torch.
"""

import json
import os
import re
from importlib import import_module
from pathlib import Path

from medprune.artifacts import STAGES, write_text
from medprune.config import REPO

BADGES = ("<!-- badges -->", "<!-- end of badges -->")
COLAB, KAGGLE = "https://colab.research.google.com/github", "https://kaggle.com/kernels/welcome?src=https://github.com"
ADDRESS = re.compile(r'^ADDRESS = ".*?"', re.MULTILINE)


def secret(name: str) -> str:
    """Return a key from the environment, or else from Kaggle's or Colab's secrets; "" where there is none."""
    if os.environ.get(name):
        return os.environ[name]
    for module, read in (
        ("kaggle_secrets", lambda m: m.UserSecretsClient().get_secret(name)),
        ("google.colab.userdata", lambda m: m.get(name)),
    ):
        try:
            return read(import_module(module)) or ""
        except Exception:  # not that service, no such secret, or this notebook may not read it: each has its own errors
            continue
    return ""


def write_address(repository: str, root: Path = REPO) -> list[Path]:
    """Write where this repository is published on GitHub into the first cells and the README; return the files changed.

    repository: "owner/name". Raises ValueError for anything else, or a README without the marks of `BADGES`.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"repository {repository!r} must be OWNER/NAME, as in https://github.com/OWNER/NAME.")
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    if not all(mark in text for mark in BADGES):
        raise ValueError(f"{readme} has not the lines {BADGES[0]} and {BADGES[1]}, between which badges go.")
    rows = ["| notebook | Colab | Kaggle |", "|---|---|---|"]
    for stage in STAGES:
        page = f"{repository}/blob/main/notebooks/{stage}.ipynb"
        colab = f"[![open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({COLAB}/{page})"
        kaggle = f"[![open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]({KAGGLE}/{page})"
        rows.append(f"| {stage} | {colab} | {kaggle} |")
    before, _, rest = text.partition(BADGES[0])
    after = rest.partition(BADGES[1])[2]
    changed = [write_text(readme, "\n".join([before + BADGES[0], *rows, BADGES[1]]) + after)]
    for stage in STAGES:
        path = root / "notebooks" / f"{stage}.ipynb"
        notebook = json.loads(path.read_text(encoding="utf-8"))
        first = next(c for c in notebook["cells"] if c["cell_type"] == "code")
        said = ADDRESS.sub(f'ADDRESS = "https://github.com/{repository}"', "".join(first["source"]))
        first["source"] = said.splitlines(keepends=True)
        changed.append(write_text(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"))
    return changed
