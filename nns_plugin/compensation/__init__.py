"""Compensation: kept units take over what removed ones contributed; no host in here."""

from nns_plugin.compensation.compensated import CompensationWarning, compensated_removal
from nns_plugin.compensation.least_squares import Merge
from nns_plugin.compensation.options import Compensation, Method
from nns_plugin.compensation.removals import PrunableModel, Removal
from nns_plugin.compensation.survivors import Survivors, survivors_of

__all__ = [
    "Compensation",
    "CompensationWarning",
    "Merge",
    "Method",
    "PrunableModel",
    "Removal",
    "Survivors",
    "compensated_removal",
    "survivors_of",
]
