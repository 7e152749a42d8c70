"""Write the newest pins into requirements.lock, pyproject.toml, environment.yml and requirements-kaggle.txt.

python tests/bump.py [NAME ...] asks pip, which installs nothing, for the newest versions of the packages named that go
together with what they need, or of all that pyproject.toml names; it prints what changes. `make bump` then
installs them, runs the tests and prints which golden metrics changed. `git checkout` of the four files is the way back.
"""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

from medprune.settings import REPO

FILES = ("requirements.lock", "pyproject.toml", "environment.yml", "requirements-kaggle.txt")
KEPT = ("torch",)  # its wheels are gigabytes, and the Makefile and environment.yml name it too: change it by hand
PIN = re.compile(r"([\w.-]+)==([\w.]+)")


def plain(name: str) -> str:
    """Return a distribution's name in the one form that the index has for it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(root: Path = REPO) -> dict[str, str]:
    """Return the lock's versions by plain name."""
    return {plain(name): version for name, version in PIN.findall((root / "requirements.lock").read_text(encoding="utf-8"))}


def direct(root: Path = REPO) -> list[str]:
    """Return the plain names that pyproject.toml asks for."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return [plain(PIN.match(line)[1]) for line in wanted]


def newest(names: list[str], root: Path = REPO) -> dict[str, str]:
    """Return what pip would install for names in their newest versions, theirs needs included, torch as it is pinned."""
    kept = [f"{name}=={pins(root)[name]}" for name in KEPT]
    words = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", *names, *kept]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"pip finds no versions that go together: {done.stderr.strip().splitlines()[-1]}.")
    found = {plain(i["metadata"]["name"]): i["metadata"]["version"] for i in json.loads(done.stdout)["install"]}
    return {name: version for name, version in found.items() if name not in KEPT}


def rewrite(versions: dict[str, str], root: Path = REPO) -> dict[str, tuple[str, str]]:
    """Put versions into the four files where they pin those packages; return {name: (old, new)} of what changed."""
    changed = {}

    def new(match):
        name = plain(match[1])
        if name in versions and versions[name] != match[2]:
            changed[name] = (match[2], versions[name])
            return f"{match[1]}=={versions[name]}"
        return match[0]

    for file in (root / name for name in FILES):
        file.write_text(PIN.sub(new, file.read_text(encoding="utf-8")), encoding="utf-8")
    return changed


def lacking(found: dict[str, str], installed: set[str], root: Path = REPO) -> list[str]:
    """Return the names of what pip would install that is neither pinned nor here already, brought by something pinned."""
    return sorted(found.keys() - pins(root).keys() - installed)


if __name__ == "__main__":
    found = newest(sys.argv[1:] or [n for n in direct() if n not in KEPT])
    for name, (old, version) in sorted(rewrite(found).items()):
        print(f"{name}: {old} -> {version}")
    for name in lacking(found, {plain(here.name) for here in distributions()}):
        print(f"{name}: {found[name]} is needed now: add it to requirements.lock")
