"""Arguments of a model's forward: checked tensors with one batch size, positional or by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from nns_plugin.errors import ExportError

Inputs: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What a model's forward takes: one tensor, its positional tensors, or its tensors by parameter name."""


class Arguments(NamedTuple):
    """Checked inputs of a forward: positional tensors or tensors by name, all with the same batch size."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]

    @classmethod
    def of(cls, inputs: Inputs) -> Arguments:
        """Check inputs.

        Raises:
            ExportError: Unless all are tensors whose dimension 0 is the same batch, of at least one input.
        """
        if isinstance(inputs, Mapping):
            arguments = cls((), dict(inputs))
        else:
            arguments = cls((inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {})
        tensors = arguments.tensors
        found = [f"{t.dtype}{list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__ for t in tensors]
        if not all(isinstance(t, Tensor) and t.ndim > 0 for t in tensors) or len({len(t) for t in tensors}) != 1:
            raise ExportError(
                f"the inputs are {found or 'none'}; expected one or more tensors whose dimension 0 is the same batch"
            )
        if arguments.batch == 0:
            raise ExportError(f"the inputs {found} hold no example; pass a batch of at least 1")
        return arguments

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in order."""
        return (*self.args, *self.kwargs.values())

    @property
    def batch(self) -> int:
        """Number of inputs."""
        return len(self.tensors[0])

    def map(self, change: Callable[[Tensor], Tensor]) -> Arguments:
        """The same arguments with every tensor changed."""
        return Arguments(tuple(map(change, self.args)), {name: change(t) for name, t in self.kwargs.items()})

    def doubled(self) -> Arguments:
        """The batch twice, one copy after the other."""
        return self.map(lambda tensor: torch.cat([tensor, tensor]))

    def to(self, device: torch.device) -> Arguments:
        """The same arguments on another device."""
        return self.map(lambda tensor: tensor.to(device))
