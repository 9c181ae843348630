"""Shared by the tests of the protocols: small documents, and what one protocol measures of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import nn

from hf_posext import detect_scheme
from hf_posext.evaluation.forwards import boundaries_of
from hf_posext.evaluation.scorer import Memory
from hf_posext.evaluation.tokens import TokenizedDocuments
from hf_posext.evaluation.windows import Measurement
from hf_posext.patching import find_patch

from ..conftest import tokens
from .helpers import BOS

LENGTHS = [8, 14, 24]
TOTAL = 24
TRAINED = 10


def named(protocol: Any) -> str:
    return f"{protocol.name}-{getattr(protocol, 'stride', '')}".rstrip("-")


def rows(count: int = 2, length: int = TOTAL, bos: bool = False) -> TokenizedDocuments:
    ids = tokens(length, rows=count)
    if bos:
        ids[:, 0] = BOS
    return TokenizedDocuments([f"document {index}" for index in range(count)], ids, bos)


def measured(protocol: Any, model: nn.Module, documents: TokenizedDocuments) -> dict[tuple[int, int], Measurement]:
    """Every document at every length, in the passes of the model as it is."""
    patch = find_patch(model)
    boundaries = boundaries_of(detect_scheme(model), patch and patch.plan)
    scorer, arranged = protocol.scorer(model, None, Memory()), protocol.arrange(documents)
    return {
        (measurement.length, index): measurement
        for index in range(len(arranged.ids))
        for lengths in protocol.passes(LENGTHS, boundaries)
        for measurement in protocol.measure(scorer, arranged, index, lengths)
    }


def assert_equal(nll: np.ndarray, expected: np.ndarray) -> None:
    assert nll == pytest.approx(expected, rel=1e-5, abs=1e-5)  # float32 attention over another shape
    assert nll.sum() == pytest.approx(expected.sum(), rel=1e-6)
