"""What the code never does: run code out of files, trust a model's own code, speak to a network unasked."""

import ast
import json
import subprocess
import sys

import pytest

from medprune.settings import REPO

FOLDERS = ("medprune", "notebooks", "benchmarks", "tests")
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "load_pickle", "read_pickle", "to_pickle", "__reduce__"}
RUN_CELLS = {"medprune/rehearsing/stage.py", "tests/test_hosted.py", "tests/pretended.py"}  # notebooks' own cells


def sources():
    """Return {file or notebook: syntax tree} of what is committed."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((REPO / folder).rglob("*.py")):
            found[str(path.relative_to(REPO))] = path.read_text(encoding="utf-8")
        for path in sorted((REPO / folder).glob("*.ipynb")):
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            found[str(path.relative_to(REPO))] = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    return {name: ast.parse(text) for name, text in found.items()}


def complaints(name, tree):
    """Return what in a source could run code that a file carries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            imported = {module.split(".")[0], *(a.name.split(".")[0] for a in node.names)}
            yield from (f"{name}:{node.lineno} imports {module}" for module in imported & PICKLES)
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if called in CALLS and isinstance(node.func, ast.Name) and name not in RUN_CELLS or called.endswith("_pickle"):
            yield f"{name}:{node.lineno} calls {called}"
        if "trust_remote_code" in options and options["trust_remote_code"] is not False:
            yield f"{name}:{node.lineno} trusts a model's own code"
        if options.get("allow_pickle"):
            yield f"{name}:{node.lineno} allows pickles"
        if ast.unparse(node.func) == "torch.load" and options.get("weights_only") is not True:
            yield f"{name}:{node.lineno} loads more than weights"
        if ast.unparse(node.func) == "yaml.load" or (options.get("shell") and called in ("run", "Popen")):
            yield f"{name}:{node.lineno} calls {ast.unparse(node.func)}"


def test_nothing_runs_what_a_file_carries():
    found = sources()
    assert len(found) > 100 and any(name.endswith(".ipynb") for name in found)
    assert [said for name, tree in found.items() for said in complaints(name, tree)] == []


@pytest.mark.parametrize("line", [
    "import pickle", "from joblib import load", "torch.load(f)", "torch.load(f, weights_only=False)", "eval(x)",
    "AutoModel.from_pretrained(x, trust_remote_code=True)", "np.load(f, allow_pickle=True)", "pd.read_pickle(f)",
    "subprocess.run(x, shell=True)", "yaml.load(f)", "AutoModel.from_pretrained(x, trust_remote_code=trusted)",
])  # fmt: skip
def test_what_would_run_it_is_seen(line):
    assert list(complaints("some.py", ast.parse(line)))


def test_the_guard_lets_loopback_through_and_nothing_else(tmp_path):
    """What `tests/faults/guard` does to a child process, which the whole series is run under."""
    words = """
import socket, threading
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
for address in (("example.org", 80), ("192.0.2.1", 80)):
    try:
        socket.create_connection(address, timeout=1)
    except OSError as error:
        print(error)
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53))
except OSError as error:
    print(error)
"""
    log = tmp_path / "network.log"
    guarded = {"PYTHONPATH": str(REPO / "tests" / "faults" / "guard"), "MEDPRUNE_NETWORK_LOG": str(log)}
    said = subprocess.run([sys.executable, "-c", words], env=guarded, capture_output=True, text=True, check=True).stdout
    assert said.count("is not allowed here") == 3 and len(log.read_text().splitlines()) == 3
