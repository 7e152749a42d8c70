"""Every file that is read, cut, stretched, with other bytes or other values: it is read, or one sentence names it.

A sentence is a ValueError's or an OSError's, which the command line prints as one line. `make test` tries a few
hundred, `make faults` thousands.
"""

import functools
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from medprune.data.pictures import open_image
from medprune.data.questions import load_conditions
from medprune.data.record import columns_of, read_rows
from medprune.data.records import load_images
from medprune.judging.chat import parse_scores
from medprune.judging.scores import read_scores
from medprune.models.loading import stored_tensors
from medprune.models.sizes import ASSEMBLED, account, base_config, skeleton
from medprune.pruning.plan import load_plan
from medprune.runs import upkeep
from medprune.settings import STAGES, build, resolve, values_of
from medprune.store import Units, settings_before, why_undone, write_json

ALL = os.environ.get("MEDPRUNE_FAULTS") == "all"
EACH = 900 if ALL else 20  # inputs for each reader
CONDITIONS = load_conditions()
fuzz = settings(max_examples=EACH, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=not ALL)

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4), max_leaves=8)


@st.composite
def damaged(draw, whole: bytes):
    """Return a file's bytes cut, emptied, with some replaced or put in, or others altogether."""
    kind = draw(st.sampled_from(["cut", "other", "bytes", "more", "zeros", "twice"]))
    at = draw(st.integers(0, len(whole)))
    if kind == "cut":
        return whole[:at]
    if kind == "other":
        return draw(st.binary(max_size=200))
    if kind == "twice":
        return whole[:at] + whole
    put = bytes(draw(st.integers(1, 64))) if kind == "zeros" else draw(st.binary(min_size=1, max_size=8))
    return whole[:at] + put + whole[at + (0 if kind == "more" else len(put)) :]


@st.composite
def altered(draw, value):
    """Return a JSON value with one of its parts, at any depth, left out or replaced."""
    if not draw(st.booleans()) and isinstance(value, dict | list) and value:
        key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
        items = dict(value) if isinstance(value, dict) else list(value)
        if draw(st.integers(0, 4)) == 0:
            del items[key]
        else:
            items[key] = draw(altered(value[key]))
        return items
    return draw(VALUES)


def spoiled(whole: bytes):
    """Return what stands in a file's place: damaged bytes, or of a JSON other values too."""
    try:
        value = json.loads(whole)
    except ValueError:
        return damaged(whole)
    return damaged(whole) | altered(value).map(lambda v: json.dumps(v).encode())


def try_reading(read, file: Path, data: bytes, named: str | None = None):
    """Read a file of these bytes; fail unless it is read, or a sentence names it."""
    file.write_bytes(data)
    try:
        read()
    except (ValueError, OSError) as error:
        said = str(error)
        assert (named or file.name) in said and len(said.splitlines()) == 1, (data, said)


TABLE = "path,condition,patient,skin_type,split\na.png,psoriasis,1,II,train\nb.png,rosacea,2,,test\n"


def pictures(folder):
    for name in "ab":
        Image.new("RGB", (32, 32), "tan").save(folder / f"{name}.png")


@pytest.fixture
def reader(request, tmp_path):
    """Return (the file, its whole bytes, what reads it) of a name in READERS."""
    return READERS[request.param](tmp_path)


def table(folder, suffix=".csv"):
    pictures(folder)
    file = folder / f"table{suffix}"
    if suffix == ".parquet":
        import pandas as pd

        pd.read_csv(io.StringIO(TABLE)).to_parquet(file)
    else:
        file.write_text(TABLE)

    def read():
        columns_of(file), read_rows(file)
        load_images(str(file), CONDITIONS)

    return file, file.read_bytes(), read


def image(folder, kind):
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(buffer, kind)
    file = folder / f"picture.{kind.lower()}"
    return file, buffer.getvalue(), lambda: open_image(file)


def facts(folder):
    whole = json.dumps({name: CONDITIONS[name] for name in ("rosacea", "psoriasis")}).encode()
    return folder / "facts.json", whole, lambda: load_conditions(folder / "facts.json")


def plan(folder):
    whole = {"base": "b", "n_blocks": 6, "kept": [0, 1, 3, 4, 5], "criterion": "magnitude", "removed": [2]}
    return folder / "plan.json", json.dumps(whole).encode(), lambda: load_plan(folder / "plan.json")


def header(folder):
    import torch
    from safetensors.torch import save_file

    file = folder / "model.safetensors"
    save_file({"a": torch.zeros(2, 2), "b": torch.ones(3)}, file, {"format": "pt"})
    model = skeleton(ASSEMBLED["tiny"])
    return file, file.read_bytes(), lambda: stored_tensors(folder, model)


