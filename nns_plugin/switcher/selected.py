"""Layers that read only some positions of their input."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from nns_plugin.models.layers import narrow_inputs
from nns_plugin.models.preserve import copied


class Selected(nn.Module):
    """A linear layer that selects the positions that it reads; in ONNX, a Gather before the layer.

    Args:
        layer: Reads ``k`` positions.
        indices: ``[k]`` int64: their positions in the wide input.
    """

    indices: Tensor

    def __init__(self, layer: nn.Linear, indices: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("indices", indices.to(layer.weight.device))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        output: Tensor = self.layer(inputs.index_select(-1, self.indices))
        return output


def selected(model: nn.Module, names: Iterable[str]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Narrow linear layers of a copy to the positions for which they have a weight that is not 0.

    Args:
        model: Not changed.
        names: Names of linear layers; those that use all positions are not changed.

    Returns:
        The copy, and the kept positions by layer, ``[k]`` int64 ascending; at least one per layer.
    """
    small = copied(model)
    found: dict[str, Tensor] = {}
    for name in names:
        layer = small.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        used = (layer.weight.detach() != 0).any(0)
        if bool(used.all()):
            continue
        used[0] |= not bool(used.any())
        found[name] = used.nonzero().flatten().cpu()
        narrow_inputs(layer, found[name])
        narrow = Selected(layer, found[name]).train(layer.training)
        if not name:
            return narrow, found
        small.set_submodule(name, narrow)
    return small, found
