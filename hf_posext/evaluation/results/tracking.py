"""Results to the tracker of an `Accelerator`: TensorBoard, Weights & Biases, MLflow and what else it knows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...errors import InvalidParameterError
from ..protocols.protocol import is_legacy

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .results import Results

QUANTITIES = ("perplexity", "gain", "change", "passkey")


def log_results(results: Results, accelerator: Accelerator) -> None:
    """
    Log the rows as curves over the context length: the step is the length in tokens, a curve is a method.

    Curves are called `perplexity/yarn-x8`, `gain/yarn-x8` and so on, those of a legacy protocol
    `perplexity-legacy-yarn/yarn-x8`; what a row does not have is left out. All methods of one length are logged
    together and lengths in ascending order, since some trackers drop steps that go back.

    ```python
    accelerator = Accelerator(log_with="tensorboard", project_dir="runs")
    accelerator.init_trackers("hf_posext")
    log_results(compare(model, tokenizer, documents, ["none", "yarn"], factor=8, lengths=[512, 4096]), accelerator)
    accelerator.end_training()
    ```

    Args:
        results ([`Results`]): of a comparison or of one model.
        accelerator (`Accelerator`): after `init_trackers`; on other processes than the main one nothing is logged.

    Raises:
        InvalidParameterError: there is no tracker, so that everything would be lost.
    """
    if accelerator.is_main_process and not accelerator.trackers:
        raise InvalidParameterError(
            "the accelerator has no tracker; make it as Accelerator(log_with='tensorboard', project_dir='runs') and "
            "call accelerator.init_trackers('hf_posext') first"
        )
    for length in sorted({row["length"] for row in results.rows}):
        values = {
            f"{_curves(quantity, row['protocol'])}/{row['method']}-x{row['factor']:g}": row[quantity]
            for row in results.rows
            for quantity in QUANTITIES
            if row["length"] == length and row.get(quantity) is not None and math.isfinite(row[quantity])
        }
        accelerator.log(values, step=length)


def _curves(quantity: str, protocol: str) -> str:
    """Name of the curves of a quantity; passkeys are asked for in the same way by every protocol."""
    return f"{quantity}-{protocol}" if is_legacy(protocol) and quantity != "passkey" else quantity
