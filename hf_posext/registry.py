"""The names of the methods, which live in `hf_posext.methods`."""

from .methods.base import ENTRY_POINT_GROUP, MethodInfo, get_method, list_methods, methods, register

__all__ = ["ENTRY_POINT_GROUP", "MethodInfo", "get_method", "list_methods", "methods", "register"]
