"""Weight snapshots: a model's weights at one time, to measure later how far training has moved them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from nns_plugin.errors import SnapshotError
from nns_plugin.files import read_safetensors, write_safetensors

MASKED = "_orig"


class WeightSnapshot:
    """A copy of a model's weights before training or at a checkpoint, to measure how far training moves them.

    For weights masked by ``torch.nn.utils.prune``, the value behind the mask counts.

    Args:
        model: A model, which is not changed, or weights by name, as from ``state_dict()``.

    Raises:
        SnapshotError: If there are no weights.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> before = WeightSnapshot(layer)
        >>> _ = torch.nn.init.constant_(layer.weight, 7.0)
        >>> bool((before.weights["weight"] != 7).all())
        True
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        if not isinstance(model, (nn.Module, Mapping)):
            raise SnapshotError(
                f"the snapshot was given a {type(model).__name__}; expected a model, or its weights by name; use "
                "WeightSnapshot.load(file) to read a file"
            )
        found = named_weights(model) if isinstance(model, nn.Module) else dict(model)
        self.weights: dict[str, Tensor] = {
            name.removesuffix(MASKED): value.detach().cpu().clone()
            for name, value in found.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        if not self.weights:
            raise SnapshotError("there are no weights; pass a model with parameters")

    def movement(self, model: nn.Module) -> dict[str, Tensor]:
        """Compute how far each weight has moved: the weight significance factor |w(t) - w(0)| of every parameter.

        Args:
            model: The model in its current state; not changed.

        Returns:
            By name of the parameter, of its shape, float64 on the CPU; a masked weight has its unmasked name.

        Raises:
            SnapshotError: If the snapshot belongs to another architecture; the message says what differs.

        Source:
            Bulin and Smidl, "Optimization of Neural Network".
        """
        now = {name.removesuffix(MASKED): value for name, value in named_weights(model).items()}
        self.check(now)
        return {
            name: (value.detach().cpu().double() - self.weights[name].double()).abs() for name, value in now.items()
        }

    def check(self, now: Mapping[str, Tensor]) -> None:
        """Reject weights of another architecture; what only the snapshot has, such as running statistics, is fine.

        Raises:
            SnapshotError: If a weight is missing from the snapshot or has another shape in it.
        """
        wrong = []
        first: dict[int, str] = {}
        for name, value in now.items():
            twin, known = first.setdefault(id(value), name), self.weights.get(name)
            other = self.weights.get(twin)
            if known is not None and other is not None and not torch.equal(known, other):
                wrong.append(f"{twin!r} and {name!r} are two parameters in it and one in the model")
                continue
            if known is None:
                wrong.append(f"{name!r} is not in it")
            elif known.shape != value.shape:
                wrong.append(f"{name!r} is {list(known.shape)} in it and {list(value.shape)} in the model")
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise SnapshotError(
                f"the weight snapshot does not fit the model: {', '.join(wrong[:3])}{more}; take the snapshot of this "
                "architecture, and narrow it whenever units are removed"
            )

    def restored(self, model: nn.Module) -> nn.Module:
        """Copy the snapshot's weights into a model of its architecture, in place, and return the model.

        Raises:
            SnapshotError: If the snapshot belongs to another architecture.
        """
        now = named_weights(model)
        self.check({name.removesuffix(MASKED): value for name, value in now.items()})
        with torch.no_grad():
            for name, value in now.items():
                value.copy_(self.weights[name.removesuffix(MASKED)])
        return model

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to a safetensors file, atomically.

        Raises:
            SnapshotError: If the folder cannot be written.
        """
        write_safetensors(Path(path), "nns-plugin weight snapshot 1", SnapshotError, {}, self.weights)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WeightSnapshot:
        """Read a file that :meth:`save` wrote, or any safetensors checkpoint.

        Raises:
            SnapshotError: If the file is missing or damaged, or holds no weights.
        """
        return read_safetensors(Path(path), None, SnapshotError, lambda metadata, tensors: cls(tensors))


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by name; tied parameters under each of their names."""
    return {name: value for name, value in model.named_parameters(remove_duplicate=False) if value.is_floating_point()}
