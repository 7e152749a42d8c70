"""Does an exported folder, in its real engine, still answer as the model does here?

The same pictures and questions go through our decoder and through the engine's server. Three things are held against
what 16 bits and 32 of our own differ by, which is the floor: tokens that are equal before the first that differs, the
divergence of the first token's distributions, and the length of prompts, in which a wrong chat template shows. From
llama.cpp the image embeddings are taken as well, in which its class token behind the patches (upstream issue 25814)
shows by itself.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from medprune.answers.decoding import answer, forward, roomy_cache
from medprune.answers.prompts import encode, prompt_text
from medprune.data.pictures import open_image
from medprune.data.questions import TESTED, load_questions
from medprune.data.synthetic import write_images
from medprune.exporting import engines
from medprune.exporting.folders import load_folder
from medprune.models.families import n_blocks, parts
from medprune.store import write_text

MAX_EMBEDDING_ERROR = 0.002  # relative, of an image's embeddings; a build that is right shows 0.0007
KL_OF_FLOOR = 10  # times the floor's divergence that an engine's may reach, or
KL_NATS = 0.002  # so many nats, whichever is more
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
HEADING = "## Parity"
SHOWN = 3  # answers in the card, beside ours


@dataclass(frozen=True)
class Ours:
    """What our decoder makes of rows: texts, first tokens' log-probabilities (rows, vocab), lengths of prompts."""

    texts: list[str]
    first: torch.Tensor
    prompt_tokens: list[int]


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


@torch.inference_mode()
def ours(model, processor, rows: list[dict], max_new_tokens: int) -> Ours:
    """Answer rows with our decoder."""
    first, lengths = [], []
    for row in rows:
        batch = encode(processor, [prompt_text(processor, row["question"])], [open_image(row["path"])], model.dtype)
        ids = batch["input_ids"][0][None]
        cache = roomy_cache(n_blocks(model.config), ids.shape[1])
        first.append(forward(model, ids, cache, batch["pixel_values"])[0].float().log_softmax(-1).cpu())
        lengths.append(ids.shape[1])
    texts = [said.text for said in answer(model, processor, rows, max_new_tokens)]
    return Ours(texts, torch.stack(first), lengths)


def equal_tokens(tokenizer, ours: list[str], theirs: list[str]) -> float:
    """Return the share, 0 to 1, of answers' tokens that stand before the first that differs."""
    equal = longest = 0
    for pair in zip(ours, theirs, strict=True):
        a, b = (tokenizer(text)["input_ids"] + [-1] for text in pair)  # -1: the end, a token too
        longest += max(len(a), len(b))
        equal += next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return equal / longest


def divergence(first: torch.Tensor, theirs: dict[int, float]) -> float:
    """Return KL(ours || theirs) in nats of a first token, over the tokens that an engine tells and all others as one.

    first: log-probabilities (vocab,). Lumping can only lower it: it is at least 0 and at most the full divergence.
    """
    tokens = [t for t in theirs if t < len(first)]
    p = first[tokens].double().exp()
    q = torch.tensor([theirs[t] for t in tokens], dtype=torch.float64).exp()
    p, q = (torch.cat([x, (1 - x.sum()).clamp(min=0)[None]]) for x in (p, q))
    known = p > 0
    return float((p[known] * (p[known].log() - q[known].clamp(min=1e-12).log())).sum())


def _top(first: torch.Tensor) -> dict[int, float]:
    found = first.topk(min(engines.TOP, len(first)))
    return dict(zip(found.indices.tolist(), found.values.tolist(), strict=True))


