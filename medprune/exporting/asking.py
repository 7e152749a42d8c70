"""`medprune ask`: one question about one picture, to one model or to two of them side by side."""

import time
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageOps

from medprune.answers.decoding import answer
from medprune.data.pictures import open_image
from medprune.exporting import engines
from medprune.exporting.folders import embed, find_model, load_folder
from medprune.progress import quiet


@dataclass(frozen=True)
class Said:
    """What a model of this name answered, in how many tokens, and the seconds that loading and answering took."""

    name: str
    text: str
    tokens: int
    load_s: float
    answer_s: float


def check_question(image: str | Path, question: str, max_new_tokens: int) -> str:
    """Return a question without spaces around it; ValueError, before a model is loaded, for what cannot be asked."""
    if not question.strip():
        raise ValueError("the question is empty: ask something, such as 'What is the name of this disease?'.")
    if "<image>" in question:
        raise ValueError("the question holds <image>: the picture is put before it by itself, so leave that out.")
    if max_new_tokens < 1:
        raise ValueError(f"--tokens is {max_new_tokens}: an answer has at least one.")
    if not Path(image).is_file():
        raise ValueError(f"{str(image)!r} is not there, or no file: give a picture.")
    open_image(image)
    return question.strip()


def ask_served(exported: Path, image: str, question: str, max_new_tokens: int, url: str) -> str:
    """Ask a server that has an exported folder, and is sent pictures as that folder's engine takes them."""
    question = check_question(image, question, max_new_tokens)
    picture = open_image(image)
    if engines.is_apart(exported):
        picture = embed(exported, [image])[image]
    elif engines.engine_of(exported) == "llama.cpp":  # which would pad it
        picture = ImageOps.fit(picture, (min(picture.size),) * 2)
    return engines.ask_server(engines.bare(url), picture, question, max_new_tokens).text


def ask(names: list[str], image: str, question: str, max_new_tokens: int, runs_dir: str | None = None) -> list[Said]:
    """Ask each model, a folder or RUN:METHOD, one after another; they are all found before the first is loaded."""
    quiet()
    question = check_question(image, question, max_new_tokens)
    folders = [find_model(name, runs_dir) for name in names]
    found = []
    for name, folder in zip(names, folders, strict=True):
        begun = time.perf_counter()
        model, processor = load_folder(folder)
        loaded = time.perf_counter()
        (said,) = answer(model, processor, [{"path": image, "question": question}], max_new_tokens)
        found.append(Said(name, said.text, said.tokens, loaded - begun, time.perf_counter() - loaded))
        del model
    return found
