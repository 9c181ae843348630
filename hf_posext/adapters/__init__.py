"""Adapters, saved and loaded with the positions they were trained with."""

from .load import AdapterFit, load_adapter, verify_adapter
from .save import push_to_hub, save_adapter

__all__ = ["AdapterFit", "load_adapter", "push_to_hub", "save_adapter", "verify_adapter"]
