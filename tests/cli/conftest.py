"""The commands silence transformers and datasets for the rest of the process; other tests listen to them."""

from __future__ import annotations

from collections.abc import Iterator

import datasets
import pytest
import transformers


@pytest.fixture(autouse=True)
def loud_again() -> Iterator[None]:
    levels = transformers.logging.get_verbosity(), datasets.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(levels[0])
    datasets.logging.set_verbosity(levels[1])
