"""What packing the embedding table, and a head that is tied to it, costs in answers, and what it saves.

python benchmarks/embedding_table.py RUN [RUN ...] [--bits 8 4 3] [--out FILE]

Each RUN is a run's folder with a finished 01_finetune. Its tuned model in 16 bits answers the run's test questions as
it is and with the table alone packed in each width, all else left; the reference judge scores the answers. Differences
are paired by question; of several runs, their intervals cover the runs' seeds too.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd

from medprune.answers import timing
from medprune.data.questions import load_conditions, load_questions, test_questions
from medprune.data.records import load_splits
from medprune.device import release
from medprune.judging.scores import judged, make_judges
from medprune.models import loading
from medprune.models.sizes import account
from medprune.progress import quiet
from medprune.quantizing.quantize import quantize
from medprune.results import stats
from medprune.searching.budget import FULL
from medprune.settings import Config
from medprune.store import Run, describe_machine, settings_before, write_json

RESULTS = Path(__file__).parent / "results" / "embedding_table.json"


def answers(root: Path, bits: list[int], scratch: Path) -> tuple[pd.DataFrame, list[dict]]:
    """Return a run's judged answers, 16 bits and each width a method, and what each takes."""
    run = Run(root, "02_layer_importance")  # any stage that may read the first one
    config = Config(settings_before(root, "02_layer_importance"), "benchmark")
    conditions, folder = load_conditions(config.conditions), run.read("01_finetune", "model")
    asked = test_questions(load_splits(run)["test"], conditions, load_questions())
    here = Run(scratch / root.name, "01_finetune")
    here.dir.mkdir(parents=True)
    rows, costs = [], []
    for width in (FULL, *bits):
        llava, processor = loading.load(folder)
        if width != FULL:
            llava, _ = quantize(llava, "rtn", FULL, config.group_size, quantize_embeddings=width)
        packed = {} if width == FULL else {"quantize_embeddings": width, "method": "rtn"}
        counted = account(llava.config, 0, FULL, config.group_size, 0, **packed).weights_bytes
        label = f"{width} bits"
        said, speed = timing.evaluate(llava, processor, label, asked, here.units(label), config)
        rows += said
        costs.append({"method": label, "plan_bytes": counted, **speed})
        llava = None
        release()
    return judged(rows, make_judges(config, conditions), here).assign(run=root.name), costs


def measure(roots: list[Path], bits: list[int]) -> dict:
    """Return scores, paired differences to 16 bits and costs, over the runs."""
    with tempfile.TemporaryDirectory() as scratch:
        found = [answers(root, bits, Path(scratch)) for root in roots]
    table = pd.concat([scores for scores, _ in found], ignore_index=True)
    pairs = [(f"{width} bits", f"{FULL} bits") for width in bits]
    costs = pd.DataFrame([cost for _, several in found for cost in several]).groupby("method", sort=False).mean()
    return {
        "runs": [root.name for root in roots],
        "machine": describe_machine(),
        "costs": costs.reset_index().to_dict("records"),
        "scores": stats.score_table(table).to_dict("records"),
        "against_16_bits": stats.compare(table, pairs).to_dict("records"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs with a finished 01_finetune")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3], help="widths of the table")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    quiet()
    found = measure([root.absolute() for root in args.runs], args.bits)
    write_json(args.out, found)
    for part in ("costs", "against_16_bits"):
        print(pd.DataFrame(found[part]).to_string(index=False, float_format="{:,.4g}".format))


if __name__ == "__main__":
    main()
