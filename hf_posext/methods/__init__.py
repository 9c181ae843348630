"""The methods: pure maths, one paper = one file. To add one, write its file and name it here."""

from ..registry import get_method, list_methods, methods, register
from .base import Composition, Method, as_method, hyper_parameters
from .frequencies import FrequencyMethod
from .linear import Linear
from .llama3 import Llama3
from .longrope import LongRoPE
from .none import NoExtension
from .nope import NoPE
from .ntk import NTK
from .partial import Partial
from .resonance import Resonance
from .theta import Theta
from .yarn import YaRN

__all__ = [
    "NTK",
    "Composition",
    "FrequencyMethod",
    "Linear",
    "Llama3",
    "LongRoPE",
    "Method",
    "NoExtension",
    "NoPE",
    "Partial",
    "Resonance",
    "Theta",
    "YaRN",
    "as_method",
    "get_method",
    "hyper_parameters",
    "list_methods",
    "methods",
    "register",
]
