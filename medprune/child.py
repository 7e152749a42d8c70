"""Programs that end with the one that started them."""

import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager


@contextmanager
def started(words: list, **options):
    """Give a program that is ended with the block, also where this one is told to end (SIGTERM).

    options: of subprocess.Popen. Where this one is killed, Linux ends it, if util-linux's setpriv is there to ask for
    that.
    """
    bound = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
    mine = threading.current_thread() is threading.main_thread()  # which alone is told of signals
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)) if mine else None
    try:
        process = subprocess.Popen([*bound, *words], **options)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
