"""Does an exported folder, in its real engine, still answer as the model does here?

The same pictures and questions go through our decoder and through the engine's server. Three things are held against
what 16 bits and 32 of our own differ by, which is the floor: tokens that are equal before the first that differs, the
divergence of the first token's distributions, and the length of prompts, in which a wrong chat template shows. From
llama.cpp the image embeddings are taken as well, in which its class token behind the patches (upstream issue 25814)
shows by itself.
"""

import math
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from medprune.answers.decoding import RoomyCache, answer, forward
from medprune.answers.prompts import inputs_of, see
from medprune.data.pictures import open_image
from medprune.data.questions import TESTED, load_questions
from medprune.data.synthetic import write_images
from medprune.exporting import engines
from medprune.exporting.folders import (
    TOWER,
    Source,
    embed,
    export_hub,
    image_embeddings,
    load_folder,
    open_source,
    write_tower,
)
from medprune.exporting.gguf import export_gguf
from medprune.models.families import n_blocks, parts
from medprune.progress import progress
from medprune.quantizing.compared import write_quantized
from medprune.quantizing.packed import PackedLinear
from medprune.quantizing.quantize import batch_hashes
from medprune.store import RECORD, Run, content, context, made, read_json, write_folder, write_text

MAX_EMBEDDING_ERROR = 0.002  # relative, of an image's embeddings; a build that is right shows 0.0007
MAX_ROUNDED_ERROR = 0.01  # the same of a tower in 8 bits, which GGUF rounds anew: 0.0044 was seen
KL_OF_FLOOR = 10  # times the floor's divergence that an engine's may reach, or
KL_NATS = 0.002  # so many nats, whichever is more
EQUAL_OF_FLOOR = 0.5  # the share of the floor's equal tokens below which an engine says something else
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
HEADING = "## Parity"
SHOWN = 3  # answers in the card, beside ours
PROBED = 8  # pictures whose embeddings are compared


@dataclass(frozen=True)
class Ours:
    """What our decoder makes of rows: texts, which ended by themselves, first tokens' log-probabilities (rows, vocab),
    lengths of prompts."""

    texts: list[str]
    ended: list[bool]
    first: torch.Tensor
    prompt_tokens: list[int]


@dataclass(frozen=True)
class Here:
    """What a folder's model makes of rows here.

    exact: in 32 bits; floor: in its own type; pictures by path, as our processor cuts them; embeddings of the first
    PROBED: (images, floats), and `misplaced`, those with CLIP's class token behind the patches; limit: of their error.
    """

    exact: Ours
    floor: Ours
    pictures: dict[str, Image.Image]
    embeddings: torch.Tensor
    misplaced: torch.Tensor | None
    limit: float
    tokenizer: object


