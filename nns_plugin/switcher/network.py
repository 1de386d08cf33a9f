"""The switcher network: reads the weights of another network and computes a factor for each of its units."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from nns_plugin.backends import Backend
from nns_plugin.errors import PruningError, SwitchError
from nns_plugin.models.layers import Convolution, by_output, weight_key, weight_of
from nns_plugin.models.preserve import copied
from nns_plugin.switcher.row_network import RowNetwork, SwitcherArchitecture
from nns_plugin.switcher.scaling_factors import ScalingFactors
from nns_plugin.switcher.switches import Switch, UnswitchedWarning, find_switches, owns_weight
from nns_plugin.switcher.weight_count import WeightCount
from nns_plugin.units import Port

Form = Literal["competing", "literal"]

EPSILON = 1e-5
LOW = -3.0  # initial threshold in standard deviations, with a budget


class AllOffWarning(UserWarning):
    """All factors of a switch were 0; the strongest one was kept."""


class SwitcherNetwork(nn.Module):
    """Computes factors for the units of a network from its weights: 0 prunes, below 1 weakens, from 1 on strengthens.

    The weights of linear layers, with one row per in-position and zero-padded to one size, are the channels of one
    image. The filters of convolutions are the rows of another image: a learned map per layer reduces its filters to
    rows of one width, and the layers are stacked. Each image passes through an encoder (convolution, ReLU, max-pool)
    and a decoder (deconvolution, concatenation with the encoder's features, which a convolution over whole rows has
    reduced to width 1). The output for a row is the factor of its in-position or filter, averaged where a unit has
    several.

    Args:
        model: The network whose weights it will read; only their shapes are used here.
        example_inputs: Inputs that it can run on.
        layers: Names of layers; only what these read gets factors. The cost grows with their weights: in training,
            about ``24 * channels`` bytes for each of the rows x columns of the padded image of the linear layers.
        form: ``"literal"`` is the paper's: raw weights in, ReLU out. ``"competing"`` standardises the weights of each
            layer and the outputs of each switch, subtracts a learned threshold before the ReLU, and divides by the
            mean: the factors of a switch compete, so that they can neither all die nor all grow.
        budget: Share of the weights to remove, in [0, 1), for ``"competing"``: the thresholds start low, so that nearly
            everything is on, and are raised together, for all switches, until the budget is reached; the buffer
            ``progress`` says how much of it applies. ``None`` leaves it to the learned thresholds, which start where
            about half of each switch is off.
        architecture: The size of the switcher.
        backend: Traces the model; torch-pruning by default.

    Raises:
        PruningError: If an option is out of range or nothing in the model can get factors.

    Source:
        Han et al., "Mining the Knowledge of Weights for Optimizing Neural Network Structures".
    """

    progress: Tensor

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        layers: Sequence[str] | None = None,
        *,
        form: Form = "competing",
        budget: float | None = 0.75,
        architecture: SwitcherArchitecture | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        if form not in get_args(Form):
            raise PruningError(f"form is {form!r}; it must be one of {', '.join(get_args(Form))}")
        if budget is not None and (form != "competing" or not 0 <= budget < 1):
            raise PruningError(
                f"budget is {budget} and form is {form!r}; expected a share in [0, 1), or None for form 'literal'"
            )
        architecture = architecture or SwitcherArchitecture()
        self.form, self.budget = form, budget
        switches = find_switches(model, example_inputs, layers, backend=backend)
        self._sources = {switch.name: found for switch in switches if (found := _sources(model, switch))}
        self.switches = tuple(switch for switch in switches if switch.name in self._sources)
        unread = [switch.name for switch in switches if switch.name not in self._sources]
        if unread:
            warnings.warn(
                f"the units of {', '.join(unread)} get no factor: no layer that writes or reads them has a weight of "
                "its own that distinguishes them",
                UnswitchedWarning,
                stacklevel=2,
            )
        if not self.switches:
            raise PruningError("there is nothing to scale: no weight distinguishes any units")
        self._count = WeightCount(model, self.switches)
        removable = self._count.removed({switch.name: torch.arange(switch.size) == 0 for switch in self.switches})
        if budget is not None and budget > removable:
            raise PruningError(
                f"budget is {budget:.3f} of the model's weights, but only {removable:.3f} can be removed through units "
                "that get factors; choose a lower budget or more layers"
            )
        used = [source for sources in self._sources.values() for source in sources]
        linear = dict.fromkeys(source.layer for source in used if not source.filters)
        filters = dict.fromkeys(source.layer for source in used if source.filters)
        # Layers without values: only how their weights are laid out.
        self._linear, self._filters = ({name: _skeleton(model, name) for name in names} for names in (linear, filters))
        normed = form == "competing"
        self.connected: RowNetwork | None = None
        if linear:
            shapes = [weight_of(layer).shape for layer in self._linear.values()]
            size = max(shape[1] for shape in shapes), max(shape[0] for shape in shapes)
            self.connected = RowNetwork(len(shapes), *size, architecture, normed)
        self.reduce = nn.ModuleList()
        self.convolutional: RowNetwork | None = None
        if filters:
            rows = [by_output(layer, weight_of(layer)).flatten(1).shape for layer in self._filters.values()]
            self.reduce.extend(nn.Linear(length, architecture.width) for _, length in rows)
            height = sum(count for count, _ in rows)
            self.convolutional = RowNetwork(1, height, architecture.width, architecture, normed)
        start = 0.0 if budget is None else LOW
        self.thresholds = nn.Parameter(torch.full((len(self.switches),), start)) if normed else None
        self.register_buffer("progress", torch.ones(()))
        self.to(next(model.parameters()).device)

    def forward(self, weights: nn.Module | Mapping[str, Tensor]) -> ScalingFactors:
        """Compute the factors of every switch, finite and not negative.

        Args:
            weights: The network, or its parameters by name.

        Raises:
            SwitchError: If weights are missing or have other shapes than those of the network for which it was built.

        Warns:
            AllOffWarning: If all factors of a switch would be 0; the strongest one becomes 1.
        """
        values = dict(weights.named_parameters()) if isinstance(weights, nn.Module) else weights
        raw = self._raw(values)
        if self.form == "literal":
            return ScalingFactors(self.switches, {name: self._alive(values, name) for name, values in raw.items()})
        assert self.thresholds is not None
        levels = {
            switch.name: _standardised(raw[switch.name]) - threshold
            for switch, threshold in zip(self.switches, self.thresholds, strict=True)
        }
        share = 0.0 if self.budget is None else self.budget * (1 - (1 - float(self.progress)) ** 3)
        raised = self._count.offset(levels, share)
        found = {name: self._alive(level - raised, name) for name, level in levels.items()}
        return ScalingFactors(self.switches, found)

    @property
    def reads(self) -> frozenset[str]:
        """Names of the parameters that it reads."""
        return frozenset(map(weight_key, (*self._linear, *self._filters)))

    def removed(self, factors: ScalingFactors) -> float:
        """Return the share of the weights of linear and convolutional layers that factors at 0 remove.

        Where :func:`~nns_plugin.switcher.removal.switch_off` cannot remove units exactly, as before a LayerNorm,
        it warns and removes less.
        """
        return self._count.removed({name: (values > 0).cpu() for name, values in factors.items()})

    def _alive(self, level: Tensor, name: str) -> Tensor:
        """Apply the ReLU, and divide by the mean if factors compete; if nothing is above 0, the strongest becomes 1."""
        factors = level.relu()
        if bool((factors > 0).any()):
            return factors if self.form == "literal" else factors / factors.mean().clamp_min(1e-12)
        if len(level) > 1:
            warnings.warn(f"all factors of {name!r} are 0; the strongest one is kept", AllOffWarning, stacklevel=3)
        strongest = torch.zeros_like(level)
        strongest[level.detach().argmax()] = 1
        return strongest * (1 + level - level.detach())  # 1, with a gradient, so that others can come back

    def _raw(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs of the networks for each switch."""
        rows: dict[tuple[str, bool], Tensor] = {}
        if self.connected is not None:
            matrices = [self._weight(weights, name, layer).T for name, layer in self._linear.items()]
            high, wide = self.connected.size
            padded = [
                nn.functional.pad(matrix, (0, wide - matrix.shape[1], 0, high - matrix.shape[0])) for matrix in matrices
            ]
            outputs = self.connected(torch.stack(padded))
            for name, matrix, output in zip(self._linear, matrices, outputs, strict=True):
                rows[name, False] = output[: len(matrix)]
        if self.convolutional is not None:
            kernels = [
                by_output(layer, self._weight(weights, name, layer)).flatten(1) for name, layer in self._filters.items()
            ]
            reduced = [layer(kernel) for layer, kernel in zip(self.reduce, kernels, strict=True)]
            parts = self.convolutional(torch.cat(reduced)[None])[0].split([len(kernel) for kernel in kernels])
            for name, part in zip(self._filters, parts, strict=True):
                rows[name, True] = part
        return {
            switch.name: _averaged(switch.size, [(s, rows[s.layer, s.filters]) for s in self._sources[switch.name]])
            for switch in self.switches
        }

    def _weight(self, weights: Mapping[str, Tensor], name: str, layer: nn.Module) -> Tensor:
        """Return a layer's weight, checked and, if factors compete, standardised."""
        key = weight_key(name)
        value, expected = weights.get(key), list(weight_of(layer).shape)
        if value is None or list(value.shape) != expected:
            found = "missing" if value is None else list(value.shape)
            raise SwitchError(f"{key!r} is {found}; the switcher was built for {expected}: build it for this model")
        value = value.to(self.progress.dtype)
        return _standardised(value) if self.form == "competing" else value


