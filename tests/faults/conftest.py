"""What the tests of faults share: the counts that `make faults` prints."""

from collections import Counter

import pytest

COUNTS = Counter()


@pytest.fixture
def counted():
    """Return what counts a fault that was tried and survived: counted("kills")."""

    def count(kind, n=1):
        COUNTS[kind] += n

    return count


def pytest_terminal_summary(terminalreporter):
    if COUNTS:
        said = ", ".join(f"{n:,} {kind}" for kind, n in sorted(COUNTS.items()))
        terminalreporter.write_line(f"faults: {said}")
