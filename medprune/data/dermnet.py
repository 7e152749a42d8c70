"""Tell which condition a DermNet picture shows, by its file name and data/dermnet_classes.json."""

import functools
import re

from medprune.data.questions import words
from medprune.settings import DATA
from medprune.store import read_json


@functools.cache
def _rules() -> dict:
    return read_json(DATA / "dermnet_classes.json")


def dermnet_slug(file_name: str) -> str:
    """Reduce a file name to its class: 07RosaceaK0216.jpg to rosacea-k, Lichen-Planus-Oral-5.jpg likewise."""
    stem = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", file_name.rsplit(".", 1)[0])
    return re.sub(r"[^a-z]+", "-", stem.lower()).strip("-")


def classify_dermnet(class_dir: str, file_name: str, conditions: dict[str, dict]) -> tuple[str | None, str]:
    """Return (condition, "kept") or (None, "reason: class") for one DermNet picture; `conditions` is a facts dict.

    A picture counts where its file name says the condition, for the 23 directories are mixtures. A condition
    without a rule is found by its name and aliases at the start of the file name.
    """
    rules, slug, directory = _rules(), dermnet_slug(file_name), class_dir.casefold()

    def first(candidates: list[dict]) -> dict | None:
        tests = (("directory", directory), ("name", slug))
        fits = (rule for rule in candidates if all(re.search(rule.get(part, ""), text) for part, text in tests))
        return next(fits, None)

    hits, traps = [], []
    for name, facts in conditions.items():
        rule = rules["conditions"].get(name)
        if rule is None:
            aliases = [words(alias) for alias in (name, *facts["aliases"])]
            if any(words(slug)[: len(alias)] == alias for alias in aliases):
                hits.append(name)
        elif first(rule["include"]):
            trap = first(rule["exclude"])
            traps.append(trap["reason"]) if trap else hits.append(name)
    left_out = first(rules["left_out"]) if hits or traps else None
    if left_out:
        return None, f"{left_out['reason']}: {slug}"
    if len(hits) == 1:
        return hits[0], "kept"
    unnamed = "no diagnosis in the file name" if re.search(rules["unnamed"], slug) else "another disease"
    return None, f"{'names two diagnoses' if hits else [*traps, unnamed][0]}: {slug}"
