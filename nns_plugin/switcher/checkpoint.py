"""The checkpoint of a training: everything that it needs to resume, in one safetensors file."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nns_plugin.errors import CheckpointError
from nns_plugin.files import read_safetensors, write_safetensors

FORMAT = "nns-plugin training 1"
KEYS = frozenset(
    ("weights", "best", "options", "kinds", "others", "torch", "cuda", "generators", "python", "numpy", "history")
)


class TrainingState:
    """The state of networks, optimizers, schedulers and random numbers, to be saved after an epoch and restored.

    Args:
        networks: By name.
        others: Objects with ``state_dict`` and ``load_state_dict``, always in the same order.
        loaders: Their generators and those of their samplers are part of the state.
        options: What must be the same when training resumes, as JSON types.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        others: Sequence[Any],
        loaders: Sequence[Any],
        options: Mapping[str, Any],
    ) -> None:
        self._networks, self._others, self._options = dict(networks), list(others), dict(options)
        places = ("", "sampler", "batch_sampler", "batch_sampler.sampler")
        sources = [_found(loader, f"{place}.generator".lstrip(".")) for loader in loaders for place in places]
        self._generators = list(
            {id(source): source for source in sources if isinstance(source, torch.Generator)}.values()
        )

    def weights(self) -> dict[str, Tensor]:
        """Copy the networks' weights and buffers, including those that are not in their state dictionaries."""
        return {name: value.detach().clone() for name, value in self._tensors().items()}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Restore weights and buffers in place."""
        for name, value in self._tensors().items():
            value.copy_(weights[name])

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, network in self._networks.items()
            for key, value in (*network.named_parameters(), *network.named_buffers())
        }

    def save(self, path: Path, history: Sequence[Any], best: Mapping[str, Tensor] | None) -> None:
        """Write the whole state to a file, atomically.

        Args:
            path: The file.
            history: The epochs so far, as JSON types.
            best: The best weights so far.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        python, numbers = random.getstate(), np.random.get_state(legacy=True)
        state = {
            "weights": self.weights(),
            "best": None if best is None else dict(best),
            "options": self._options,
            "kinds": self._kinds(),
            "others": [other.state_dict() for other in self._others],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "generators": [generator.get_state() for generator in self._generators],
            "python": [python[0], list(python[1]), python[2]],
            "numpy": [
                torch.from_numpy(part.astype(np.int64)) if isinstance(part, np.ndarray) else part for part in numbers
            ],
            "history": list(history),
        }
        tensors: dict[str, Tensor] = {}
        described = _packed(state, tensors)
        write_safetensors(path, FORMAT, CheckpointError, {"nns": json.dumps(described)}, tensors)

    def _put(self, weights: Mapping[str, Tensor], others: Sequence[Any]) -> None:
        self.restore(weights)
        for other, values in zip(self._others, others, strict=True):
            other.load_state_dict(values)

    def _kinds(self) -> list[Any]:
        """Describe the others and the parameters that they hold."""
        states = [(other, other.state_dict()) for other in self._others]
        return [len(self._generators)] + [
            [
                type(other).__name__,
                sorted(map(str, state)),
                [[sorted(group), len(group["params"])] for group in state.get("param_groups", [])],
            ]
            for other, state in states
        ]

    def load(self, path: Path) -> tuple[list[Any], dict[str, Tensor] | None]:
        """Restore what :meth:`save` wrote; return the history and the best weights.

        Raises:
            CheckpointError: If the file is damaged or belongs to another training; nothing is changed then.
        """
        state = read_safetensors(path, FORMAT, CheckpointError, _decoded)
        expected = {name: (value.shape, value.dtype) for name, value in self.weights().items()}
        found = {name: (value.shape, value.dtype) for name, value in state["weights"].items()}
        if found != expected or state["kinds"] != self._kinds():
            raise CheckpointError(
                f"{str(path)!r} belongs to another training: its networks, optimizers or schedulers differ; resume "
                "with the same ones, or choose another file"
            )
        if state["options"] != self._options:
            differ = [name for name, value in self._options.items() if state["options"].get(name) != value]
            changed = ", ".join(f"{name} is {state['options'].get(name)}, not {self._options[name]}" for name in differ)
            raise CheckpointError(f"{str(path)!r} belongs to a training with other options: its {changed}")
        before = self.weights(), [copy.deepcopy(other.state_dict()) for other in self._others]
        try:
            self._put(state["weights"], state["others"])
        except Exception as error:  # whatever an optimizer raises for a state of another one
            self._put(*before)
            raise CheckpointError(f"{str(path)!r} belongs to another training: {error}") from error
        torch.set_rng_state(state["torch"])
        for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value, device)
        for generator, value in zip(self._generators, state["generators"], strict=True):
            generator.set_state(value)
        version, values, normal = state["python"]
        random.setstate((version, tuple(values), normal))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        return state["history"], state["best"]


def _found(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _decoded(metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    state: dict[str, Any] = _unpacked(json.loads(metadata["nns"]), tensors)
    missing = KEYS - state.keys()
    if missing:
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    return state


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Convert a nested state to JSON types and move its tensors into ``tensors``."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().clone()
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"pairs": [[_packed(key, tensors), _packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_packed(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_packed(item, tensors) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"a {type(value).__name__} cannot be written to a checkpoint; train without one")


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_unpacked(item, tensors) for item in value["tuple"])
    return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in value["pairs"]}
