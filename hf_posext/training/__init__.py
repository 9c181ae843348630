"""Fine-tuning on long texts with `transformers.Trainer`: presets, rows, PoSE, shifted sparse attention, LongCE."""

from ..packages import require

require("eval", "train")

from .finetune import Finetuned, finetune
from .settings import PRESETS, Preset
from .trainer import Evaluation, KeepsPlan

__all__ = ["PRESETS", "Evaluation", "Finetuned", "KeepsPlan", "Preset", "finetune"]