def rows_of(images: str | None, n: int, folder: Path, side: int) -> list[dict]:
    """Return rows {"path", "question"} of n pictures and the test's questions; without `images`, of drawn ones.

    folder: where the drawn ones go. Raises ValueError where `images` holds no picture.
    """
    if n < 1:
        raise ValueError(f"--n is {n}: at least one image is needed.")
    if images is None:
        paths = [record.path for record in write_images(folder, -(-n // 8), max(side, 96), 1, "test")]
    else:
        if not Path(images).exists():
            raise ValueError(f"{images} is not there: give a folder of pictures, or one picture.")
        found = [Path(images)] if Path(images).is_file() else sorted(Path(images).rglob("*"))
        paths = [str(path) for path in found if path.suffix.lower() in PICTURES]
        if not paths:
            raise ValueError(f"{images} holds no picture ({', '.join(sorted(PICTURES))}).")
    chosen = paths[:: max(1, len(paths) // n)][:n]
    asked = load_questions()
    return [{"path": path, "question": asked[kind][0]} for path in chosen for kind in TESTED]


def square(processor, path: str) -> Image.Image:
    """Return a picture as our processor cuts it, 8-bit RGB: llama.cpp would pad it to a square instead."""
    cut = processor.image_processor(open_image(path), do_rescale=False, do_normalize=False)["pixel_values"][0]
    return Image.fromarray(np.asarray(cut).astype(np.uint8).transpose(1, 2, 0))


def pictures_of(processor, rows: list[dict]) -> dict[str, Image.Image]:
    """Return the pictures of rows by path, as `square` cuts them."""
    return {path: square(processor, path) for path in dict.fromkeys(row["path"] for row in rows)}


@torch.inference_mode()
def ours(model, processor, rows: list[dict], max_new_tokens: int) -> Ours:
    """Answer rows with our decoder."""
    first, lengths = [], []
    for row in rows:
        prompt = see(processor, row["path"], model.dtype, row["question"])
        cache = RoomyCache(n_blocks(model.config), len(prompt.ids))
        logits = forward(model, prompt.ids[None], cache, inputs_of([prompt]))
        first.append(logits[0].float().log_softmax(-1).cpu())
        lengths.append(len(prompt.ids))
    said = answer(model, processor, rows, max_new_tokens)
    return Ours([a.text for a in said], [a.ended for a in said], torch.stack(first), lengths)


def equal_tokens(tokenizer, ours: list[str], theirs: list[str]) -> float:
    """Return the share, 0 to 1, of answers' tokens that stand before the first that differs."""
    equal = longest = 0
    for pair in zip(ours, theirs, strict=True):
        a, b = (tokenizer(text)["input_ids"] + [-1] for text in pair)  # -1: the end, a token too
        longest += max(len(a), len(b))
        equal += next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return equal / longest


def divergence(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """Return KL(ours || theirs) in nats of a first token, over the tokens that both tell and all others as one.

    Both: log-probabilities by token. Lumping can only lower it: it is at least 0 and at most the full divergence.
    """
    tokens = [token for token in theirs if token in ours]
    p, q = (torch.tensor([said[t] for t in tokens], dtype=torch.float64).exp() for said in (ours, theirs))
    p, q = (torch.cat([x, (1 - x.sum()).clamp(min=0)[None]]) for x in (p, q))
    known = p > 0
    return float((p[known] * (p[known].log() - q[known].clamp(min=1e-12).log())).sum())


def _at(first: torch.Tensor, theirs: dict[int, float]) -> dict[int, float]:
    """Return our log-probabilities (vocab,) of the tokens that another tells."""
    return {token: float(first[token]) for token in theirs if token < len(first)}


def _top(first: torch.Tensor) -> dict[int, float]:
    found = first.topk(min(engines.TOP, len(first)))
    return dict(zip(found.indices.tolist(), found.values.tolist(), strict=True))


# ---- image embeddings
def _flat(found: dict[str, np.ndarray]) -> torch.Tensor:
    """Return image embeddings by path as (images, tokens x hidden)."""
    return torch.from_numpy(np.stack([e.flatten() for e in found.values()]))


def shown(exported: Path, pictures: dict) -> dict:
    """Return what an exported folder's engine is sent, by path: pictures, or what its own tower makes of them."""
    return embed(exported, list(pictures)) if engines.is_apart(exported) else pictures


def class_token_last(model):
    """Put the class token behind the patches, as stock llama.cpp does (issue 25814); return the hook, to be removed."""

    def misplace(module, _, output):
        places = module.position_embedding.weight
        bare = output - places
        return torch.cat([bare[:, 1:], bare[:, :1]], 1) + places

    return parts(model).vision_tower.embeddings.register_forward_hook(misplace)


def embedding_errors(found: list[np.ndarray], wanted: torch.Tensor) -> torch.Tensor:
    """Return the relative error of each picture's embeddings; infinite where there are more or fewer of them."""
    if any(f.size != w.numel() for f, w in zip(found, wanted, strict=True)):
        return torch.full((len(wanted),), float("inf"))
    return (torch.from_numpy(np.stack(found)) - wanted).norm(dim=1) / wanted.norm(dim=1)


# ---- the check
def parity(folder: Path, exported: Path, rows: list[dict], url=None, threads=1, max_new_tokens=48) -> dict:
    """Compare a folder here with an exported one in its engine, or behind `url`; return what was found.

    Keys: engine, images, prompts, equal_tokens, floor_equal_tokens (shares), kl_nats, floor_kl_nats (means),
    embedding_error (worst, relative; None where the engine does not tell), embedding_limit, faults (sentences; none
    where all holds) and table (a row for each prompt). Raises ValueError where the engine is not installed or does not
    take the folder.
    """
    if not url:
        engines.program(engines.engine_of(exported))
    here = ask_here(folder, rows, max_new_tokens)
    probed = ([], None) if url else probe(here, exported)
    pictures = shown(exported, here.pictures)
    if url:
        replies = _ask(engines.bare(url), pictures, rows, max_new_tokens)
    else:
        with engines.running(exported, threads) as server:
            replies = _ask(server.address, pictures, rows, max_new_tokens)
    return compared(here, rows, replies, "server" if url else engines.engine_of(exported), *probed)


def _ask(address: str, pictures: dict, rows: list[dict], max_new_tokens: int) -> list[engines.Reply]:
    return [engines.ask_server(address, pictures[r["path"]], r["question"], max_new_tokens) for r in rows]


def ask_here(folder: Path, rows: list[dict], max_new_tokens: int) -> Here:
    """Answer rows with a folder's model here, which takes 4 bytes a weight."""
    model, processor = load_folder(folder, torch.float32)
    pictures = pictures_of(processor, rows)
    exact, some, wrong = ours(model, processor, rows, max_new_tokens), list(pictures)[:PROBED], None
    right = _flat(image_embeddings(model, processor, some))
    if model.config.vision_config.model_type == TOWER:
        hook = class_token_last(model)
        wrong = _flat(image_embeddings(model, processor, some))
        hook.remove()
    widths = [m.bits for m in parts(model).vision_tower.modules() if isinstance(m, PackedLinear)]
    limit = MAX_ROUNDED_ERROR if 8 in widths else MAX_EMBEDDING_ERROR
    del model
    floor = ours(load_folder(folder)[0], processor, rows, max_new_tokens)
    return Here(exact, floor, pictures, right, wrong, limit, processor.tokenizer)


def compared(here: Here, rows, replies: list[engines.Reply], engine: str, faults: list[str], error) -> dict:
    """Return what `parity` does of replies to rows; faults and error: of `probe`."""
    wanted, floor = here.exact, here.floor
    table = pd.DataFrame(rows)
    table["ours"], table["theirs"] = wanted.texts, [reply.text for reply in replies]
    table["prompt_tokens"], table["their_prompt_tokens"] = wanted.prompt_tokens, [r.prompt_tokens for r in replies]
    table["kl_nats"] = [
        divergence(_at(w, r.first), r.first) if r.first else np.nan for w, r in zip(wanted.first, replies, strict=True)
    ]
    tops = map(_top, floor.first)
    floor_kl = np.mean([divergence(_at(w, top), top) for w, top in zip(wanted.first, tops, strict=True)])
    found = {"engine": engine, "images": len(here.pictures), "prompts": len(rows)}
    found |= {"equal_tokens": equal_tokens(here.tokenizer, wanted.texts, table["theirs"].tolist())}
    found |= {"floor_equal_tokens": equal_tokens(here.tokenizer, wanted.texts, floor.texts)}
    found |= {"kl_nats": float(table["kl_nats"].mean()), "floor_kl_nats": float(floor_kl)}
    found |= {"embedding_error": error, "embedding_limit": here.limit}
    return found | {"faults": faults + _faults(found, table), "table": table}


def probe(here: Here, exported: Path) -> tuple[list[str], float | None]:
    """Return (faults, worst relative error) of the image embeddings in an exported folder's engine.

    Where the tower is apart it is asked instead. The error is None where the engine does not tell them.
    """
    some = dict(list(here.pictures.items())[:PROBED])
    if engines.is_apart(exported):
        found = [e.flatten() for e in embed(exported, list(some)).values()]
    else:
        found = engines.embeddings(exported, list(some.values()))
    if found is None:
        return [], None
    worst = float(embedding_errors(found, here.embeddings).max())
    if worst <= here.limit:
        return [], worst
    misplaced = float("inf") if here.misplaced is None else float(embedding_errors(found, here.misplaced).max())
    off = f"the runtime's image embeddings are off by {worst:.4f}, more than {here.limit}"
    if misplaced <= here.limit:
        why = f"it puts CLIP's class token behind the patches (llama.cpp issue 25814): so misplaced, {misplaced:.4f}"
        return [f"{off}; {why}."], worst
    return [f"{off}; tower, projector or pictures are not the model's."], worst


def _faults(found: dict, table: pd.DataFrame) -> list[str]:
    """Return what is wrong, in sentences.

    Equal tokens are a blunt measure, for a text that parts at a near tie loses all its later tokens: of engines that
    were right 83% of the floor's share was the least seen, of what answers something else next to nothing is left.
    Where a first token's distribution shows the fault already, they add none.
    """
    faults, equal, floor = [], found["equal_tokens"], found["floor_equal_tokens"]
    longer = table["their_prompt_tokens"] - table["prompt_tokens"]
    if (longer != 0).any():
        said = f"{longer.min():+d} to {longer.max():+d} tokens in {int((longer != 0).sum())} of {len(table)}"
        faults.append(f"prompts differ ({said}): the chat template or the tokenizer is not the model's.")
    limit = max(KL_OF_FLOOR * found["floor_kl_nats"], KL_NATS)
    if found["kl_nats"] > limit:
        faults.append(f"first tokens diverge by {found['kl_nats']:.4f} nats, more than {limit:.4f}.")
    elif equal < EQUAL_OF_FLOOR * floor:
        least = f"less than {EQUAL_OF_FLOOR:.0%} of the {floor:.1%} that 16 bits leave here"
        faults.append(f"{equal:.1%} of the tokens are equal before the first that differs, {least}.")
    if math.isnan(found["kl_nats"]) and found["embedding_error"] is None and not floor:
        faults.append("nothing could be compared: neither probabilities nor embeddings are told, and no token is sure.")
    return faults


def report(found: dict) -> list[str]:
    """Return what was found as lines of Markdown."""
    kl = "not told" if np.isnan(found["kl_nats"]) else f"{found['kl_nats']:.5f}"
    error = "not told by this engine" if found["embedding_error"] is None else f"{found['embedding_error']:.4f}"
    lines = [
        f"{found['engine']}, {found['images']} images, {found['prompts']} prompts, against this model in 32 bits; the",
        "floor is the model in its own type, here.",
        "",
        "| | engine | floor |",
        "|---|---|---|",
        f"| tokens equal before the first that differs | {found['equal_tokens']:.1%} "
        f"| {found['floor_equal_tokens']:.1%} |",
        f"| KL of the first token, nats, of {engines.TOP} tokens and the rest | {kl} | {found['floor_kl_nats']:.5f} |",
        f"| image embeddings, worst relative error | {error} | at most {found['embedding_limit']} |",
        "",
    ]
    lines += [f"- {fault}" for fault in found["faults"]] or ["No fault was found."]
    lines += ["", "| question | here | there |", "|---|---|---|"]
    said = found["table"].head(SHOWN)[["question", "ours", "theirs"]].map(lambda text: " ".join(text.split()))
    return lines + ["| " + " | ".join(row) + " |" for row in said.replace(r"\|", "/", regex=True).values]


def add_parity(exported: Path, lines: list[str]) -> None:
    """Put the check's results at the end of an exported folder's model card, in place of earlier ones.

    ValueError where the card is no text in UTF-8.
    """
    file = exported / "README.md"
    try:
        card = file.read_text(encoding="utf-8") if file.exists() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error}), and gets no section on parity: mend it.") from None
    write_text(file, "\n".join([card.partition(HEADING)[0].rstrip(), "", HEADING, *lines]) + "\n")


# ---- a run's models in other engines, each exported once and asked the test questions once
WAYS = {"llama.cpp": export_gguf, "vLLM": export_hub}
AT_ONCE = 16  # questions that a server which runs already is asked together


def awq_once(run: Run, source: Path, group_size: int, calibration: dict, **card) -> Path:
    """Quantize a model by AWQ in 4 bits with another group size, unless that is done; return its folder."""
    hashes = batch_hashes(calibration)
    folder = run.weights("quantized") / f"awq-{group_size}"
    mark = context("medprune.quantizing.checkpoint", content(source), group_size, hashes)
    if not made(folder, mark):
        write_quantized(folder, mark, source, None, ("awq", 4, group_size), calibration, card)
    return folder


def export_once(run: Run, source: Path, name: str, engine: str, write: Callable | None = None, **how) -> Path:
    """Export a model's folder for an engine, unless that is done; return where. ValueError where it takes none such.

    write: how, else as `medprune export` does; it is given `how`. The folder is named after the engine and `name`. Of
    an engine that is a server's address, which must have the model by its name, it stands for that server's.
    """
    folder = run.weights("exported") / f"{re.sub('[^a-z0-9-]', '', engine, flags=re.IGNORECASE)}-{name}"
    record, apart = {}, False
    if engines.is_address(engine):
        if name not in (there := engines.served(engine)):
            raise ValueError(f"{engine} has {', '.join(there)}, not {name}: serve an export in a folder of that name.")
        write, record = _stand_for, {"served_by": {"address": engine, "model": name}}
        apart = engines.wants_embeddings(there[name])
    given = {name: batch_hashes(value) if isinstance(value, dict) else value for name, value in how.items()}
    mark = context(__name__, content(source), engine, given, apart)
    if not made(folder, mark):
        opened = open_source(source, apart)
        shutil.rmtree(folder, ignore_errors=True)
        (write or WAYS[engine])(opened, folder, context=mark, **record, **how)
    return folder


def _stand_for(source: Source, out: Path, **record) -> None:
    """Write what a server has to be sent of pictures, where it does not know the tower; the server has the rest."""
    with write_folder(out, **record) as temporary:
        if source.apart:
            write_tower(source, temporary)


def size_of(folder: Path) -> float:
    """Return the bytes of an exported folder's weights, those of a tower apart too; NaN where a server has them."""
    if engines.served_by(folder):
        return math.nan
    return sum(f.stat().st_size for f in folder.rglob("*") if f.suffix in (".gguf", ".safetensors"))


def ask_engine(run: Run, folder: Path, label: str, pictures: dict, asked: list[dict], most: int, threads: int):
    """Ask an exported model the test questions in its engine; return (answers' rows, replies, costs).

    pictures: by path, as `pictures_of`; most: tokens of an answer. Replies are written as they come, and those
    that there are already are not asked for again. costs: load_s, ms_per_token, peak_bytes and the engine's version,
    NaN where a server ran already; that is asked AT_ONCE questions together.
    """
    there = engines.served_by(folder)
    engine = there["address"] if there else engines.engine_of(folder)
    version, questions = engines.version(engine), [(q["id"], q["asked"]) for q in asked]
    mark = context(__name__, read_json(folder / RECORD)["context"], version, questions, most, threads)
    units, keys = run.units(mark), [f"{label} {q['id']}" for q in asked]
    todo = [(key, q) for key, q in zip(keys, asked, strict=True) if key not in units]
    if todo or f"{label} costs" not in units:
        pictures = shown(folder, pictures)
        with engines.running(folder, threads) as server, progress(len(todo), label, "answer") as bar:

            def ask(key: str, q: dict) -> None:
                picture = pictures[q["path"]]
                units.add(key, asdict(engines.ask_server(server.address, picture, q["question"], most, server.model)))

            with ThreadPoolExecutor(AT_ONCE if there else 1) as pool:
                try:
                    for done in as_completed([pool.submit(ask, key, q) for key, q in todo]):
                        done.result()
                        bar.update()
                finally:
                    pool.shutdown(cancel_futures=True)  # what is in flight is kept, and nothing else begun
            speed = engines.ms_per_token(server.address, pictures[asked[0]["path"]], asked[0]["question"], server.model)
            costs = {"ms_per_token": speed, "load_s": server.load_s, "peak_bytes": server.peak_bytes()}
            units.add(f"{label} costs", costs | {"version": version})
    replies = [_reply(units[key]) for key in keys]
    rows = answers_of(label, asked, [r.text for r in replies], [r.ended for r in replies])
    return rows, replies, units[f"{label} costs"]


def answers_of(label: str, asked: list[dict], texts: list[str], ended: list[bool]) -> list[dict]:
    """Return test questions with answers, as a judge reads them."""
    said = ({"method": label, "answer": text, "ended": end} for text, end in zip(texts, ended, strict=True))
    return [q | a for q, a in zip(asked, said, strict=True)]


def _reply(stored: dict) -> engines.Reply:
    return engines.Reply(**stored | {"first": {int(token): logprob for token, logprob in stored["first"].items()}})


def against(tokenizer, replies: list[engines.Reply], others: list[engines.Reply]) -> dict:
    """Return what replies share with others of the same engine: equal_tokens (a share) and kl_nats of first tokens."""
    kl = [divergence(b.first, a.first) for a, b in zip(replies, others, strict=True) if a.first and b.first]
    texts = ([r.text for r in both] for both in (others, replies))
    return {"equal_tokens": equal_tokens(tokenizer, *texts), "kl_nats": float(np.mean(kl)) if kl else np.nan}
