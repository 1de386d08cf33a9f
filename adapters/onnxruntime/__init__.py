"""ONNX Runtime: export a model, compare a candidate with its baseline, and decide whether it may be shipped."""

from importlib.util import find_spec

from nns_plugin.errors import MissingExtraError

# Only found, not imported: importing onnxscript, which torch.onnx needs, would cost every session a second.
if _missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
    raise MissingExtraError(_missing[0], "onnx")

from nns_plugin.adapters.onnxruntime.accuracy import AccuracyReport, LabelDrop
from nns_plugin.adapters.onnxruntime.comparing import TorchModels, UnmeasuredWarning, compare
from nns_plugin.adapters.onnxruntime.comparison import CompareOptions, Comparison, jsonable
from nns_plugin.adapters.onnxruntime.exporting import TensorNames, export
from nns_plugin.adapters.onnxruntime.feeds import read_values, values_of
from nns_plugin.adapters.onnxruntime.file import (
    FEATURES_KEY,
    LABELS_KEY,
    SELECTION_KEY,
    OnnxFile,
    TensorSpec,
    read_file,
)
from nns_plugin.adapters.onnxruntime.gate import Check, Gate, Verdict
from nns_plugin.adapters.onnxruntime.latency import FeedPair, LatencyComparison, LatencyOptions, measure_latency
from nns_plugin.adapters.onnxruntime.latency_statistics import LatencyReport, latency_report, median_ratio
from nns_plugin.adapters.onnxruntime.layers import OnnxLayer, odd_layers, read_layers
from nns_plugin.adapters.onnxruntime.memory import SessionMemory, session_memory
from nns_plugin.adapters.onnxruntime.parity import check_parity, check_removal
from nns_plugin.adapters.onnxruntime.profiling import (
    NodeTime,
    OperatorChange,
    Profile,
    ProfileComparison,
    compare_profiles,
    profile,
)
from nns_plugin.adapters.onnxruntime.rounding import RoundingGain, rounding_gains
from nns_plugin.adapters.onnxruntime.session import check_provider, create_session, runtime_build, session_providers
from nns_plugin.evaluation.parity import Divergence, ParityReport, label_parity

__all__ = [
    "FEATURES_KEY",
    "LABELS_KEY",
    "SELECTION_KEY",
    "AccuracyReport",
    "Check",
    "CompareOptions",
    "Comparison",
    "Divergence",
    "FeedPair",
    "Gate",
    "LabelDrop",
    "LatencyComparison",
    "LatencyOptions",
    "LatencyReport",
    "NodeTime",
    "OnnxFile",
    "OnnxLayer",
    "OperatorChange",
    "ParityReport",
    "Profile",
    "ProfileComparison",
    "RoundingGain",
    "SessionMemory",
    "TensorNames",
    "TensorSpec",
    "TorchModels",
    "UnmeasuredWarning",
    "Verdict",
    "check_parity",
    "check_provider",
    "check_removal",
    "compare",
    "compare_profiles",
    "create_session",
    "export",
    "jsonable",
    "label_parity",
    "latency_report",
    "measure_latency",
    "median_ratio",
    "odd_layers",
    "profile",
    "read_file",
    "read_layers",
    "read_values",
    "rounding_gains",
    "runtime_build",
    "session_memory",
    "session_providers",
    "values_of",
]
