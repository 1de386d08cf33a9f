"""The switcher: a network that reads another network's weights and learns a scaling factor for each unit."""

from nns_plugin.switcher.network import AllOffWarning, SwitcherNetwork
from nns_plugin.switcher.options import SwitchedTrainingOptions
from nns_plugin.switcher.removal import SwitchedOff, switch_off
from nns_plugin.switcher.row_network import SwitcherArchitecture
from nns_plugin.switcher.scaling_factors import Counts, ScalingFactors, fold
from nns_plugin.switcher.switches import Switch, UnswitchedWarning, find_switches
from nns_plugin.switcher.training import Epoch, Switched, train_switched

__all__ = [
    "AllOffWarning",
    "Counts",
    "Epoch",
    "ScalingFactors",
    "Switch",
    "Switched",
    "SwitchedOff",
    "SwitchedTrainingOptions",
    "SwitcherArchitecture",
    "SwitcherNetwork",
    "UnswitchedWarning",
    "find_switches",
    "fold",
    "switch_off",
    "train_switched",
]
