"""torch-pruning as host: criteria as importances for any of its pruners, and compensated removal."""

from nns_plugin.adapters.torch_pruning.importances import (
    CriterionImportance,
    DistinctivenessImportance,
    MeanWeightImportance,
    SemanticImportance,
    SwitcherImportance,
    WSFImportance,
    compensated_step,
    count_macs,
    install,
    uninstall,
)

__all__ = [
    "CriterionImportance",
    "DistinctivenessImportance",
    "MeanWeightImportance",
    "SemanticImportance",
    "SwitcherImportance",
    "WSFImportance",
    "compensated_step",
    "count_macs",
    "install",
    "uninstall",
]
