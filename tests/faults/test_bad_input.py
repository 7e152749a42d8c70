"""Every setting and every argument of every command with what it cannot be: one sentence, a status, nothing begun.

The cases come from the settings' schema and from the commands themselves, so that a new one is covered by itself.
"""

import json
import math
import sys

import pytest
import typer

from medprune import cli
from medprune.rehearsing import rehearsal
from medprune.runs import hosted, series
from medprune.settings import PATHS, Settings

LONG = "x" * 300
NAMES = ["Ünïcødé 皮膚", "../x", "/nowhere/x", LONG, "a\0b", "\udce4.jpg", "", "a\nb", "%s{}*", "1e999", "nan", "-1", "9" * 30]
COMMANDS = typer.main.get_command(cli.app).commands


@pytest.fixture
def say(monkeypatch, capsys, tmp_path):
    """Run a command here; return (status, what it said on stderr). What would take long, or write, is a failure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))  # where names are looked for too
    monkeypatch.setenv("MEDPRUNE_RUNS", str(tmp_path / "runs"))
    for room, name in ((series, "_execute"), (rehearsal, "rehearse"), (hosted, "write_text")):
        monkeypatch.setattr(room, name, lambda *_, name=name: pytest.fail(f"{name} was begun"))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["medprune", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        assert not list(tmp_path.iterdir()), "something was written"
        return stop.value.code, said.err

    return run


def is_one_sentence(said):
    lines = said.splitlines()
    return len(lines) == 1 and lines[0].startswith("medprune: ") and lines[0].endswith((".", "right.")) and len(said) < 2000


# ---- settings
def wrong_values(schema):
    """Return values that a setting's JSON schema rules out: other kinds, and one beyond each bound."""
    kinds = schema.get("anyOf", [schema])
    allowed = {kind.get("type") for kind in kinds}
    wrong = [{}, {"a": 1}, [[]], [None], [{}]]
    wrong += [[], ["a"]] if "array" not in allowed else []
    wrong += [True, [True]] if "boolean" not in allowed else [2, "perhaps"]
    wrong += [-1.5, 10**30] if not allowed & {"number"} else []
    wrong += [math.nan, math.inf, -math.inf]
    wrong += ["no such value"] if "string" not in allowed or any("enum" in kind for kind in kinds) else NAMES[3:8]
    for kind in kinds:
        wrong += [kind[name] + step for name, step in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0)) if name in kind]
        wrong += [[]] if kind.get("minItems") else []
        wrong += [["no such value"]] if "items" in kind and kind["items"].get("type") != "string" else []
    return wrong


CASES = [
    (name, value)
    for name, schema in Settings.model_json_schema()["properties"].items()
    for value in wrong_values(schema)
    if name != "name"
]


def test_the_cases_cover_every_setting_several_times():
    assert {name for name, _ in CASES} == Settings.model_fields.keys() - {"name"}
    assert min(sum(name == other for other, _ in CASES) for name, _ in CASES) >= 8


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name != "name"])
def test_a_setting_refuses_what_its_schema_rules_out(say, counted, name):
    for value in (value for other, value in CASES if other == name):
        status, said = say("run", "--profile", "smoke", "-p", f"{name}={json.dumps(value)}")
        assert status == 2 and name in said and is_one_sentence(said), (name, value, said)
        counted("settings refused")


@pytest.mark.parametrize("name", PATHS)
def test_a_name_that_leads_nowhere_is_refused_before_a_model_is_tuned(say, counted, name):
    """But for a hub's id, which only the hub knows."""
    for text in [*NAMES, "~", "two words", "no-such-owner/but/a folder"]:
        status, said = say("run", "--profile", "smoke", "-p", f"{name}={json.dumps(text)}")
        assert status == 2 and is_one_sentence(said), (name, text, said)
        assert text.strip() in said or name in said or json.dumps(text)[1:-1] in said
        counted("settings refused")


def test_a_key_in_the_place_of_its_variable_s_name_is_not_repeated(say):
    status, said = say("run", "--profile", "smoke", "-p", "judge_key_env", "sk-123456789")
    assert status == 2 and "judge_key_env must name" in said and "123456789" not in said


# ---- commands
LEAST = {  # words that a command wants, besides the one that is tried
    "run": ["--profile", "smoke"], "clean": ["demo"], "data": ["pictures"], "preflight": ["--profile", "smoke"],
    "plan": ["--bits", "4"], "quantize": ["model", "out"], "compare": ["a", "b"], "address": ["owner"], "publish": ["demo"],
    "study": ["grid.yaml"], "export": ["model", "out", "--to", "hub"], "parity": ["model", "out"], "serve": ["model"],
    "ask": ["model", "picture.png", "What is it?"], "fit": ["model", "--card", "4GiB"],
}  # fmt: skip

def tries():
    for command, spec in COMMANDS.items():
        arguments = [p.name for p in spec.params if p.param_type_name == "argument"]
        for parameter in spec.params:
            if parameter.name != "help" and not getattr(parameter, "is_flag", False):
                yield pytest.param(command, parameter, arguments, id=f"{command}-{parameter.name}")


@pytest.mark.parametrize(("command", "parameter", "arguments"), list(tries()))
def test_an_argument_of_a_command_is_refused(say, counted, monkeypatch, command, parameter, arguments):
    """In one sentence; where a text is right for it, what else the command was given is refused."""
    if command == "preflight" and parameter.name == "runs_dir":
        monkeypatch.setattr("medprune.runs.checkup.checkup", lambda *_: pytest.fail("the machine was looked at"))
    for text in NAMES:
        words = list(LEAST.get(command, []))
        if parameter.name in arguments:
            words[arguments.index(parameter.name)] = text
        else:
            words += [parameter.opts[0], text]
        status, said = say(command, *words, *(["-p", "seed", "-1"] if command in ("run", "preflight", "rehearse") else []))
        if not (command == "runs" and status == 0):  # it says that there are none
            assert status == 2 and is_one_sentence(said), (command, words, said)
        counted("arguments refused")
