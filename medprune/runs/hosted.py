"""Kaggle and Colab: a run brought from an earlier session, and this repository's address in notebooks and README.

The first cell of every notebook installs the package there by `install_hosted.sh`, beside the preinstalled torch.
"""

import re
import shutil
import subprocess
from pathlib import Path

from medprune.settings import REPO, STAGES
from medprune.store import run_root, write_folder, write_text

BADGES = ("<!-- badges -->", "<!-- end of badges -->")
COLAB, KAGGLE = "https://colab.research.google.com/github", "https://kaggle.com/kernels/welcome?src=https://github.com"
PINNED = r'{} = \\".*?\\"'  # in the JSON of a notebook


def bring_run(folder: str | Path, run_name: str = "demo", runs_dir: str | None = None) -> Path:
    """Copy an earlier session's run, such as a Kaggle dataset's or a Drive folder's, to where notebooks go on with it.

    folder: the run's own, which holds 01_finetune. Returns the new folder. Raises ValueError where there is no run, or
    one is here already.
    """
    source = Path(folder)
    target = run_root(run_name, runs_dir)
    if not (source / STAGES[0]).is_dir():
        raise ValueError(f"{source} holds no {STAGES[0]}: give the folder of a run.")
    if any(f.is_file() for f in target.rglob("*")):
        raise ValueError(f"{target} holds a run already: give another run_name, or remove it.")
    with write_folder(target) as temporary:
        for file in (f for f in source.rglob("*") if f.is_file()):
            copy = temporary / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)  # without its mode: a dataset's files cannot be written
    return target


def write_address(repository: str, root: Path = REPO) -> list[Path]:
    """Write where this repository is published on GitHub into the first cells and the README; return the files changed.

    The cells fetch the commit that is checked out now, which must have been pushed. repository: "owner/name". Raises
    ValueError for anything else, without a commit, or for a README without the marks of `BADGES`.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository, re.ASCII):
        raise ValueError(f"repository {repository!r} must be OWNER/NAME, as in https://github.com/OWNER/NAME.")
    said = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    if said.returncode:
        raise ValueError(f"{root} is no git checkout with a commit, which the notebooks' first cells would fetch.")
    pins = {"ADDRESS": f"https://github.com/{repository}", "COMMIT": said.stdout.strip()}
    rows = ["| notebook | Colab | Kaggle |", "|---|---|---|"]
    for stage in STAGES:
        page = f"{repository}/blob/main/notebooks/{stage}.ipynb"
        colab = f"[![open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({COLAB}/{page})"
        kaggle = f"[![open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]({KAGGLE}/{page})"
        rows.append(f"| {stage} | {colab} | {kaggle} |")
    readme, table = root / "README.md", "\n".join([BADGES[0], *rows, BADGES[1]])
    text, found = re.subn(f"{BADGES[0]}.*{BADGES[1]}", table, readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    if not found:
        raise ValueError(f"{readme} has not the lines {BADGES[0]} and {BADGES[1]}, between which badges go.")
    changed = {readme: text}
    for path in (root / "notebooks" / f"{stage}.ipynb" for stage in STAGES):
        changed[path] = path.read_text(encoding="utf-8")
        for name, value in pins.items():
            changed[path] = re.sub(PINNED.format(name), rf'{name} = \\"{value}\\"', changed[path], count=1)
    return [write_text(path, text) for path, text in changed.items()]
