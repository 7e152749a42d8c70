"""Print the counts that README quotes: lines and tests, and how long each stage of finished runs took.

python tests/counts.py [RUN_FOLDER ...]
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from medprune.runs import upkeep
from medprune.settings import REPO, STAGES
from medprune.store import read_manifest


def lines_of(path: Path) -> int:
    """Return the lines of a source, or of a notebook's code cells."""
    if path.suffix != ".ipynb":
        return len(path.read_text(encoding="utf-8").splitlines())
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return sum(len("".join(c["source"]).splitlines()) for c in cells if c["cell_type"] == "code")


def lines() -> dict[str, tuple[int, int]]:
    """Return {folder: (files, lines)}: the package by rooms, the notebooks, the tests, the benchmarks."""
    groups = {"medprune": REPO.glob("medprune/*.py")}
    groups |= {f"medprune/{p.name}": p.glob("*.py") for p in sorted((REPO / "medprune").iterdir()) if (p / "__init__.py").exists()}
    groups |= {"notebooks": REPO.glob("notebooks/*.ipynb"), "tests": REPO.glob("tests/**/*.py"), "benchmarks": REPO.glob("benchmarks/*.py")}
    files = {name: [f for f in found if f.name != "__init__.py"] for name, found in groups.items()}
    return {name: (len(found), sum(map(lines_of, found))) for name, found in files.items()}


def tests() -> int:
    """Return how many tests pytest collects, the notebooks' own aside."""
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests"]
    said = subprocess.run(words, cwd=REPO, capture_output=True, text=True).stdout
    if not (found := re.search(r"^(\d+)(?:/\d+)? tests collected", said, re.MULTILINE)):
        raise ValueError(f"pytest collects no tests: {said.strip().splitlines()[-1:]}.")
    return int(found[1])


def times(root: Path) -> str:
    """Return the seconds of a run's finished stages, and what it takes of the disk."""
    done = [s for s in STAGES if (root / s / "manifest.json").exists()]
    took = ", ".join(f"{stage[:2]} {read_manifest(root, stage)['seconds']:.0f} s" for stage in done)
    return f"{root.name}: {took or 'no stage'}; {upkeep.size_of(root) / 1e9:.1f} GB"


if __name__ == "__main__":
    found = lines()
    for name, (files, n) in found.items():
        print(f"{name}: {files} files, {n:,} lines")
    package = [counts for name, counts in found.items() if name.startswith("medprune")]
    print(f"the package: {sum(f for f, _ in package)} files, {sum(n for _, n in package):,} lines")
    print(f"tests: {tests()}")
    for folder in sys.argv[1:]:
        print(times(Path(folder)))
