"""Fixtures that several test modules share."""

import pytest

from medprune.settings import resolve
from medprune.models.assembled import prepare_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Return the folder of the tiny base, made for this session of tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return prepare_base(resolve("smoke"))
