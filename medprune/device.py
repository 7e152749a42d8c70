"""Which device models run on: a GPU where there is one, else the CPU. The only module that asks torch for GPUs."""

import gc

import torch

KIND = "cuda"  # torch's name for GPUs; a rehearsal pretends a kind of its own
HALVED: dict[str, int] = {}  # of the work whose rows did not fit at once: how many did, in this process


def gpu():
    """Return torch's module for GPUs, such as torch.cuda."""
    return torch.get_device_module(KIND)


def cards() -> int:
    """Return how many GPUs this process sees."""
    return gpu().device_count() if gpu().is_available() else 0


def choose_device() -> str:
    return KIND if cards() else "cpu"


def on_gpu(device) -> bool:
    return torch.device(device).type == KIND


def choose_dtype(device: str) -> torch.dtype:
    """Return bfloat16, or float16 on GPUs without it (a T4)."""
    return torch.float16 if on_gpu(device) and gpu().get_device_capability() < (8, 0) else torch.bfloat16


def release() -> None:
    """Give back the memory of what was let go: models that refer to themselves, as NF4's layers do, stay until then."""
    gc.collect()
    if cards():
        gpu().empty_cache()


def wait() -> None:
    """Wait until the GPUs have done what they were given, so that a clock measures it; a CPU has."""
    for card in range(cards()):
        gpu().synchronize(card)


def start_peak() -> list[int]:
    """Begin to measure the most memory that each GPU holds; return the bytes that each holds now."""
    for card in range(cards()):
        gpu().reset_peak_memory_stats(card)
    return [gpu().memory_allocated(card) for card in range(cards())]


def growth(before: list[int]) -> int:
    """Return by how many bytes the GPUs' memory grew at most since `start_peak`, each at its own highest."""
    return sum(gpu().max_memory_allocated(card) - held for card, held in enumerate(before))


def memory_bytes() -> int:
    """Return the memory of one GPU in bytes: of several, the smallest's."""
    return min(gpu().get_device_properties(card).total_memory for card in range(cards()))


def rows_that_fit(work, most: int, what: str, units=None):
    """Return work(rows), with `most` rows, or half as many again and again where memory is too small for them.

    what: names the work; what was found to fit is said, and kept for this process and in `units`, where given.
    """
    from accelerate.utils import find_executable_batch_size

    key = f"rows of {what} that fit"
    known = min(HALVED.get(what, most), most if units is None or key not in units else units[key])
    halves = iter([*(known >> n for n in range(1, known.bit_length())), 0])

    def attempt(rows):
        done = work(rows)
        if rows < most:
            HALVED[what] = rows
            if units is not None and (key not in units or units[key] > rows):
                units.add(key, rows)
        return done

    def fewer():
        rows = next(halves)
        if rows == 0:
            raise MemoryError(f"one row of {what} does not fit this machine's memory: take a smaller base.")
        print(f"{what}: does not fit; going on with {rows} at once")
        return rows

    return find_executable_batch_size(attempt, starting_batch_size=known, reduce_batch_size_fn=fewer)()
