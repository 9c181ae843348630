"""Methods: pure maths, one file for each paper. A method is registered by its name here."""

from .base import Composition, Method, NoExtension, get_method, hyper_parameters, list_methods, methods, register
from .biases import ALiBiLinear, ALiBiNTK, BucketLinear, BucketMaxDistance, BucketMethod
from .cope import CoPE
from .dpe import DPE
from .dual_chunk import DualChunk
from .fade import Decay, Fade
from .jet_long import JetLong
from .lampe import LaMPE
from .linear import Linear, SinusoidLinear
from .llama3 import Llama3
from .log_n import Llama4Temperature, LogN
from .longrope import LongRoPE
from .ntk import NTK, DynamicNTK
from .partial import NoPE, Partial
from .rerope import LeakyReRoPE, ReRoPE
from .resonance import Resonance
from .rotary import FrequencyMethod, RemapMethod
from .self_extend import SelfExtend
from .self_logistic import SelfLogistic
from .sinks import Sinks
from .string_shift import StringShift
from .table import TableCubic, TableGroup, TableHierarchical, TableLinear, TableMethod, TableRepeat
from .text import as_method
from .theta import EABF, Theta
from .yarn import DynamicYaRN, YaRN

__all__ = [
    "DPE",
    "EABF",
    "NTK",
    "ALiBiLinear",
    "ALiBiNTK",
    "BucketLinear",
    "BucketMaxDistance",
    "BucketMethod",
    "CoPE",
    "Composition",
    "Decay",
    "DualChunk",
    "DynamicNTK",
    "DynamicYaRN",
    "Fade",
    "FrequencyMethod",
    "JetLong",
    "LaMPE",
    "LeakyReRoPE",
    "Linear",
    "Llama3",
    "Llama4Temperature",
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
    "SelfLogistic",
    "Sinks",
    "SinusoidLinear",
    "StringShift",
    "TableCubic",
    "TableGroup",
    "TableHierarchical",
    "TableLinear",
    "TableMethod",
    "TableRepeat",
    "Theta",
    "YaRN",
    "as_method",
    "get_method",
    "hyper_parameters",
    "list_methods",
    "methods",
    "register",
]

for _name in __all__:
    if hasattr(globals()[_name], "title"):  # not a base class, and not a function
        register(globals()[_name])
