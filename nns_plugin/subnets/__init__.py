"""Subnets: a model restricted to some units and labels."""

from nns_plugin.subnets.angles import Angles
from nns_plugin.subnets.extraction import Choice, Extraction, Preparation, Prepared
from nns_plugin.subnets.integration import RetrainedWarning, integrate
from nns_plugin.subnets.options import ExtractionOptions
from nns_plugin.subnets.provenance import Provenance, Trial
from nns_plugin.subnets.steps import calibrate_head, carry_out, finish_head, prepare
from nns_plugin.subnets.subnet import InexactMaskWarning, Subnet

__all__ = [
    "Angles",
    "Choice",
    "Extraction",
    "ExtractionOptions",
    "InexactMaskWarning",
    "Preparation",
    "Prepared",
    "Provenance",
    "RetrainedWarning",
    "Subnet",
    "Trial",
    "calibrate_head",
    "carry_out",
    "finish_head",
    "integrate",
    "prepare",
]
