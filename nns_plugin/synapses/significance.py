"""The weight significance factor of every synapse: how far training has moved it."""

from __future__ import annotations

from torch import Tensor, nn

from nns_plugin.errors import PruningError
from nns_plugin.synapses.masks import synapse_layers
from nns_plugin.synapses.snapshot import WeightSnapshot


def significance(model: nn.Module, snapshot: WeightSnapshot) -> dict[str, Tensor]:
    """Compute the weight significance factor of every synapse: how far training has moved it.

    Args:
        model: In its current state; not changed.
        snapshot: Its weights before training or at any earlier checkpoint.

    Returns:
        |w(t) - w(0)| of each weight, by name of the linear or convolutional layer: of the weight's shape, float64 on
        the CPU. For a masked weight, the value behind the mask counts. Biases are not synapses.

    Raises:
        SnapshotError: If the snapshot belongs to another architecture.
        PruningError: If a layer's weight is not a parameter but is computed from other parameters.

    Source:
        Bulin and Smidl, "Optimization of Neural Network": WSF(k) = |w_k(t_f) - w_k(0)|.
    """
    movement = snapshot.movement(model)
    layers = synapse_layers(model)
    computed = [name for name in layers if f"{name}.weight" not in movement]
    if computed:
        raise PruningError(
            f"the weights of {', '.join(computed)} are computed from other parameters, as by weight_norm, so their "
            "synapses cannot be masked; make them plain parameters first "
            "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm)"
        )
    return {name: movement[f"{name}.weight"] for name in layers}
