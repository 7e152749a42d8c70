"""For child processes with this folder on PYTHONPATH: no socket but loopback, and a clock that may be wrong.

MEDPRUNE_NETWORK_LOG: a file that gets a line for each address outside this machine that was asked for, and refused.
MEDPRUNE_CLOCK_S: seconds that the clock is off by.
"""

import ipaddress
import os
import sys
import time

LOOPBACK = ("localhost", "", None, b"localhost")


def _is_here(host) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    try:
        return host in LOOPBACK or ipaddress.ip_address(host).is_loopback or host in ("0.0.0.0", "::")
    except ValueError:
        return False


def _look(event: str, arguments: tuple) -> None:
    if event not in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        return
    address = arguments if event == "socket.getaddrinfo" else arguments[1]
    if isinstance(address, tuple) and not _is_here(address[0]):
        with open(os.environ["MEDPRUNE_NETWORK_LOG"], "a") as log:
            log.write(f"{event} {address[:2]}\n")
        raise OSError(f"{event} to {address[0]} is not allowed here")


if "MEDPRUNE_NETWORK_LOG" in os.environ:
    sys.addaudithook(_look)

if off := float(os.environ.get("MEDPRUNE_CLOCK_S", 0)):
    now = time.time
    time.time = lambda: now() + off
