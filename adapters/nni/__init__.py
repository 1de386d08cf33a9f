"""NNI: criteria as pruners, config lists aware of shared units, and small models made from masks."""

from __future__ import annotations

from nns_plugin.errors import MissingExtraError

try:
    import nni.compression.pruning as host
except ImportError as error:
    raise MissingExtraError("nni", "nni") from error

from nns_plugin.adapters.nni.backend import NNIBackend, NNIFallbackWarning, kept_by_masks
from nns_plugin.adapters.nni.criterion_pruner import CriterionPruner
from nns_plugin.adapters.nni.dependency_groups import UngroupedLayersWarning, with_dependency_groups
from nns_plugin.adapters.nni.mask_resolution import MaskedUnits
from nns_plugin.adapters.nni.masked_speedup import Speedup, speedup
from nns_plugin.adapters.nni.pruners import (
    DistinctivenessPruner,
    MeanWeightPruner,
    SemanticPruner,
    SwitcherPruner,
    WSFPruner,
)
from nns_plugin.adapters.torch_pruning.installation import add_classes, remove_classes

__all__ = [
    "CriterionPruner",
    "DistinctivenessPruner",
    "MaskedUnits",
    "MeanWeightPruner",
    "NNIBackend",
    "NNIFallbackWarning",
    "SemanticPruner",
    "Speedup",
    "SwitcherPruner",
    "UngroupedLayersWarning",
    "WSFPruner",
    "install",
    "kept_by_masks",
    "speedup",
    "uninstall",
    "with_dependency_groups",
]

PRUNERS: dict[str, type[CriterionPruner]] = {
    pruner.__name__: pruner
    for pruner in (DistinctivenessPruner, MeanWeightPruner, SemanticPruner, SwitcherPruner, WSFPruner)
}


def install() -> None:
    """Add our pruners to NNI's own in ``nni.compression.pruning``.

    Raises:
        CriterionError: If one of the names is taken; nothing is added then.
    """
    add_classes(host, "nni.compression.pruning", PRUNERS)


def uninstall() -> None:
    """Undo :func:`install`; does nothing if it was not called."""
    remove_classes(host, PRUNERS)
