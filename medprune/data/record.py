"""One photograph and what is known of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One photograph; `key` is split/directory/name, for DermNet repeats names across directories."""

    key: str
    path: str
    condition: str
    split: str | None = None  # "train", "test" or None where the source gives no split
    group: str | None = None  # patient: one patient's pictures stay on one side of a split
    skin_tone: str | None = None
