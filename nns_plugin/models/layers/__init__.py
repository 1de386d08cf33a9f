"""The geometry of layers, all of it: kinds, axes, groups, matrices of weights and inputs, and pooled positions."""

from nns_plugin.models.layers.axes import axis_length, out_axis, rows_of, spread, synapse_axis
from nns_plugin.models.layers.kinds import (
    Convolution,
    Transposed,
    channel_groups,
    is_plain_convolution,
    weight_key,
    weight_of,
)
from nns_plugin.models.layers.layouts import Layout
from nns_plugin.models.layers.matrices import (
    add_to_bias,
    has_bias,
    narrow_columns,
    padded_positions,
    reading_matrices,
    tap_share,
    write_matrices,
)
from nns_plugin.models.layers.unfolding import channel_matrix, output_matrix, set_weight_matrix, unfolded, weight_matrix

__all__ = [
    "Convolution",
    "Layout",
    "Transposed",
    "add_to_bias",
    "axis_length",
    "channel_groups",
    "channel_matrix",
    "has_bias",
    "is_plain_convolution",
    "narrow_columns",
    "out_axis",
    "output_matrix",
    "padded_positions",
    "reading_matrices",
    "rows_of",
    "set_weight_matrix",
    "spread",
    "synapse_axis",
    "tap_share",
    "unfolded",
    "weight_key",
    "weight_matrix",
    "weight_of",
    "write_matrices",
]
