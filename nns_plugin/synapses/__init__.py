"""Single weights (synapses): masks, their significance, the minimal network, and compaction of what they leave."""

from nns_plugin.synapses.compaction import Compact, compact
from nns_plugin.synapses.dead_units import DeadUnitsWarning
from nns_plugin.synapses.exchange import exchange_synapses, synapse_gradients
from nns_plugin.synapses.input_selection import InputSelection, UnusedInputsWarning
from nns_plugin.synapses.masks import mask_synapses, prune_synapses, synapse_layers, synapse_mask
from nns_plugin.synapses.mean_weight import over_mean, prune_under_mean
from nns_plugin.synapses.minimal import MinimalNetwork, minimal_network
from nns_plugin.synapses.options import MinimalNetworkOptions
from nns_plugin.synapses.paths import synapse_paths
from nns_plugin.synapses.search import Step
from nns_plugin.synapses.significance import significance
from nns_plugin.synapses.snapshot import WeightSnapshot

__all__ = [
    "Compact",
    "DeadUnitsWarning",
    "InputSelection",
    "MinimalNetwork",
    "MinimalNetworkOptions",
    "Step",
    "UnusedInputsWarning",
    "WeightSnapshot",
    "compact",
    "exchange_synapses",
    "mask_synapses",
    "minimal_network",
    "over_mean",
    "prune_synapses",
    "prune_under_mean",
    "significance",
    "synapse_gradients",
    "synapse_layers",
    "synapse_mask",
    "synapse_paths",
]
