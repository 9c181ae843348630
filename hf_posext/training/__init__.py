"""Fine-tuning for length: presets, rows, PoSE, shifted sparse attention, and LongCE on `transformers.Trainer`."""

from ..packages import require

require("eval", "train")

from .finetune import Finetuned, finetune
from .settings import PRESETS, Preset
from .trainer import Evaluation, KeepsPlan

__all__ = ["PRESETS", "Evaluation", "Finetuned", "KeepsPlan", "Preset", "finetune"]