def config(folder):
    whole = {"model_type": "llava", "text_config": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
             "num_hidden_layers": 2, "vocab_size": 100}, "vision_config": {"hidden_size": 32, "intermediate_size": 64,
             "num_hidden_layers": 2, "image_size": 32, "patch_size": 8, "num_attention_heads": 2}}  # fmt: skip
    return folder / "config.json", json.dumps(whole).encode(), lambda: account(base_config(folder))


def scores(folder):
    whole = b"id,key,method,answer,score_percent\na 1,1,a,NA,50.0\na 2,2,a,\"x, y\",75.0\n"
    return folder / "scores.csv", whole, lambda: read_scores(folder / "scores.csv")


def units(folder):
    file = folder / "units.sqlite"
    found = Units(file, "c")
    for n in range(30):
        found.add(f"key {n}", {"answer": "text " * 20})

    def read():
        again = Units(file, "c")
        [again[f"key {n}"] for n in range(30) if f"key {n}" in again]
        again.add("new", 1)

    return file, file.read_bytes(), read


def run_of(folder):
    """Lay out a run whose stages say that they are finished."""
    chosen = values_of(resolve("smoke"))
    write_json(folder / "demo" / "run.json", {"settings": chosen})
    for stage in STAGES:
        manifest = {"stage": stage, "settings": {}, "overrides": {}, "inputs": {"a": "b"}, "code": "c", "versions": {"d": "1"}}
        manifest |= {"outputs": {"e": "f"}, "contexts": ["g"], "seconds": 1.5, "finished": "2026-11-26T00:00:00"}
        write_json(folder / "demo" / stage / "manifest.json", manifest)
    return folder / "demo", chosen


def manifest(folder):
    root, chosen = run_of(folder)
    Units(root / "units.sqlite", "g")

    def read():
        why_undone(root, STAGES[2], chosen)
        settings_before(root, STAGES[5])
        upkeep.list_runs(folder), upkeep.stale_units(root)

    file = root / STAGES[2] / "manifest.json"
    return file, file.read_bytes(), read


def run_json(folder):
    root, _ = run_of(folder)

    def read():
        build(settings_before(root, STAGES[5]), {})
        upkeep.list_runs(folder)

    return root / "run.json", (root / "run.json").read_bytes(), read


READERS = {
    "table of images": table, "parquet of images": functools.partial(table, suffix=".parquet"),
    "png": functools.partial(image, kind="PNG"), "jpeg": functools.partial(image, kind="JPEG"),
    "webp": functools.partial(image, kind="WEBP"), "tiff": functools.partial(image, kind="TIFF"), "facts": facts,
    "plan": plan, "safetensors": header, "config.json": config, "scores": scores, "units": units, "manifest": manifest,
    "run.json": run_json,
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS, indirect=True)
def test_a_spoiled_file_is_read_or_named(reader, counted):
    file, whole, read = reader
    try_reading(read, file, whole)  # as it was written

    @fuzz
    @given(spoiled(whole))
    def check(data):
        try_reading(read, file, data)
        counted("inputs fuzzed")

    check()


@pytest.mark.parametrize("reader,old,new", [
    ("config.json", b'"llava"', b"null"), ("config.json", b'"llava"', b'["llava"]'), ("config.json", b'"llava"', b'""'),
    ("config.json", b'"hidden_size": 64', b'"hidden_size": null'), ("config.json", b'"vocab_size": 100', b'"vocab_size": 0.5'),
    ("config.json", b'"num_hidden_layers": 2, "voc', b'"num_hidden_layers": 0, "voc'),
    ("config.json", b'"num_hidden_layers": 2, "voc', b'"num_hidden_layers": 2147483648, "voc'), ("run.json", b'"smoke"', b"[]"),
    ("parquet of images", b"psoriasis", b"\xffsoriasis"),
    ("scores", b"a 1,1,", b"a 1,1,id,key,method,answer,score_percent\na 1,1,"),
    ("units", b'"answer', b'"\xffn\nwer'), ("units", b"CREATE TABLE", b"CREATE \x80ABLE"),
    ("manifest", b'"g"', b"null"), ("manifest", b'"g"', b"[]"),
], indirect=["reader"])  # fmt: skip
def test_what_fuzzing_found_once_is_named(reader, old, new):
    file, whole, read = reader
    assert old in whole
    file.write_bytes(whole.replace(old, new))
    with pytest.raises((ValueError, OSError)) as error:
        read()
    assert file.name in str(error.value) and len(str(error.value).splitlines()) == 1


@fuzz
@given(st.text(max_size=400) | altered({"truthfulness": 4, "groundedness": 3, "hallucination": 5}).map(json.dumps), st.text(max_size=40))
def judge_reply(counted, reply, answer):
    found = parse_scores(reply, answer)
    assert found is None or all(0 <= v <= 5 for v in found.values())
    counted("inputs fuzzed")


def test_a_reply_of_a_judge_is_scores_or_none(counted):
    judge_reply(counted)