@dataclass(frozen=True, eq=False)
class _Source:
    """Rows of a layer's weight that belong to the units of a switch.

    Attributes:
        layer: Name of the layer.
        filters: Whether the rows are out-positions (filters), which write the units, or in-positions, which read them.
        port: Which row belongs to which unit.
    """

    layer: str
    filters: bool
    port: Port


def _sources(model: nn.Module, switch: Switch) -> list[_Source]:
    """Return filters that write the units and linear layers that read each at one position; else linear layers."""
    kinds = {port: model.get_submodule(port.name) for port in (*switch.producers, *switch.consumers)}
    own = [port for port in switch.producers if owns_weight(model, port.name)]
    found = [_Source(port.name, True, port) for port in own if isinstance(kinds[port], Convolution)]
    reading = [_Source(port.name, False, port) for port in switch.consumers if isinstance(kinds[port], nn.Linear)]
    found += [source for source in reading if source.port.unit.unique().numel() == source.port.unit.numel()]
    writing = [_Source(port.name, True, port) for port in own if isinstance(kinds[port], nn.Linear)]
    return found or reading or writing


def _skeleton(model: nn.Module, name: str) -> nn.Module:
    layer = copied(model.get_submodule(name))
    return layer.to("meta")


def _averaged(size: int, found: Sequence[tuple[_Source, Tensor]]) -> Tensor:
    """Return the mean over the rows of each unit, ``[size]``."""
    values = torch.cat([rows[source.port.index.to(rows.device)] for source, rows in found])
    units = torch.cat([source.port.unit for source, _ in found]).to(values.device)
    sums = values.new_zeros(size).index_add(0, units, values)
    return sums / torch.bincount(units, minlength=size).clamp_min(1)


def _standardised(values: Tensor) -> Tensor:
    if values.numel() < 2:
        return values - values
    return (values - values.mean()) / (values.std() + EPSILON)
