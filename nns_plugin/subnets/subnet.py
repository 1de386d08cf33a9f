"""Label subnets: which units and labels of a parent are left, with their weights, and how to get a model from them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin.backends import TracedModel, find_backend
from nns_plugin.errors import NNSError, SubnetError
from nns_plugin.labels import OTHER
from nns_plugin.models.comparison import same_outputs
from nns_plugin.models.fingerprint import digest, fingerprint
from nns_plugin.models.inputs import device_of, inputs_like, kinds_of
from nns_plugin.models.preserve import copied
from nns_plugin.subnets.head import linear_head, resize_head
from nns_plugin.subnets.provenance import Provenance
from nns_plugin.subnets.steps import Extraction
from nns_plugin.units import UnitGroup


class InexactMaskWarning(UserWarning):
    """Some units pass a norm over units: the masked model and the small one do not compute the same there."""


@dataclass(frozen=True, eq=False)
class Subnet:
    """The part of a parent model that knows some labels.

    Attributes:
        kept: For each pruned group's name the kept units of the parent, ``[k]`` int64 ascending.
        sizes: For each pruned group's name its number of units U in the parent.
        scores: For each pruned group's name the scores of the kept units, ``[k]`` float64; empty where a selection
            gave none.
        label_names: Names of all labels of the parent.
        labels: Indices of the kept labels, ascending.
        outputs: The label of each output; ``None`` for "other".
        head_layer: Name of the layer whose outputs were narrowed to the labels; ``None`` if it is as in the parent.
        weights: The small model's parameters and persistent buffers, by name.
        inputs: Kinds of the example inputs, from :func:`nns_plugin.models.inputs.kinds_of`.
        provenance: Where it comes from.
    """

    kept: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    scores: Mapping[str, Tensor]
    label_names: tuple[str, ...]
    labels: tuple[int, ...]
    outputs: tuple[int | None, ...]
    head_layer: str | None
    weights: Mapping[str, Tensor]
    inputs: Any
    provenance: Provenance

    @classmethod
    def of(cls, extraction: Extraction, label_names: Sequence[str], provenance: Provenance) -> Subnet:
        """The subnet of a model that was cut."""
        sizes = {group.name: group.size for group in extraction.groups if group.name in extraction.kept}
        state = extraction.model.state_dict()
        foreign = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if foreign:
            raise SubnetError(
                f"the model's state holds {', '.join(foreign[:3])}, which is no tensor and cannot be stored"
            )
        weights = {name: value.detach().cpu().clone() for name, value in state.items()}
        return cls(
            kept=dict(extraction.kept),
            sizes=sizes,
            scores={
                name: extraction.scores[name][units]
                for name, units in extraction.kept.items()
                if name in extraction.scores
            },
            label_names=tuple(label_names),
            labels=extraction.labels,
            outputs=extraction.outputs,
            head_layer=extraction.head,
            weights=weights,
            inputs=kinds_of(extraction.example_inputs),
            provenance=provenance,
        )

    @property
    def output_names(self) -> tuple[str, ...]:
        """Name of each output."""
        return tuple(OTHER if label is None else self.label_names[label] for label in self.outputs)

    def materialise(self, parent_factory: Callable[[], nn.Module], example_inputs: Any = None) -> nn.Module:
        """The small model.

        Args:
            parent_factory: Makes the parent's architecture; its weights do not matter.
            example_inputs: Inputs that the parent can run on, for tracing; made up after the kinds of those that the
                subnet was cut with by default.

        Returns:
            The small model, in evaluation mode.

        Raises:
            SubnetError: If the factory makes another architecture than the subnet was cut from.
        """
        made = parent_factory()
        if not isinstance(made, nn.Module):
            raise SubnetError(f"the parent factory returned a {type(made).__name__}; expected a torch module")
        model = copied(made)  # it may be a model that somebody has
        self._resize_head(model)
        traced, groups = self._traced(model, example_inputs)
        traced.keep(groups, self.kept)
        self._load(model)
        return model.eval()

    def mask(self, parent: nn.Module, example_inputs: Any = None) -> nn.Module:
        """The parent with everything but the subnet at zero: the paper's form.

        Its outputs are those of the small model; units that pass a norm over units (LayerNorm, GroupNorm, RMSNorm) are
        exempt, because such a norm sees how many there are. Both are run to find out.

        Args:
            parent: The model that the subnet was cut from; left as it is.
            example_inputs: See :meth:`materialise`.

        Returns:
            A masked copy with the subnet's weights, as wide as the parent but for a head that was shrunk, in evaluation
            mode.

        Raises:
            SubnetError: If the model is not the parent.

        Warns:
            InexactMaskWarning: If there are exempt groups; it names them.
        """
        self._check_parent(parent)
        masked = _untied(copied(parent))
        self._resize_head(masked)
        traced, groups = self._traced(copied(masked), example_inputs)
        _scatter(masked, self.weights, _origins(traced, groups, self.kept))
        masked.eval()
        inputs = inputs_like(self.inputs) if example_inputs is None else example_inputs
        if not same_outputs(self.materialise(lambda: parent, example_inputs), masked, inputs):
            exempt = [name for name in self.kept if self._mixes(parent, name, inputs)] or list(self.kept)
            warnings.warn(
                f"the masked model differs from the small one at {', '.join(exempt)}: what reads these units (such "
                "as a norm over units) sees those at zero, too",
                InexactMaskWarning,
                stacklevel=2,
            )
        return masked

    def _mixes(self, parent: nn.Module, name: str, inputs: Any) -> bool:
        """Whether units of one group at zero are not the same as no units there."""
        kept = {name: self.kept[name]}
        traced, groups = self._traced(copied(parent), inputs)
        traced.keep(groups, kept)
        masked = _untied(copied(parent))
        _scatter(masked, traced.model.state_dict(), _origins(*self._traced(copied(masked), inputs), kept))
        return not same_outputs(traced.model, masked, inputs)

    def pruning_history(self, parent: nn.Module, example_inputs: Any = None) -> list[tuple[str, bool, list[int]]]:
        """What was removed, as torch-pruning writes it, for ``DependencyGraph.load_pruning_history``.

        Args:
            parent: A model of the parent's architecture; left as it is.
            example_inputs: See :meth:`materialise`.
        """
        traced, groups = self._traced(copied(parent), example_inputs)
        traced.keep(groups, self.kept)
        return list(traced.history)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the subnet to one safetensors file, which appears whole or not at all.

        Raises:
            SubnetError: If the folder cannot be written.
        """
        from nns_plugin.subnets.file import save

        return save(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Subnet:
        """Read a file of :meth:`save`.

        Raises:
            SubnetError: If the file is missing, damaged or something else.
        """
        from nns_plugin.subnets.file import load

        return load(Path(path))

    def _check_parent(self, parent: nn.Module) -> None:
        found = digest(fingerprint(parent))
        if found != self.provenance.parent:
            raise SubnetError(
                f"the model's weights have the fingerprint {found}, those of the subnet's parent "
                f"{self.provenance.parent}: pass the parent as it was when the subnet was cut"
            )

    def _traced(self, model: nn.Module, example_inputs: Any) -> tuple[TracedModel, tuple[UnitGroup, ...]]:
        """The model, ready to be cut, and its groups."""
        inputs = inputs_like(self.inputs, device_of(model)) if example_inputs is None else example_inputs
        traced = find_backend()(model, inputs)
        groups = traced.groups(self.provenance.ignored_layers, checked=False)
        found = {group.name: group.size for group in groups}
        for name, size in self.sizes.items():
            if found.get(name) != size:
                raise SubnetError(
                    f"the subnet was cut from a parent whose group {name!r} has {size} units; this one has "
                    f"{found.get(name, 'no such group')}: pass the parent's own architecture"
                )
        return traced, groups

    def _resize_head(self, model: nn.Module) -> None:
        if self.head_layer is not None:
            try:
                head = linear_head(model, self.head_layer)
            except (NNSError, AttributeError) as error:
                raise SubnetError(f"the parent has no head {self.head_layer!r} as the subnet's: {error}") from error
            resize_head(head, len(self.outputs), f"{self.head_layer}.bias" in self.weights)

    def _load(self, model: nn.Module) -> None:
        expected = {name: list(value.shape) for name, value in model.state_dict().items()}
        found = {name: list(value.shape) for name, value in self.weights.items()}
        for name in [*expected, *(name for name in found if name not in expected)]:
            if expected.get(name) != found.get(name):
                raise SubnetError(
                    f"the subnet does not fit the parent: {name!r} is {found.get(name, 'missing')} in the subnet and "
                    f"{expected.get(name, 'missing')} in the parent cut down to it"
                )
        model.load_state_dict(dict(self.weights))


def _untied(model: nn.Module) -> nn.Module:
    """Give each name of a shared parameter a parameter of its own, in place: removal cuts each by itself."""
    seen = set()
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None and id(value) in seen:
                setattr(module, name, nn.Parameter(value.detach().clone(), value.requires_grad))
            seen.add(id(value))
    return model


def _origins(traced: TracedModel, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each weight of the small model the places that its numbers have in the wide one, flat.

    Every weight of a copy is numbered through before the host removes the units: whatever kinds of layers there are,
    the numbers that are left say where they come from.
    """
    model = traced.model.to("cpu", torch.float64)  # after tracing: a type may choose other operations
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.arange(value.numel(), dtype=value.dtype).reshape(value.shape))
    traced.keep(groups, kept)
    return {name: value.round().long() for name, value in model.state_dict().items() if value.is_floating_point()}


def _scatter(model: nn.Module, weights: Mapping[str, Tensor], origins: Mapping[str, Tensor]) -> None:
    """Write the weights of a small model where they came from, and zeros elsewhere into parameters, in place."""
    parameters = {name for name, _ in model.named_parameters()}
    state = model.state_dict()
    if state.keys() != weights.keys():
        wrong = sorted(state.keys() ^ weights.keys())
        raise SubnetError(f"the subnet does not fit the parent: {', '.join(wrong[:3])} is in one of them only")
    with torch.no_grad():
        for name, value in state.items():
            small = weights[name].to(value)
            places = origins.get(name)
            if small.shape == value.shape and places is None:
                value.copy_(small)
                continue
            if places is None or places.shape != small.shape:
                raise SubnetError(
                    f"the subnet does not fit the parent: {name!r} is {list(small.shape)} in the subnet and "
                    f"{None if places is None else list(places.shape)} in the parent cut down to it"
                )
            wide = torch.zeros_like(value) if name in parameters else value.clone()
            wide.reshape(-1)[places.to(value.device).flatten()] = small.flatten()
            value.copy_(wide)
