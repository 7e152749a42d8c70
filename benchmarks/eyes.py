"""What a tuned LLaVA names right of photographs of patients it has not seen, beside its own eyes with a linear head.

python benchmarks/eyes.py --images DIR [--seed 0] [--set balance=0.5 --set sft_steps=150] [--inner] [--keep FOLDER]

Notebook 01 cut down to the question for a name: tower and projector are tuned, then the language model by LoRA, at
profile local. Choices are made with --inner, which splits the training patients again and leaves those of the test
alone. A folder that is kept trains nothing twice that its settings leave as it was.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from medprune.answers import decoding
from medprune.data.questions import load_conditions, load_questions, named_conditions, test_questions
from medprune.data.records import load_images, split_records
from medprune.models import loading
from medprune.progress import quiet
from medprune.runs import baselines
from medprune.settings import resolve, values_of
from medprune.store import describe_machine, write_json
from medprune.tuning import tower, trained

INNER = 72  # images of the inner test
RESULTS = Path(__file__).parent / "results"


def split(images: str, conditions: dict, config, inner: bool) -> tuple[list, list]:
    """Return (training, test) records, patients apart; of --inner both are from the training side."""
    records, _ = load_images(images, conditions, modality=config.modality, history=config.history)
    sides, _ = split_records(records, config.n_train, config.n_test, config.seed)
    if inner:
        sides, _ = split_records([replace(r, split=None) for r in sides["train"]], None, INNER, config.seed)
    return sides["train"], sides["test"]


def measure(config, train: list, test: list, folder: Path) -> pd.DataFrame:
    """Tune in `folder`; return `baselines.accuracy_table` with the seconds that it took."""
    conditions, questions = load_conditions(config.conditions), load_questions()
    run, began = SimpleNamespace(dir=folder), time.perf_counter()
    base = tower.prepare_tuned_tower(config, run, train, conditions)
    tuned_s = time.perf_counter() - began
    steps, items, held_out = trained.tuning_items(train, config, conditions, questions)
    training = trained.Training(base, None, "lora", items, config, steps, held_out)
    record = trained.train_once(run, folder / "model", training, "fine-tuning")
    model, processor = loading.load(folder / "model")
    asked = [q for q in test_questions(test, conditions, questions) if q["kind"] == "name"]
    said = decoding.answer(model, processor, asked, config.max_new_tokens, config.batch_rows)
    names = pd.DataFrame(asked).assign(cluster=[r.group or r.key for r in test])
    right = [int(q["condition"] in named_conditions(a.text, conditions)) for q, a in zip(asked, said, strict=True)]
    heads = baselines.linear_heads(config.base, base, names, train, test)
    own = names.assign(method="language model", skin_type=names.skin_tone, right=right)[baselines.COLUMNS]
    table = baselines.accuracy_table(pd.concat([heads, own], ignore_index=True))
    return table.assign(tower_s=round(tuned_s), lora_s=round(record["train_s"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder or table of photographs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inner", action="store_true", help="split the training patients again")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting; may be repeated")
    parser.add_argument("--keep", type=Path, help="a folder for the weights; else a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS / "eyes.json")
    args = parser.parse_args()
    quiet()
    given = dict(pair.split("=", 1) for pair in args.set)
    config = resolve("local", given, images=args.images, seed=args.seed)
    train, test = split(args.images, load_conditions(config.conditions), config, args.inner)
    with tempfile.TemporaryDirectory() as temporary:
        table = measure(config, train, test, args.keep or Path(temporary))
    print(f"seed {args.seed}, {len(train)} training and {len(test)} test pictures, {given or 'as local has it'}")
    print(table.round(1).T.to_string(header=False))
    result = {"seed": args.seed, "inner": args.inner, "settings": values_of(config), "machine": describe_machine()}
    write_json(args.out, result | {"table": json.loads(table.to_json(orient="records"))})


if __name__ == "__main__":
    main()
