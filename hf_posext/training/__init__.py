"""Fine-tuning for length: presets, rows, PoSE, shifted sparse attention and LongCE on `transformers.Trainer`."""

from ..packages import require

require("eval", "train")

from .callbacks import Evaluation, KeepsPlan
from .finetune import Finetuned, finetune
from .presets import PRESETS, Preset

__all__ = ["PRESETS", "Evaluation", "Finetuned", "KeepsPlan", "Preset", "finetune"]
