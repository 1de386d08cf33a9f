"""Figures of units, label subnets, accuracy, latency, synapses and scaling factors; drawing needs matplotlib."""

from nns_plugin.jobs.figures.accuracy import integration_figure, pareto_figure, size_figure
from nns_plugin.jobs.figures.canvas import new_figure
from nns_plugin.jobs.figures.latency import latency_figure
from nns_plugin.jobs.figures.switcher import scaling_figure, states_figure
from nns_plugin.jobs.figures.synapses import inputs_figure, paths_figure
from nns_plugin.jobs.figures.units import activity_figure, jaccard, overlap_figure

__all__ = [
    "activity_figure",
    "inputs_figure",
    "integration_figure",
    "jaccard",
    "latency_figure",
    "new_figure",
    "overlap_figure",
    "pareto_figure",
    "paths_figure",
    "scaling_figure",
    "size_figure",
    "states_figure",
]
