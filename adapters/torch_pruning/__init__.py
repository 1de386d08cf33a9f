"""torch-pruning as host: criteria as importances for any of its pruners, and compensated removal."""

from nns_plugin.adapters.torch_pruning.angle_pruning import AngleOptions, AnglePruning, prune_by_angle
from nns_plugin.adapters.torch_pruning.criterion_importance import CriterionImportance
from nns_plugin.adapters.torch_pruning.groups import unit_groups
from nns_plugin.adapters.torch_pruning.importances import (
    DistinctivenessImportance,
    MeanWeightImportance,
    SemanticImportance,
    SwitcherImportance,
    WSFImportance,
    install,
    uninstall,
)
from nns_plugin.adapters.torch_pruning.macs import count_macs
from nns_plugin.adapters.torch_pruning.norms import norm_pruners
from nns_plugin.adapters.torch_pruning.pruner_step import compensated_step
from nns_plugin.selection import AngleRule

__all__ = [
    "AngleOptions",
    "AnglePruning",
    "AngleRule",
    "CriterionImportance",
    "DistinctivenessImportance",
    "MeanWeightImportance",
    "SemanticImportance",
    "SwitcherImportance",
    "WSFImportance",
    "compensated_step",
    "count_macs",
    "install",
    "norm_pruners",
    "prune_by_angle",
    "uninstall",
    "unit_groups",
]
