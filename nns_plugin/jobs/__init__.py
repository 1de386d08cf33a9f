"""The jobs behind the command line, callable from Python; recipes, sweeps and validations need the extra ``cli``."""

from nns_plugin.jobs.data import Datasets, digits
from nns_plugin.jobs.extraction import extract_subnet
from nns_plugin.jobs.iterative import IterativePruning, Round, prune_iteratively
from nns_plugin.jobs.models import digits_classifier
from nns_plugin.jobs.training import train_classifier

__all__ = [
    "Datasets",
    "IterativePruning",
    "Round",
    "digits",
    "digits_classifier",
    "extract_subnet",
    "prune_iteratively",
    "train_classifier",
]
