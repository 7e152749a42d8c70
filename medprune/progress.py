"""Progress bars of long loops, and quiet libraries.

In a notebook a bar is tqdm's own. Under `medprune run` the kernel's bars go to the file that MEDPRUNE_PROGRESS names,
which the command line copies to the terminal, so that committed notebooks hold no half-drawn bars.
"""

import logging
import os
import warnings

from tqdm.auto import tqdm as notebook_tqdm
from tqdm.std import TqdmWarning, tqdm

warnings.filterwarnings("ignore", category=TqdmWarning)  # of ipywidgets, without which the bar is text


def progress(total: int, label: str, unit: str = "it"):
    """Return a bar to be used as a context manager and moved on with .update(n)."""
    path = os.environ.get("MEDPRUNE_PROGRESS")
    if path:
        stream = open(path, "a", buffering=1)  # noqa: SIM115 - lives as long as the bar
        return tqdm(total=total, desc=f"    {label}", unit=unit, file=stream, mininterval=1.0, ncols=100, leave=True)
    return notebook_tqdm(total=total, desc=label, unit=unit, leave=False)


def quiet() -> None:
    """Keep libraries' own bars and routine warnings out of the notebooks; errors still show."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("bitsandbytes", "sentence_transformers", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
