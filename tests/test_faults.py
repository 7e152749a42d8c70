"""What a user can get wrong ends in one sentence that names it and says what would be right, before any notebook runs."""

import subprocess
import sys

import papermill
import pytest

from medprune import cli
from medprune.data import synthetic
from medprune.runs import series
from medprune.settings import N_CONDITIONS, REPO, STAGES, Settings, describe, resolve, seen_by, values_of
from medprune.store import write_json

CLI = [sys.executable, "-m", "medprune"]


@pytest.fixture
def folders(tmp_path):
    """Folders of images: none, broken ones, a single one, and one whose condition has no name."""
    image = synthetic.draw("rosacea", 0, 64)[0]
    (tmp_path / "empty").mkdir()
    for folder in ("corrupt/rosacea", "single/rosacea", "unnamed/holiday"):
        (tmp_path / folder).mkdir(parents=True)
    for n in range(3):
        (tmp_path / "corrupt" / "rosacea" / f"{n}.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
        image.save(tmp_path / "unnamed" / "holiday" / f"{n}.jpg")
    image.save(tmp_path / "single" / "rosacea" / "0.jpg")
    return tmp_path


@pytest.fixture
def refuse(monkeypatch, capsys, tmp_path):
    """Run the command line in this process; return the one sentence it ends in. A notebook that starts is a failure."""

    def run(*words):
        monkeypatch.setattr(series, "_execute", lambda stage, *_: pytest.fail(f"{stage} was started"))
        monkeypatch.setattr(sys, "argv", ["medprune", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        assert stop.value.code == 2 and said.out == ""
        lines = said.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("medprune: ") and lines[0].endswith(".")
        assert not (tmp_path / "runs").exists(), "something was written before the refusal"
        return lines[0]

    return run


@pytest.mark.parametrize(("words", "named", "right"), [
    (["--profile", "smok"], "'smok'", "smoke, local, t4 or auto"),
    (["--from", "3"], "'3'", "03_prune_sweep"),
    (["--to", "06"], "'06'", "06_judge_eval"),
    (["--from", "03_prune_sweep", "--to", "02_layer_importance"], "--to 02_layer_importance", "before --from 03_prune_sweep"),
    (["--to", "06_judge_eval", "-p", "evaluations", "9"], "'evaluations' would change nothing", "--to 06_judge_eval"),
    (["--from", "03_prune_sweep"], "no finished 01_finetune", "run 01_finetune first"),
    (["--name", "a/b"], "'a/b'", "plain folder name"),
    (["-p", "grup_size", "64"], "'grup_size'", "group_size"),
    (["--name", ".."], "'..'", "plain folder name"),
    (["-p", "profile", "local"], "'profile'", "`medprune settings`"),
    (["-p", "run_name", "demo"], "'run_name' is not known;", "`medprune settings`"),
    (["-p", "seed", "1", "-p", "seed", "2"], "-p seed", "given twice"),
    (["-p", "group_size", "48"], "group_size=48", "32, 64 or 128"),
    (["-p", "group_size", "128"], "64 inputs", "these fit: [32, 64]"),
    (["-p", "group_size", "large"], "'large'", "32, 64 or 128"),
    (["-p", "blocks_removed", "[0,1,99]"], "99", "only 3 of the model's 6 blocks"),
    (["-p", "budget_mib", "0.1"], "0.1 MiB", "the least takes"),
    (["-p", "blocks_removed", "[0]"], "blocks_removed=[0]", "0 and at least two more counts"),
    (["-p", "blocks_removed", "[0,2]"], "blocks_removed=[0, 2]", "0 and at least two more counts"),
    (["-p", "blocks_removed", "[2,1,0]"], "blocks_removed=[2, 1, 0]", "rising"),
    (["-p", "blocks_removed", "[1,2,3]"], "blocks_removed=[1, 2, 3]", "must be 0 and"),
    (["-p", "blocks_removed", "[0,1,1]"], "blocks_removed=[0, 1, 1]", "rising"),
    (["-p", "blocks_removed", "2"], "blocks_removed=2", "valid tuple"),
    (["-p", "recover", "[0]"], "recover has 0", "greater than or equal to 1"),
    (["-p", "recipes", "[]"], "recipes=[]", "at least 1"),
    (["-p", "data_fractions", "[1.0,1.0]"], "data_fractions=[1.0, 1.0]", "each once"),
    (["-p", "data_fractions", "[1.5]"], "data_fractions has 1.5", "less than or equal to 1"),
    (["-p", "learning_rate", "NaN"], "learning_rate=nan", "finite number"),
    (["-p", "seed", "-1"], "seed=-1", "greater than or equal to 0"),
    (["-p", "seed", "true"], "seed=True", "no truth value"),
    (["-p", "image_size", "8"], "image_size=8", "greater than or equal to 32"),
    (["-p", "vision_steps", "-3"], "vision_steps=-3", "greater than or equal to 0"),
    (["-p", "card_images", "0"], "card_images=0", "greater than or equal to 1"),
    (["-p", "judge_url", "not a url"], "judge_url='not a url'", "http://localhost:8000/v1"),
    (["-p", "judge_url", "https://me:secret@host/v1"], "judge_url", "no name, password or query"),
    (["-p", "awq_rows", "3"], "awq_rows=3", "greater than or equal to 4"),
    (["-p", "patience", "2", "-p", "n_held_out", "0"], "patience=2", "needs n_held_out"),
    (["-p", "recover", "[3]"], "recover=[3]", "among blocks_removed=[0, 1, 2]"),
    (["-p", "recover", "[1,1]"], "recover=[1, 1]", "each once"),
    (["-p", "protected_blocks", "[0,9]"], "9", "0 to 5"),
    (["-p", "methods", '["awq","gptq"]'], "'gptq'", "'rtn', 'awq', 'bnb' or 'hqq'"),
    (["-p", "methods", '["rtn"]'], "['rtn']", "must hold awq"),
    (["-p", "primary", '["awq-recovered-2","original"]'], "'awq-recovered-2'", "must name two of"),
    (["-p", "primary", '["original","original"]'], "'original'", "must name two of"),
    (["-p", "primary", '["hqq-recovered","original"]'], "'hqq-recovered'", "must name two of"),
    (["-p", "methods", '["awq"]'], "['awq']", "and one beside it"),
    (["-p", "n_train", "20"], "n_train=20", "multiple of 8"),
    (["-p", "n_calibration", "25"], "n_calibration=25", "n_train=24"),
    (["-p", "base", "smolm2"], "'smolm2'", "tiny, smollm2"),
    (["-p", "settings", '{"batch_row": 3}'], "'batch_row'", "batch_rows"),
    (["-p", "settings", "3"], "settings=3", "must be a dict"),
    (["-p", "settings", '{"judge": "server"}'], 'judge="server"', "judge_url and judge_model"),
    (["-p", "seed"], "seed", "NAME VALUE"),
])  # fmt: skip
def test_run_refuses(refuse, tmp_path, words, named, right):
    profile = [] if "--profile" in words else ["--profile", "smoke"]
    said = refuse("run", *profile, "--runs-dir", str(tmp_path / "runs"), *words)
    assert named in said and right in said


@pytest.mark.parametrize(("folder", "words"), [
    ("empty", "it is empty"), ("corrupt", "unusable image"), ("unnamed", "directory names no condition"),
    ("single", "no condition twice"), ("missing", "neither a folder nor a CSV or Parquet table"),
])  # fmt: skip
def test_run_refuses_images(refuse, folders, folder, words):
    said = refuse("run", "--profile", "smoke", "--runs-dir", str(folders / "runs"), "--images", str(folders / folder))
    assert str(folders / folder) in said and words in said


def test_a_folder_with_one_good_image_among_broken_ones_is_let_through(folders):
    synthetic.draw("rosacea", 1, 64)[0].save(folders / "corrupt" / "rosacea" / "9.jpg")
    (folders / "corrupt" / "psoriasis").mkdir()
    for n in range(6):
        (folders / "corrupt" / "psoriasis" / f"{n}.jpg").write_bytes(b"no picture")
    series.check_run(resolve("smoke", images=str(folders / "corrupt")))


@pytest.mark.parametrize(("words", "named", "right"), [
    (["--remove", "99"], "99", "0 to 31"), (["--bits", "5.5", "--group-size", "48"], "48", "32, 64, 128"),
    (["--model", "llava-2"], "'llava-2'", "llava-1.5-7b"),
])  # fmt: skip
def test_plan_refuses(refuse, words, named, right):
    said = refuse("plan", *words)
    assert named in said and right in said


def test_refusal_is_the_exit_status_of_the_command_and_costs_no_torch(tmp_path):
    words = ["run", "--profile", "smok", "--runs-dir", str(tmp_path / "runs")]
    done = subprocess.run([*CLI, *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "medprune: profile 'smok' is not known: choose one of smoke, local, t4 or auto.\n"
    code = "import sys, medprune.runs.series, medprune.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def half_a_run(tmp_path, **files):
    """Lay out a run whose notebook 01 says that it is finished, with these files in its folder."""
    first = tmp_path / "broken" / "01_finetune"
    chosen = values_of(resolve("smoke"))
    write_json(tmp_path / "broken" / "run.json", {"settings": chosen})
    manifest = {"stage": STAGES[0], "settings": seen_by(STAGES[0], chosen), "inputs": {}, "outputs": {}, "overrides": {}}
    manifest |= {"code": "", "versions": {}, "contexts": [], "seconds": 1.0, "finished": ""}
    write_json(first / "manifest.json", manifest)
    for name, value in files.items():
        write_json(first / name.replace("_json", ".json"), value)
    words = ["run", "--profile", "smoke", "--runs-dir", str(tmp_path), "--name", "broken", "--from", STAGES[1]]
    notebook = tmp_path / "broken" / STAGES[1] / f"{STAGES[1]}.ipynb"
    return subprocess.run([*CLI, *words], capture_output=True, text=True, timeout=300, cwd=REPO), first, notebook


def test_a_mistake_that_a_notebook_finds_is_one_sentence_too(tmp_path):
    done, first, notebook = half_a_run(tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "IPKernelApp" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"medprune: {STAGES[1]} stopped: {first / 'model'} holds no config.json: it is not a model's folder "
        f"(its cells: {notebook})."
    )
    assert notebook.exists() and not (notebook.parent / "manifest.json").exists()


def test_a_crash_in_a_notebook_has_a_status_of_its_own(tmp_path, monkeypatch, capsys):
    def crash(*_, **__):
        raise papermill.PapermillExecutionError(3, 3, "", "ZeroDivisionError", "division by zero", [])

    monkeypatch.setattr(papermill, "execute_notebook", crash)
    for debug in ([], ["--debug"]):
        words = ["medprune", "run", "--profile", "smoke", "--runs-dir", str(tmp_path), *debug]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(RuntimeError if debug else SystemExit) as stop:
            cli.main()
    assert "01_finetune crashed: ZeroDivisionError: division by zero" in str(stop.value)
    monkeypatch.setattr(sys, "argv", words[:-1])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 3 and "medprune: 01_finetune crashed" in capsys.readouterr().err


FULL = papermill.PapermillExecutionError(3, 3, "", "SafetensorError", "I/O error: No space left on device (os error 28)", [])


@pytest.mark.parametrize(("error", "status", "words"), [
    (FULL, 2, "01_finetune stopped: I/O error: No space left on device (os error 28). Make room for "),
    (RuntimeError("Kernel died"), 3, "01_finetune was killed, for want of memory maybe: run again, and it goes on there."),
    (OSError(28, "No space left on device"), 2, "01_finetune.ipynb cannot be used: No space left on device."),
])  # fmt: skip
def test_what_the_machine_lacks_is_one_sentence(tmp_path, monkeypatch, capsys, error, status, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(papermill, "execute_notebook", fail)
    monkeypatch.setattr(sys, "argv", ["medprune", "run", "--profile", "smoke", "--runs-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == status and words in said and said.endswith(".")


@pytest.mark.parametrize("spoil", [lambda text: text[: len(text) // 2], lambda text: "", lambda text: text.replace('"execution_count": 1', '"execution_count": null')])
def test_a_notebook_that_a_kill_cut_short_is_not_published(tmp_path, spoil):
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": "1", "outputs": [], "execution_count": 1}
    whole = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell]}
    for stage in STAGES:
        write_json(tmp_path / stage / "manifest.json", {})
        write_json(tmp_path / stage / f"{stage}.ipynb", whole)
    file = tmp_path / STAGES[4] / f"{STAGES[4]}.ipynb"
    file.write_text(spoil(file.read_text()))
    before = [(REPO / "notebooks" / f"{stage}.ipynb").read_bytes() for stage in STAGES]
    with pytest.raises(ValueError, match=f"{STAGES[4]}.ipynb is no whole executed notebook: run the series again --from"):
        series.publish(tmp_path)
    assert before == [(REPO / "notebooks" / f"{stage}.ipynb").read_bytes() for stage in STAGES]


@pytest.mark.parametrize(("given", "setting", "value"), [
    ("[0,1,2]", "blocks_removed", (0, 1, 2)), ("1e-3", "learning_rate", 1e-3), ("8", "batch_rows", 8),
    ('["lora"]', "recipes", ("lora",)), ("true", "equal_time", True), ("null", "micro_batch", None),
])  # fmt: skip
def test_texts_as_papermill_gives_them_are_read_as_what_they_mean(given, setting, value):
    assert getattr(resolve("smoke", **{setting: given}), setting) == value


def test_every_setting_says_which_notebooks_read_it_and_what_it_means():
    lines = describe()
    assert len(lines) == 2 * (len(Settings.model_fields) - 1)
    for name, field in Settings.model_fields.items():
        assert set(field.json_schema_extra["read_by"]) <= set("12345678") and len(field.description) > 5, name
        assert name == "name" or any(line.startswith(f"{name} (0") for line in lines)


def test_sizes_that_are_checked_without_torch_are_those_of_the_models(tmp_path, monkeypatch):
    from medprune.models.assembled import GGUF, prepare_base
    from medprune.models.loading import wheel_folder
    from medprune.models.sizes import ASSEMBLED, named_config

    monkeypatch.setenv("MEDPRUNE_CACHE", str(tmp_path))
    built = named_config(prepare_base("tiny"))
    for part, sizes in ASSEMBLED["tiny"].items():
        assert {k: built[part][k] for k in sizes} == sizes
    from gguf import GGUFReader

    fields = GGUFReader(wheel_folder(GGUF[0]) / GGUF[1]).fields
    names = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count", "attention.head_count_kv")
    *sizes, vocabulary = ASSEMBLED["smollm2"]["text_config"].values()
    assert [fields[f"llama.{n}"].contents() for n in names] == sizes
    n_tokens = len(fields["tokenizer.ggml.tokens"].contents()) + 1  # and <image>
    assert vocabulary == n_tokens + -n_tokens % 64
    assert len(synthetic.CONDITIONS) == N_CONDITIONS


def test_other_conditions_than_the_eight_come_from_their_facts_file(tmp_path):
    from medprune.data.questions import load_conditions

    facts = load_conditions()
    ours = {name: facts[old] for name, old in (("tinea corporis", "psoriasis"), ("vitiligo", "rosacea"))}
    write_json(tmp_path / "facts.json", ours)
    for condition in ours:
        (tmp_path / "photos" / condition).mkdir(parents=True)
        for n in range(4):
            synthetic.draw("rosacea", n, 64)[0].save(tmp_path / "photos" / condition / f"{n}.png")
    images, facts_file = str(tmp_path / "photos"), str(tmp_path / "facts.json")
    with pytest.raises(ValueError, match="condition"):
        series.check_run(resolve("smoke", images=images))
    series.check_run(resolve("smoke", {"conditions": facts_file}, images=images))
    with pytest.raises(ValueError, match="needs images of them"):
        resolve("smoke", conditions=facts_file)
