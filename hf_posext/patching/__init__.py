"""The only package that relies on transformers' internals: detect a scheme, apply a plan, undo it."""

from .detect import detect_scheme
from .patch import Patch, find_patch, load_patched, patch_model, unpatch_model
from .undo import unwrap

__all__ = ["Patch", "detect_scheme", "find_patch", "load_patched", "patch_model", "unpatch_model", "unwrap"]
