"""The methods: pure maths, one paper = one file. To add one, write its file and name it here."""

from ..registry import get_method, list_methods, methods, register
from .base import Composition, Method, as_method, hyper_parameters
from .dual_chunk import DualChunk
from .dynamic_ntk import DynamicNTK
from .dynamic_yarn import DynamicYaRN
from .frequencies import FrequencyMethod
from .leaky_rerope import LeakyReRoPE
from .linear import Linear
from .llama3 import Llama3
from .log_n import LogN
from .longrope import LongRoPE
from .none import NoExtension
from .nope import NoPE
from .ntk import NTK
from .partial import Partial
from .remap import RemapMethod
from .rerope import ReRoPE
from .resonance import Resonance
from .self_extend import SelfExtend
from .sinks import Sinks
from .string_shift import StringShift
from .theta import Theta
from .yarn import YaRN

__all__ = [
    "NTK",
    "Composition",
    "DualChunk",
    "DynamicNTK",
    "DynamicYaRN",
    "FrequencyMethod",
    "LeakyReRoPE",
    "Linear",
    "Llama3",
    "LogN",
    "LongRoPE",
    "Method",
    "NoExtension",
    "NoPE",
    "Partial",
    "ReRoPE",
    "RemapMethod",
    "Resonance",
    "SelfExtend",
    "Sinks",
    "StringShift",
    "Theta",
    "YaRN",
    "as_method",
    "get_method",
    "hyper_parameters",
    "list_methods",
    "methods",
    "register",
]
