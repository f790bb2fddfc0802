from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def heard_again() -> Iterator[None]:
    """What a history silences is heard by the tests after it."""
    yield
    logging.getLogger("sglang_star").setLevel(logging.NOTSET)
