"""Statistics: mergeable sums about what units did on calibration data, and the pass that collects them."""

from nns_plugin.statistics.angles import Center, angles, centred, check_center, offsets, silent
from nns_plugin.statistics.calibration import calibrate
from nns_plugin.statistics.macs import layer_macs, unit_macs
from nns_plugin.statistics.records import Key, Record
from nns_plugin.statistics.sensitivity import output_sensitivity
from nns_plugin.statistics.statistics import Statistics

__all__ = [
    "Center",
    "Key",
    "Record",
    "Statistics",
    "angles",
    "calibrate",
    "centred",
    "check_center",
    "layer_macs",
    "offsets",
    "output_sensitivity",
    "silent",
    "unit_macs",
]
