"""Weight snapshots: a model's weights at one time, to see later how far training moved them."""

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
    """The weights of a model as they are now: before training, or at any earlier checkpoint.

    Weights masked by ``torch.nn.utils.prune`` count as what lies behind the mask.

    Args:
        model: Left as it is; or weights by name, as of ``state_dict()``.

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
                f"found a {type(model).__name__}; expected a model, or its weights by name; WeightSnapshot.load(file) "
                "reads a file"
            )
        found = named_weights(model) if isinstance(model, nn.Module) else dict(model)
        self.weights: dict[str, Tensor] = {
            name.removesuffix(MASKED): value.detach().cpu().clone()
            for name, value in found.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        if not self.weights:
            raise SnapshotError("there are no weights to remember; pass a model with parameters")

    def movement(self, model: nn.Module) -> dict[str, Tensor]:
        """How far each weight has moved since: the weight significance factor |w(t) - w(0)| of every parameter.

        Args:
            model: The model as it is now; left as it is.

        Returns:
            By name of the parameter, of its shape, float64 on the CPU; a masked weight by the name it has unmasked.

        Raises:
            SnapshotError: If the snapshot is of another architecture; the message says what differs.

        Source:
            Bulin and Smidl, "Optimization of Neural Network".
        """
        now = {name.removesuffix(MASKED): value for name, value in named_weights(model).items()}
        self.check(now)
        return {
            name: (value.detach().cpu().double() - self.weights[name].double()).abs() for name, value in now.items()
        }

    def check(self, now: Mapping[str, Tensor]) -> None:
        """Refuse weights of another architecture; what only the snapshot has (running statistics) does not matter.

        Raises:
            SnapshotError: If a weight is missing from the snapshot or has another shape there.
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
                f"the weight snapshot does not fit the model: {', '.join(wrong[:3])}{more}; take it of this very "
                "architecture, and narrow it whenever units are removed"
            )

    def restored(self, model: nn.Module) -> nn.Module:
        """Write the snapshot's weights into a model of its architecture, in place, and return it.

        Raises:
            SnapshotError: If the snapshot is of another architecture.
        """
        now = named_weights(model)
        self.check({name.removesuffix(MASKED): value for name, value in now.items()})
        with torch.no_grad():
            for name, value in now.items():
                value.copy_(self.weights[name.removesuffix(MASKED)])
        return model

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to a safetensors file, which appears whole or not at all.

        Raises:
            SnapshotError: If the folder cannot be written.
        """
        write_safetensors(Path(path), "nns-plugin weight snapshot 1", SnapshotError, {}, self.weights)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WeightSnapshot:
        """Read a file of :meth:`save`, or any checkpoint in safetensors.

        Raises:
            SnapshotError: If the file is missing, damaged, or holds no weights.
        """
        return read_safetensors(Path(path), None, SnapshotError, lambda metadata, tensors: cls(tensors))


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, those that are tied under each of their names."""
    return {name: value for name, value in model.named_parameters(remove_duplicate=False) if value.is_floating_point()}
