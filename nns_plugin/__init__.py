"""Importance criteria for structured pruning that torch-pruning and NNI lack, with evidence for what they keep."""

from importlib.metadata import PackageNotFoundError, version

from nns_plugin.errors import NNSError
from nns_plugin.statistics.calibration import calibrate
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.subnets.integration import integrate
from nns_plugin.subnets.subnet import Subnet
from nns_plugin.synapses.minimal import MinimalNetwork, minimal_network
from nns_plugin.synapses.snapshot import WeightSnapshot
from nns_plugin.units import Port, UnitGroup

try:
    __version__ = version("nns-plugin")
except PackageNotFoundError:  # the source tree, not installed
    __version__ = "0+unknown"

__all__ = [
    "MinimalNetwork",
    "NNSError",
    "Port",
    "Statistics",
    "Subnet",
    "UnitGroup",
    "WeightSnapshot",
    "__version__",
    "calibrate",
    "integrate",
    "minimal_network",
]
