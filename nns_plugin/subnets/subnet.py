"""Label subnets: the kept units and labels of a parent with their weights, and the models made from them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nns_plugin.backends import TracedModel, find_backend
from nns_plugin.errors import NNSError, SubnetError
from nns_plugin.models.comparison import same_outputs
from nns_plugin.models.fingerprint import digest, fingerprint
from nns_plugin.models.inputs import device_of, inputs_like, kinds_of
from nns_plugin.models.preserve import copied
from nns_plugin.subnets.content import SubnetContent
from nns_plugin.subnets.extraction import Extraction
from nns_plugin.subnets.file import load, save
from nns_plugin.subnets.head import linear_head, resize_head
from nns_plugin.subnets.masking import origins, scatter, untied
from nns_plugin.subnets.provenance import Provenance
from nns_plugin.units import UnitGroup


class InexactMaskWarning(UserWarning):
    """The masked model and the small one differ, because some units pass a norm over units."""


@dataclass(frozen=True, eq=False)
class Subnet(SubnetContent):
    """The part of a parent model that keeps some labels; see :class:`nns_plugin.subnets.content.SubnetContent`."""

    @classmethod
    def of(cls, extraction: Extraction, provenance: Provenance) -> Subnet:
        """The subnet of an extraction.

        Raises:
            SubnetError: If the model has state that cannot be stored.
        """
        sizes = {group.name: group.size for group in extraction.groups if group.name in extraction.kept}
        state = extraction.model.state_dict()
        foreign = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if foreign:
            raise SubnetError(
                f"the model's state has {', '.join(foreign[:3])}, which is not a tensor and cannot be stored"
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
            labels=extraction.labels,
            head_layer=extraction.head,
            weights=weights,
            inputs=kinds_of(extraction.example_inputs),
            provenance=provenance,
        )

    @property
    def output_names(self) -> tuple[str, ...]:
        """Name of each output."""
        return self.labels.output_names

    def materialise(self, parent_factory: Callable[[], nn.Module], example_inputs: Any = None) -> nn.Module:
        """The small model.

        Args:
            parent_factory: Makes the parent's architecture; its weights do not matter.
            example_inputs: Inputs that the parent can run on, for tracing; by default made up with the shapes and types
                of those that the subnet was extracted with.

        Returns:
            The small model, in evaluation mode.

        Raises:
            SubnetError: If the factory makes another architecture than the subnet was extracted from.
        """
        made = parent_factory()
        if not isinstance(made, nn.Module):
            raise SubnetError(f"the parent factory returned a {type(made).__name__}; expected a torch module")
        model = copied(made)  # the factory may return a model that is in use
        self._resize_head(model)
        traced, groups = self._traced(model, example_inputs)
        traced.keep(groups, self.kept)
        self._load(model)
        return model.eval()

    def mask(self, parent: nn.Module, example_inputs: Any = None) -> nn.Module:
        """The parent with everything but the subnet zeroed: the paper's form.

        Its outputs are those of the small model, except where units pass a norm over units (LayerNorm, GroupNorm,
        RMSNorm), because such a norm depends on how many there are. Both models run for comparison.

        Args:
            parent: The model that the subnet was extracted from; left as it is.
            example_inputs: See :meth:`materialise`.

        Returns:
            A masked copy with the subnet's weights, as wide as the parent except for a head that was shrunk, in
            evaluation mode.

        Raises:
            SubnetError: If the model is not the parent.

        Warns:
            InexactMaskWarning: If outputs differ; it names the groups.
        """
        masked = self.masked_unchecked(parent, example_inputs)
        inputs = inputs_like(self.inputs) if example_inputs is None else example_inputs
        if not same_outputs(self.materialise(lambda: parent, example_inputs), masked, inputs):
            exempt = [name for name in self.kept if self._mixes(parent, name, inputs)] or list(self.kept)
            warnings.warn(
                f"the masked model differs from the small one at {', '.join(exempt)}: the layer that reads these units "
                "(such as a norm over units) also sees the units at zero",
                InexactMaskWarning,
                stacklevel=2,
            )
        return masked

    def masked_unchecked(self, parent: nn.Module, example_inputs: Any = None) -> nn.Module:
        """The same as :meth:`mask`, without comparing outputs: for callers that do so themselves."""
        self._check_parent(parent)
        masked = untied(copied(parent))
        self._resize_head(masked)
        traced, groups = self._traced(copied(masked), example_inputs)
        scatter(masked, self.weights, origins(traced, groups, self.kept))
        return masked.eval()

    def _mixes(self, parent: nn.Module, name: str, inputs: Any) -> bool:
        """Whether units of one group at zero change what the others do."""
        kept = {name: self.kept[name]}
        traced, groups = self._traced(copied(parent), inputs)
        traced.keep(groups, kept)
        masked = untied(copied(parent))
        scatter(masked, traced.model.state_dict(), origins(*self._traced(copied(masked), inputs), kept))
        return not same_outputs(traced.model, masked, inputs)

    def pruning_history(self, parent: nn.Module, example_inputs: Any = None) -> list[tuple[str, bool, list[int]]]:
        """What was removed, in the format of torch-pruning's ``DependencyGraph.load_pruning_history``.

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
        return save(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Subnet:
        """Read a file that :meth:`save` wrote.

        Raises:
            SubnetError: If the file is missing, damaged or not a subnet's.
        """
        return cls(**vars(load(Path(path))))

    def _check_parent(self, parent: nn.Module) -> None:
        found = digest(fingerprint(parent))
        if found != self.provenance.parent:
            raise SubnetError(
                f"the model's weights have the fingerprint {found}, those of the subnet's parent "
                f"{self.provenance.parent}: pass the parent as it was when the subnet was extracted"
            )

    def _traced(self, model: nn.Module, example_inputs: Any) -> tuple[TracedModel, tuple[UnitGroup, ...]]:
        """The traced model, and its groups."""
        inputs = inputs_like(self.inputs, device_of(model)) if example_inputs is None else example_inputs
        traced = find_backend()(model, inputs)
        groups = traced.groups(self.provenance.ignored_layers, checked=False)
        found = {group.name: group.size for group in groups}
        for name, size in self.sizes.items():
            if found.get(name) != size:
                raise SubnetError(
                    f"the subnet was extracted from a parent whose group {name!r} has {size} units; this one has "
                    f"{found.get(name, 'no such group')}: pass the parent's own architecture"
                )
        return traced, groups

    def _resize_head(self, model: nn.Module) -> None:
        if self.head_layer is not None:
            try:
                head = linear_head(model, self.head_layer)
            except (NNSError, AttributeError) as error:
                raise SubnetError(f"the parent has no such head {self.head_layer!r} as the subnet: {error}") from error
            resize_head(head, len(self.labels.outputs), f"{self.head_layer}.bias" in self.weights)

    def _load(self, model: nn.Module) -> None:
        expected = {name: list(value.shape) for name, value in model.state_dict().items()}
        found = {name: list(value.shape) for name, value in self.weights.items()}
        for name in [*expected, *(name for name in found if name not in expected)]:
            if expected.get(name) != found.get(name):
                raise SubnetError(
                    f"the subnet does not fit the parent: {name!r} is {found.get(name, 'missing')} in the subnet and "
                    f"{expected.get(name, 'missing')} in the parent narrowed to it"
                )
        model.load_state_dict(dict(self.weights))
