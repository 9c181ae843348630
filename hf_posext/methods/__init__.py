"""The methods: pure maths, a file for each paper. To add a method, write its file and name it here."""

from .alibi import ALiBiLinear, ALiBiNTK
from .base import Composition, Method, get_method, hyper_parameters, list_methods, methods, register
from .bucket import BucketLinear, BucketMaxDistance, BucketMethod
from .cope import CoPE
from .decay import Decay
from .dpe import DPE
from .dual_chunk import DualChunk
from .dynamic_ntk import DynamicNTK
from .dynamic_yarn import DynamicYaRN
from .eabf import EABF
from .fade import Fade
from .frequencies import FrequencyMethod
from .jet_long import JetLong
from .lampe import LaMPE
from .leaky_rerope import LeakyReRoPE
from .linear import Linear
from .llama3 import Llama3
from .llama4_temperature import Llama4Temperature
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
from .self_logistic import SelfLogistic
from .sinks import Sinks
from .sinusoid_linear import SinusoidLinear
from .string_shift import StringShift
from .table import TableCubic, TableGroup, TableHierarchical, TableLinear, TableMethod, TableRepeat
from .text import as_method
from .theta import Theta
from .yarn import YaRN

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
