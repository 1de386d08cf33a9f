"""Criteria: statistics or weights in, one score per unit out; found by name, checked against one contract."""

from nns_plugin.criteria.contract import (
    Criterion,
    Needs,
    UnscoredGroupWarning,
    build,
    needs_of,
    options_of,
    score,
    score_groups,
)
from nns_plugin.criteria.distinctiveness import Distinctiveness
from nns_plugin.criteria.mean_weight import MeanWeight
from nns_plugin.criteria.registry import BUILT_IN, ENTRY_POINT_GROUP, available, broken, find
from nns_plugin.criteria.semantic import Semantic
from nns_plugin.criteria.switcher import Switcher
from nns_plugin.criteria.wsf import WSF

__all__ = [
    "BUILT_IN",
    "ENTRY_POINT_GROUP",
    "WSF",
    "Criterion",
    "Distinctiveness",
    "MeanWeight",
    "Needs",
    "Semantic",
    "Switcher",
    "UnscoredGroupWarning",
    "available",
    "broken",
    "build",
    "find",
    "needs_of",
    "options_of",
    "score",
    "score_groups",
]
