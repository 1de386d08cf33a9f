"""ONNX Runtime: export a model, compare a candidate with its baseline, and judge whether it may be shipped."""

from nns_plugin.adapters.onnxruntime.accuracy import AccuracyReport, LabelDrop
from nns_plugin.adapters.onnxruntime.answers import Answers, answers_of
from nns_plugin.adapters.onnxruntime.comparison import Comparison, compare, jsonable
from nns_plugin.adapters.onnxruntime.exporting import export
from nns_plugin.adapters.onnxruntime.feeds import Feeds, feeds_of, random_values, read_values, values_of
from nns_plugin.adapters.onnxruntime.file import (
    FEATURES_KEY,
    LABELS_KEY,
    SELECTION_KEY,
    OnnxFile,
    TensorSpec,
    read_file,
)
from nns_plugin.adapters.onnxruntime.gate import Check, Gate, Verdict
from nns_plugin.adapters.onnxruntime.latency import (
    FeedPair,
    LatencyComparison,
    LatencyReport,
    latency_report,
    measure_latency,
    median_ratio,
)
from nns_plugin.adapters.onnxruntime.layers import OnnxLayer, odd_layers, read_layers
from nns_plugin.adapters.onnxruntime.memory import SessionMemory, session_memory
from nns_plugin.adapters.onnxruntime.parity import check_parity, check_removal
from nns_plugin.adapters.onnxruntime.profile import (
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
    "Answers",
    "Check",
    "Comparison",
    "Divergence",
    "FeedPair",
    "Feeds",
    "Gate",
    "LabelDrop",
    "LatencyComparison",
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
    "TensorSpec",
    "Verdict",
    "answers_of",
    "check_parity",
    "check_provider",
    "check_removal",
    "compare",
    "compare_profiles",
    "create_session",
    "export",
    "feeds_of",
    "jsonable",
    "label_parity",
    "latency_report",
    "measure_latency",
    "median_ratio",
    "odd_layers",
    "profile",
    "random_values",
    "read_file",
    "read_layers",
    "read_values",
    "rounding_gains",
    "runtime_build",
    "session_memory",
    "session_providers",
    "values_of",
]
