"""Closed questions, answered by the likelihood of given options: a diagnosis out of a list, and yes or no.

A model that no longer ends its answers, or wanders off, is still measured: what counts is which option it finds
likeliest, as in lm-evaluation-harness's multiple choice (Gao et al. 2021) and lmms-eval. Pruned models keep closed
answers longer than open ones, so the two are never averaged.
"""

import os
import random

import torch

from medprune.answers.decoding import chunks
from medprune.answers.prompts import IGNORED, collator, encode_conversation, padded, see
from medprune.device import rows_that_fit
from medprune.models.families import parts
from medprune.progress import progress
from medprune.store import context, fingerprint

YES_NO = ("Yes.", "No.")


def closed_questions(asked: list[dict], conditions: dict[str, dict], seed: int) -> list[dict]:
    """List the closed forms of a test's questions for a name (rows of `data.questions.test_questions`).

    Of each picture one of kind "choice", the question as it stands, whose options are the answers that every condition
    would get; and two of kind "yes or no", about its condition and about another, drawn one, so that chance has half of
    them right. Rows have options (texts) and truth, the number of the right one.
    """
    names, rows = list(conditions), []
    every = [conditions[name]["answers"]["name"] for name in names]
    for row in (r for r in asked if r["kind"] == "name"):
        own = row["condition"]
        other = random.Random(f"{seed} {row['key']}").choice([name for name in names if name != own])
        forms = [("choice", row["question"], every, names.index(own))]
        for truth, name in enumerate((own, other)):
            forms.append(("yes or no", f"Does this picture show {name}? Answer yes or no.", list(YES_NO), truth))
        for number, (kind, question, options, truth) in enumerate(forms):
            form = {"id": f"{row['key']}#closed{number}", "kind": kind, "question": question, "options": options}
            rows.append(row | form | {"truth": truth, "asked": fingerprint(row["asked"], question, options, truth)})
    return rows


@torch.inference_mode()
def log_likelihoods(model, processor, rows: list[dict], batch_rows: int = 128, label: str = "closed") -> list[list]:
    """Return the log-likelihood in nats of each option as the answer of each row {"path", "question", "options"}.

    It is the sum over an option's tokens from where the row's options part, without the end of sequence. They follow
    one copy of their image and question and do not see one another. batch_rows: how many options are held in memory at
    once.
    """
    collate, found = collator(processor.tokenizer.pad_token_id), []
    size = max(1, batch_rows // max((len(row["options"]) for row in rows), default=1))
    with progress(len(rows), label, "question") as bar:
        for chunk in chunks(rows, size):
            rows_of = [_rows(processor, row, see(processor, row["path"], model.dtype)) for row in chunk]
            batch = collate(rows_of)
            targets, kept = batch.pop("labels"), batch.pop("logits_to_keep")
            turns = padded([r["option"] for some in rows_of for r in some], padding_value=0)[:, 1:][:, kept]
            about = torch.tensor([i for i, some in enumerate(rows_of) for _ in some])  # whose options a sequence holds
            states = model.base_model(**{k: tensor.to(model.device) for k, tensor in batch.items()}, use_cache=False)
            # kept stays here, for the head may be on another GPU than the embeddings
            logits = parts(model).head(states.last_hidden_state[:, kept]).float()
            said, ids = logits.log_softmax(-1), targets.clamp(min=0)[..., None].to(logits.device)
            each = said.gather(-1, ids)[..., 0].cpu().where(targets != IGNORED, 0)
            most = max(len(row["options"]) for row in chunk) + 1
            places = about[:, None] * most + turns
            totals = each.new_zeros(len(chunk) * most).scatter_add_(0, places.flatten(), each.flatten()).view(-1, most)
            found += [total[1 : len(row["options"]) + 1].tolist() for total, row in zip(totals, chunk, strict=True)]
            bar.update(len(chunk))
    return found


def _rows(processor, row: dict, seen) -> list[dict]:
    """Return a row's options as sequences (`collator`), with `option` (seq,), the number of each token's own, from 1.

    What all options share is turn 0, each one's rest a turn. A rest begins with the last shared token, which its first
    own token is predicted from. Where options cannot be kept apart in one sequence (`families.packs`), each has one.
    """
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}
    alone = []
    for option in row["options"]:
        said = {"role": "assistant", "content": [{"type": "text", "text": option}]}
        whole = encode_conversation(processor, [asked, said], seen)
        end = int((whole["labels"] != IGNORED).nonzero()[-1])  # of the turn, which an option does without
        kinds = {name: kind[:end] for name, kind in whole["kinds"].items()}
        cut = {name: whole[name][:end] for name in ("input_ids", "labels")}
        alone.append(cut | {"kinds": kinds, "seen": seen.inputs})
    shared = len(os.path.commonprefix([x["input_ids"].tolist() for x in alone])) - 1
    if not processor.packs:
        for number, x in enumerate(alone, 1):
            x["labels"][: shared + 1] = IGNORED
            x["option"] = torch.full_like(x["input_ids"], number)
        return alone
    lengths = torch.tensor([shared, *(len(x["input_ids"]) - shared for x in alone)])
    rests = [x["labels"][shared:].clone() for x in alone]
    for rest in rests:
        rest[0] = IGNORED  # shared: the same for every option
    turns = torch.arange(len(lengths)).repeat_interleave(lengths)
    packed = {
        "input_ids": torch.cat([alone[0]["input_ids"][:shared], *(x["input_ids"][shared:] for x in alone)]),
        "labels": torch.cat([torch.full((shared,), IGNORED), *rests]),
        "turns": turns,
        "option": turns,
    }
    return [packed | {"kinds": {}, "seen": seen.inputs}]


def choose_rows(model, processor, questions: list[dict], label: str, units, config) -> list[dict]:
    """Answer closed questions; return each row with method (the label), answer (the option found likeliest) and
    score_percent, 100 where that is the truth. Likelihoods are kept in `units`, and asked for only once."""
    todo = [q for q in questions if f"{label} {q['id']}" not in units]
    if todo:
        found = rows_that_fit(
            lambda rows: log_likelihoods(model, processor, todo, rows, f"{label}: closed questions"),
            config.batch_rows,
            "closed questions",
            units,
        )
        units.add_all({f"{label} {q['id']}": nats for q, nats in zip(todo, found, strict=True)})
    rows = []
    for q in questions:
        nats = units[f"{label} {q['id']}"]
        chosen = max(range(len(nats)), key=nats.__getitem__)
        right = {"answer": q["options"][chosen], "score_percent": 100.0 * (chosen == q["truth"])}
        rows.append(q | {"method": label, "cluster": q["key"], **right})
    return rows


def closed_context(model_fingerprint: str, rows: list[dict]) -> str:
    """Return the context of a model's closed answers: what decides them, but for what their label names."""
    return context(__name__, model_fingerprint, [(r["id"], r["asked"]) for r in rows])
