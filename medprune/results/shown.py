"""What the notebooks show is kept for the report: tables and figures of every stage, in order."""

import json
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from medprune.results.page import readable
from medprune.settings import STAGES, values_of
from medprune.store import Run, describe_machine, read_csv, read_json, write_csv, write_json

CHAPTERS = {
    "06_judge_eval": "What it cost (notebook 06)",
    "07_budget_search": "The best model within a budget (07)",
    "08_deploy": "In other engines (08)",
    "01_finetune": "Fine-tuning (01)",
    "02_layer_importance": "Importance of the blocks (02)",
    "03_prune_sweep": "Pruning (03)",
    "04_sft_recovery": "Recovery (04)",
    "05_awq_vs_bnb": "Quantization (05)",
}  # the results first: stage -> its chapter in the report

_ENDS = {"table": ".csv", "figure": ".png", "image": ", picture.png"}

_begun: set[Path] = set()  # folders whose list this process began: a new run of a notebook shows nothing of the last


def keep(run: Run, title: str, shown: pd.DataFrame | Figure, caption: str = "", image: Image.Image | None = None):
    """Write a table (CSV) or figure (PNG) of a stage for the report; return it as a notebook shows it.

    caption: how to read it. image: a picture that stands above it.
    """
    folder, index = run.dir / "shown", run.dir / "shown" / "index.json"
    folder.mkdir(exist_ok=True)
    files = {kind: folder / f"{title}{end}" for kind, end in _ENDS.items()}
    for file in files.values():  # of an earlier run, which may have shown a table where this one shows a figure
        file.unlink(missing_ok=True)
    if isinstance(shown, Figure):
        shown.savefig(files["figure"], dpi=110, bbox_inches="tight")
    else:
        write_csv(files["table"], shown)
    if image is not None:
        image.save(files["image"])
    entries = [e for e in (read_json(index) if folder in _begun else []) if e["title"] != title]
    write_json(index, [*entries, {"title": title, "caption": caption}])
    _begun.add(folder)
    return shown if isinstance(shown, Figure) else readable(shown)


def report_sections(root: Path, last: str = "06_judge_eval") -> list[dict]:
    """Return what the stages of a run, up to `last`, kept, as sections of `page.html_report`, in the order shown."""
    sections, done = [], STAGES[: STAGES.index(last) + 1]
    for stage, chapter in ((s, c) for s, c in CHAPTERS.items() if s in done):
        folder = root / stage / "shown"
        if not (folder / "index.json").exists():
            raise ValueError(f"{folder} has no index.json, which an earlier version did not write: run {stage} again.")
        for entry in read_json(folder / "index.json"):
            words = {"chapter": chapter, "heading": entry["title"], "text": entry["caption"]}
            files = {kind: folder / f"{entry['title']}{end}" for kind, end in _ENDS.items()}
            sections.append(words | {kind: _read(file) for kind, file in files.items() if file.exists()})
    return sections


def _read(file: Path):
    if file.suffix == ".csv":
        return read_csv(file, keep_default_na=False, na_values=[""])  # an answer may be the text "NA"
    return Image.open(file)


def settings_table(run: Run, config) -> pd.DataFrame:
    """Return what a run was made with, as setting and value: the machine, every stage's settings, versions.

    config: of the stage at hand. A setting that was not the same in all stages that read it has the most frequent
    value, then the others with their stages.
    """
    manifests = {stage: read_json(run.of(stage) / "manifest.json") for stage in STAGES[: STAGES.index(run.stage)]}
    read = {stage: manifest["settings"] for stage, manifest in manifests.items()} | {run.stage: values_of(config)}
    rows = describe_machine()
    for name in dict.fromkeys(name for settings in read.values() for name in settings):
        values = {stage: json.dumps(settings[name]) for stage, settings in read.items() if name in settings}
        usual = max(values.values(), key=list(values.values()).count)
        rows[name] = "; ".join([usual, *(f"{v} in {stage}" for stage, v in values.items() if v != usual)])
    for manifest in manifests.values():
        rows |= manifest["versions"]
    return pd.DataFrame([(k, str(v)) for k, v in rows.items()], columns=["setting", "value"])
