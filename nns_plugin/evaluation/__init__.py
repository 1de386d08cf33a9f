"""Evaluation: metrics of a classifier, their bootstrap intervals, and how far outputs differ."""

from nns_plugin.evaluation.agreement import label_agreement, top1_agreement
from nns_plugin.evaluation.decisions import Decisions
from nns_plugin.evaluation.evaluation import Drops, Evaluation, LabelResult, comparable_outputs, drops, evaluate
from nns_plugin.evaluation.intervals import Interval, bootstrap, interval, percentile, rule_of_three
from nns_plugin.evaluation.metrics import Array, label_metrics, log_probabilities, probabilities
from nns_plugin.evaluation.parity import Divergence, ParityReport, label_parity
from nns_plugin.evaluation.prediction import predict

__all__ = [
    "Array",
    "Decisions",
    "Divergence",
    "Drops",
    "Evaluation",
    "Interval",
    "LabelResult",
    "ParityReport",
    "bootstrap",
    "comparable_outputs",
    "drops",
    "evaluate",
    "interval",
    "label_agreement",
    "label_metrics",
    "label_parity",
    "log_probabilities",
    "percentile",
    "predict",
    "probabilities",
    "rule_of_three",
    "top1_agreement",
]
