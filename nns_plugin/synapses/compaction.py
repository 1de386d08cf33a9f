"""Compaction: turn a masked model into a dense one without masks, dead units and unused inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from nns_plugin.backends import Backend, find_backend
from nns_plugin.errors import PruningError
from nns_plugin.models.inputs import device_of, map_tensors, run_model, tensors_of
from nns_plugin.models.layers import is_linear_or_convolution, weight_of
from nns_plugin.models.preserve import copied, preserved_rng
from nns_plugin.synapses.dead_units import without_dead_units
from nns_plugin.synapses.input_selection import InputSelection, narrowed_to_used

ROWS = 32


@dataclass(frozen=True, eq=False)
class Compact:
    """A model without dead units and unused inputs; callable with the original inputs.

    Attributes:
        model: Dense, without masks, in evaluation mode.
        kept: The kept units of each group that lost some, ``[k]`` int64 ascending.
        inputs: Selects the inputs that the model uses; ``None`` if it uses all of them.
    """

    model: nn.Module
    kept: Mapping[str, Tensor]
    inputs: InputSelection | None

    @property
    def synapses(self) -> int:
        """Number of weights of linear and convolutional layers that are not 0."""
        return count_synapses(self.model)

    def __call__(self, inputs: Any) -> Any:
        """Run the model on inputs of the original."""
        with torch.no_grad():
            return run_model(self.model, inputs if self.inputs is None else self.inputs(inputs))


def compact(
    model: nn.Module,
    example_inputs: Any,
    *,
    narrow_inputs: bool = True,
    ignored_layers: Sequence[str] = (),
    backend: Backend | None = None,
) -> Compact:
    """Make masks permanent and remove dead units and unused inputs, in a copy.

    Units that nothing reads are removed, and so are units that nothing writes, whose constant values the biases of
    their consumers absorb; each layer keeps at least one. The result computes what the model computes: both are run in
    double precision to verify that, and units and inputs whose removal would change the outputs are kept.

    Args:
        model: Its weights may be masked by ``torch.nn.utils.prune``; not changed.
        example_inputs: Inputs that it can run on. Integers and Booleans among them are used unchanged to compare
            outputs, so choose representative ones.
        narrow_inputs: Whether to remove unused inputs, if the model's input is one tensor.
        ignored_layers: Names of layers whose outputs must not be removed.
        backend: Removes units; torch-pruning by default.

    Raises:
        PruningError: If the model cannot run in double precision on the CPU.

    Warns:
        DeadUnitsWarning: If dead units cannot be removed.
        UnusedInputsWarning: If unused inputs cannot be removed.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = nn.init.zeros_(model[2].weight[:, 1:]), nn.init.zeros_(model[0].weight[:, 1])
        >>> small = compact(model, torch.randn(2, 3))
        >>> small.model[0].weight.shape, small.inputs.indices, small.synapses
        (torch.Size([1, 2]), tensor([0, 2]), 4)
    """
    wide = permanent(copied(model)).eval()
    types = {name: value.dtype for name, value in _named(wide)}
    device = device_of(wide)
    wide = wide.to("cpu", torch.float64)
    with preserved_rng():
        inputs, others = _examples(example_inputs)
        try:
            small, kept = without_dead_units(wide, inputs, others, backend or find_backend(), ignored_layers)
            narrowed = narrowed_to_used(small, others) if narrow_inputs else None
        except Exception as error:  # whatever the user's forward raises in double precision
            raise PruningError(f"the model cannot be compacted, in double precision on the CPU: {error}") from error
    small, selection = narrowed or (small, None)
    with torch.no_grad():
        for name, value in _named(small):
            value.data = value.data.to(types[name])
    return Compact(small.to(device).eval(), kept, selection)


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _examples(inputs: Any) -> tuple[Any, Any]:
    """Return two batches of at least ``ROWS`` inputs: the examples, followed by normal random numbers.

    Integers and Booleans are those of the examples.
    """
    rows = min((value.shape[0] for value in tensors_of(inputs) if value.dim()), default=1)
    times = -(-ROWS // max(rows, 1))
    generator = torch.Generator().manual_seed(0)

    def more(value: Tensor) -> Tensor:
        value = value.detach().cpu()
        if not value.dim():
            return value
        if not value.is_floating_point():
            return value.repeat(times, *[1] * (value.dim() - 1))
        drawn = torch.randn(value.shape[0] * times, *value.shape[1:], generator=generator, dtype=torch.float64)
        return torch.cat([value.double(), drawn[value.shape[0] :]])

    return map_tensors(inputs, more), map_tensors(inputs, more)


def permanent(model: nn.Module) -> nn.Module:
    """Make the masks of ``torch.nn.utils.prune`` permanent, in place."""
    for module in model.modules():
        for name in [name.removesuffix("_mask") for name in module._buffers if name.endswith("_mask")]:
            if f"{name}_orig" in module._parameters:
                prune.remove(module, name)
    return model


def count_synapses(model: nn.Module) -> int:
    """Count the weights of linear and convolutional layers that are not 0; biases are not synapses."""
    layers = [module for module in model.modules() if is_linear_or_convolution(module)]
    return sum(int(weight_of(module).count_nonzero()) for module in layers)