# ---- image embeddings
@torch.inference_mode()
def image_embeddings(model, pictures: list[Image.Image], processor) -> torch.Tensor:
    """Return the projected image tokens of pictures, (images, tokens x hidden) float32."""
    pixels = processor.image_processor(pictures)["pixel_values"]
    pixels = torch.stack([torch.as_tensor(np.asarray(p)) for p in pixels]).to(model.device, model.dtype)
    found = model.model.get_image_features(pixels).pooler_output
    return torch.stack([f.float().flatten().cpu() for f in found])


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
    embedding_error (worst, relative; None where the engine does not tell), faults (sentences; none where all holds) and
    table (a row for each prompt). Raises ValueError where the engine is not installed or does not take the folder.
    """
    engine = "server" if url else engines.engine_of(exported)
    if not url:
        engines.program(engine)
    exact, processor = load_folder(folder, torch.float32)
    pictures = {path: square(processor, path) for path in dict.fromkeys(row["path"] for row in rows)}
    wanted = ours(exact, processor, rows, max_new_tokens)
    faults, error = ([], None) if url else _probe(exact, processor, exported, list(pictures.values()))
    del exact
    floor = ours(load_folder(folder)[0], processor, rows, max_new_tokens)
    replies = _replies(exported, rows, pictures, url, threads, max_new_tokens)
    table = pd.DataFrame(rows)
    table["ours"], table["theirs"] = wanted.texts, [reply.text for reply in replies]
    table["prompt_tokens"], table["their_prompt_tokens"] = wanted.prompt_tokens, [r.prompt_tokens for r in replies]
    table["kl_nats"] = [
        divergence(w, r.first) if r.first else np.nan for w, r in zip(wanted.first, replies, strict=True)
    ]
    floor_kl = np.mean([divergence(w, _top(f)) for w, f in zip(wanted.first, floor.first, strict=True)])
    found = {"engine": engine, "images": len(pictures), "prompts": len(rows)}
    found |= {"equal_tokens": equal_tokens(processor.tokenizer, wanted.texts, table["theirs"].tolist())}
    found |= {"floor_equal_tokens": equal_tokens(processor.tokenizer, wanted.texts, floor.texts)}
    found |= {"kl_nats": float(table["kl_nats"].mean()), "floor_kl_nats": float(floor_kl), "embedding_error": error}
    return found | {"faults": faults + _faults(found, table), "table": table}


def _probe(model, processor, exported: Path, pictures: list[Image.Image]) -> tuple[list[str], float | None]:
    """Return (faults, worst relative error of the runtime's image embeddings or None)."""
    found = engines.embeddings(exported, pictures)
    if found is None:
        return [], None
    worst = float(embedding_errors(found, image_embeddings(model, pictures, processor)).max())
    if worst <= MAX_EMBEDDING_ERROR:
        return [], worst
    hook = class_token_last(model)
    misplaced = float(embedding_errors(found, image_embeddings(model, pictures, processor)).max())
    hook.remove()
    off = f"the runtime's image embeddings are off by {worst:.4f}, more than {MAX_EMBEDDING_ERROR}"
    if misplaced <= MAX_EMBEDDING_ERROR:
        why = f"it puts CLIP's class token behind the patches (llama.cpp issue 25814): so misplaced, {misplaced:.4f}"
        return [f"{off}; {why}."], worst
    return [f"{off}; tower, projector or pictures are not the model's."], worst


def _replies(exported, rows, pictures, url, threads, max_new_tokens) -> list[engines.Reply]:
    def ask(address):
        return [engines.ask_server(address, pictures[r["path"]], r["question"], max_new_tokens) for r in rows]

    if url:
        return ask(url.removesuffix("/").removesuffix("/v1"))
    with engines.running(exported, threads) as address:
        return ask(address)


def _faults(found: dict, table: pd.DataFrame) -> list[str]:
    faults = []
    longer = table["their_prompt_tokens"] - table["prompt_tokens"]
    if (longer != 0).any():
        said = f"{longer.min():+d} to {longer.max():+d} tokens in {int((longer != 0).sum())} of {len(table)}"
        faults.append(f"prompts differ ({said}): the chat template or the tokenizer is not the model's.")
    limit = max(KL_OF_FLOOR * found["floor_kl_nats"], KL_NATS)
    if found["kl_nats"] > limit:
        faults.append(f"first tokens diverge by {found['kl_nats']:.4f} nats, more than {limit:.4f}.")
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
        f"| image embeddings, worst relative error | {error} | at most {MAX_EMBEDDING_ERROR} |",
        "",
    ]
    lines += [f"- {fault}" for fault in found["faults"]] or ["No fault was found."]
    lines += ["", "| question | here | there |", "|---|---|---|"]
    said = found["table"].head(SHOWN)[["question", "ours", "theirs"]].map(lambda text: " ".join(text.split()))
    return lines + ["| " + " | ".join(row) + " |" for row in said.replace(r"\|", "/", regex=True).values]


def add_parity(exported: Path, lines: list[str]) -> None:
    """Put the check's results at the end of an exported folder's model card, in place of earlier ones."""
    file = exported / "README.md"
    card = file.read_text(encoding="utf-8") if file.exists() else ""
    write_text(file, "\n".join([card.partition(HEADING)[0].rstrip(), "", HEADING, *lines]) + "\n")
