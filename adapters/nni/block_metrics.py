"""Scores of units as NNI's metrics: one number for each block of a target that its granularity keeps together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from torch import Tensor, nn

from nns_plugin.adapters.torch_pruning.traced_units import TracedUnits
from nns_plugin.errors import PruningError
from nns_plugin.models.layers import axis_length, broadcast_to_weight, by_output, out_axis


def splits_units(space: PruningTargetSpace, shape: Sequence[int]) -> bool:
    """Whether the granularity of a target has blocks that hold parts of units, such as single weights."""
    return space.type is TargetType.PARAMETER and _varying_axis(space, shape) is None


def unit_metric(
    module: nn.Module,
    space: PruningTargetSpace,
    shape: Sequence[int],
    units: TracedUnits,
    scores: Mapping[str, Tensor],
    device: torch.device,
) -> Tensor | None:
    """The metric of a target whose granularity leaves units whole.

    Args:
        module: The layer.
        space: The target.
        shape: Shape of the target.
        units: The units of the model.
        scores: For each scored group ``[U]``.
        device: Where NNI expects the metric.

    Returns:
        The means of the scores over the target's blocks, infinite where no unit is scored; ``None`` if none is.

    Raises:
        PruningError: If the target's blocks do not divide it.
    """
    name = space._wrapper.name
    if space.type is TargetType.PARAMETER:
        out = len(shape) == 1 or _varying_axis(space, shape) == out_axis(module)
        side = "out" if out else "in"
        positions = _position_scores(name, module, side, units, scores)
        if positions is None:
            return None
        return block_means(broadcast_to_weight(module, positions, side, shape), space, device)
    positions = _position_scores(name, module, "in" if space.type is TargetType.INPUT else "out", units, scores)
    if positions is None:
        return None
    if shape[1] != len(positions):
        raise PruningError(
            f"{space._target_name!r} of {name!r} is {list(shape)}; expected {len(positions)} channels at axis 1"
        )
    return block_means(positions.reshape(1, -1, *[1] * (len(shape) - 2)).expand(*shape), space, device)


def block_means(values: Tensor, space: PruningTargetSpace, device: torch.device) -> Tensor:
    """Means over the blocks of a target, on the device where NNI expects them."""
    values = values.to(device, torch.float32 if device.type == "mps" else torch.float64)
    if space._scaler is None:
        return values
    try:
        means: Tensor = space._scaler.shrink(values, keepdim=True)
    except (AssertionError, RuntimeError) as error:
        raise PruningError(
            f"granularity {space.granularity} does not divide a weight of {list(values.shape)}"
        ) from error
    return means


def _position_scores(
    name: str, module: nn.Module, side: str, units: TracedUnits, scores: Mapping[str, Tensor]
) -> Tensor | None:
    """Scores of a layer's positions; infinite where no unit is scored, ``None`` if none is."""
    found: list[tuple[Tensor, Tensor]] = []
    for group in units.groups:
        if group.name in scores:
            ports = units.carriers.get(group.name, ()) if side == "out" else group.consumers
            found += [(port.index, scores[group.name][port.unit]) for port in ports if port.name == name]
    if not found:
        return None
    values = torch.full((_positions(module, side),), torch.inf, dtype=torch.float64)
    for index, score in found:
        values[index] = score
    return values


def _varying_axis(space: PruningTargetSpace, shape: Sequence[int]) -> int | None:
    """The axis of a weight along which the blocks of a granularity lie; ``None`` if they split units."""
    scaler = space._scaler
    if scaler is None:
        return None if len(shape) > 1 else 0
    steps = scaler._padding(scaler.kernel_size, len(shape), scaler.kernel_padding_val, scaler.kernel_padding_mode)
    varying = [axis for axis, step in enumerate(steps) if step != -1 and step < shape[axis]]
    return (varying or [0])[0] if len(varying) < 2 and varying in ([], [0], [1]) else None


def _positions(module: nn.Module, side: str) -> int:
    """Number of positions that a layer reads, or writes or passes on."""
    weight = getattr(module, "weight", None)
    if side == "out" and isinstance(weight, Tensor):
        return len(by_output(module, weight))
    return axis_length(module, side, type(module).__name__)
