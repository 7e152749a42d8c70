"""Fixtures that several test modules share."""

import shutil
import subprocess

import pytest
import torch
from exported import write_family, write_odd
from PIL import Image

from medprune.data.questions import load_conditions
from medprune.models.assembled import prepare_base
from medprune.models.loading import load


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Return the folder of the tiny base, made for this session of tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return prepare_base("tiny")


@pytest.fixture
def tiny(base):
    """Return (model, processor) of the tiny base in float32, loaded anew."""
    return load(base, dtype=torch.float32)


@pytest.fixture
def family(tiny, tmp_path):
    """Return make(kind, tied) -> the folder of the tiny base with a text model of this kind, its weights random."""
    return lambda kind, tied: write_family(*tiny, tmp_path / f"{kind}-{tied}", kind, tied)


@pytest.fixture
def odd(tiny, tmp_path):
    """Return the folder of the tiny base with a tower that no engine knows."""
    return write_odd(*tiny, tmp_path / "odd")


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Return rows of three pictures, three questions each, as `data.questions.test_questions` makes them."""
    folder = tmp_path_factory.mktemp("images")
    found = []
    for n, colour in enumerate(("red", "navy", "tan")):
        Image.new("RGB", (40, 48), colour).save(folder / f"{n}.png")
        for question in ("What is the name of this disease?", "How is it treated?", "And the signs?"):
            found.append({"id": f"{n}{question}", "path": str(folder / f"{n}.png"), "question": question})
    return found


@pytest.fixture(scope="session")
def chat():
    """Return a conversation of two questions about rosacea, with the shipped facts as answers."""
    facts = load_conditions()["rosacea"]["answers"]
    said = {"What is it?": facts["name"], "How is it treated?": facts["treatment"]}
    messages = []
    for question, answer in said.items():
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages[0]["content"].insert(0, {"type": "image"})
    return messages


@pytest.fixture
def opened(tmp_path):
    """Return a function that opens a page in chromium and returns its document after its scripts ran."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium here to open a page in")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--window-size=1400,1000", "--virtual-time-budget=3000", "--dump-dom"]

    def document(page):
        return subprocess.run([browser, *options, page], capture_output=True, text=True, timeout=120, check=True).stdout

    return document
