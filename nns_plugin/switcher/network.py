"""The switcher network: reads the weights of another network, and gives a factor for each of its units."""

from __future__ import annotations

import math
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
from nns_plugin.switcher.scaling_factors import ScalingFactors
from nns_plugin.switcher.switches import Switch, UnswitchedWarning, find_switches, owns_weight
from nns_plugin.switcher.weight_count import WeightCount
from nns_plugin.units import Port

Form = Literal["competing", "literal"]

EPSILON = 1e-5
LOW = -3.0  # standard deviations


class AllOffWarning(UserWarning):
    """All factors of a switch were 0; its strongest one was kept."""


class SwitcherNetwork(nn.Module):
    """Factors for the units of a network, out of its weights: 0 prunes, below 1 weakens, from 1 on strengthens.

    The weights of linear layers, a row for each in-position and padded with zeros to one size, are the channels of one
    image. The filters of convolutions are the rows of another: a learned map of each layer reduces its filters to rows
    of one width, and the layers stand below each other. Each image passes an encoder (convolution, ReLU, max-pool)
    and a decoder (deconvolution, concatenation with the encoder's features, which a convolution over whole rows reduced
    to width 1). What comes out for a row is the factor of the in-position or filter, averaged where a unit has several.

    Args:
        model: The network whose weights are to be read; only shapes and initial statistics are taken.
        example_inputs: Inputs that it can run on.
        layers: Names of layers; only what these read gets factors. The cost grows with their weights: in training,
            about ``24 * channels`` bytes for each of the rows x columns of the padded image of the linear layers.
        form: ``"literal"`` is the paper's: raw weights in, ReLU out. ``"competing"`` (default) standardises the weights
            of each layer and the outputs of each switch, subtracts a learned threshold before the ReLU, and divides by
            the mean: factors of a switch compete, and neither all die nor all grow.
        budget: Share of the weights to remove, in [0, 1), for ``"competing"``: the thresholds start low, so that nearly
            all is on, and are raised together, for all switches, until so many are gone; ``progress`` says how far.
            ``None`` leaves it to the learned thresholds, which start where about half of each switch is off.
        channels: Of the first block; each further one has twice as many.
        depth: Number of blocks, each of which halves the image; fewer for small ones.
        width: Of the rows that filters are reduced to.
        backend: Traces the model; torch-pruning by default.

    Raises:
        PruningError: If an option is out of range, or nothing in the model can get factors.

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
        channels: int = 4,
        depth: int = 3,
        width: int = 64,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        if form not in get_args(Form):
            raise PruningError(f"form is {form!r}; it must be one of {', '.join(get_args(Form))}")
        if budget is not None and (form != "competing" or not 0 <= budget < 1):
            raise PruningError(
                f"budget is {budget} and form {form!r}; expected a share in [0, 1), and None for 'literal'"
            )
        if min(channels, depth, width) < 1:
            raise PruningError(f"channels, depth and width are {channels}, {depth} and {width}; expected at least 1")
        self.form, self.budget = form, budget
        switches = find_switches(model, example_inputs, layers, backend=backend)
        self._sources = {switch.name: found for switch in switches if (found := _sources(model, switch))}
        self.switches = tuple(switch for switch in switches if switch.name in self._sources)
        unread = [switch.name for switch in switches if switch.name not in self._sources]
        if unread:
            warnings.warn(
                f"the units of {', '.join(unread)} get no factor: no layer that writes or reads them has a weight of "
                "its own that tells them apart",
                UnswitchedWarning,
                stacklevel=2,
            )
        if not self.switches:
            raise PruningError("there is nothing to scale: no weight tells of any unit")
        self._count = WeightCount(model, self.switches)
        most = self._count.removed({switch.name: torch.arange(switch.size) == 0 for switch in self.switches})
        if budget is not None and budget > most:
            raise PruningError(
                f"budget is {budget:.3f} of the model's weights, but what gets factors can remove {most:.3f} at most; "
                "give a lower budget, or more layers"
            )
        used = [source for sources in self._sources.values() for source in sources]
        linear = dict.fromkeys(source.layer for source in used if not source.filters)
        filters = dict.fromkeys(source.layer for source in used if source.filters)
        # Without values: how weights are laid out.
        self._linear, self._filters = ({name: _skeleton(model, name) for name in names} for names in (linear, filters))
        normed = form == "competing"
        self.connected: RowNetwork | None = None
        if linear:
            shapes = [weight_of(layer).shape for layer in self._linear.values()]
            size = max(shape[1] for shape in shapes), max(shape[0] for shape in shapes)
            self.connected = RowNetwork(len(shapes), *size, channels, depth, normed)
        self.reduce = nn.ModuleList()
        self.convolutional: RowNetwork | None = None
        if filters:
            rows = [by_output(layer, weight_of(layer)).flatten(1).shape for layer in self._filters.values()]
            self.reduce.extend(nn.Linear(length, width) for _, length in rows)
            self.convolutional = RowNetwork(1, sum(count for count, _ in rows), width, channels, depth, normed)
        start = 0.0 if budget is None else LOW
        self.thresholds = nn.Parameter(torch.full((len(self.switches),), start)) if normed else None
        self.register_buffer("progress", torch.ones(()))
        self.to(next(model.parameters()).device)

    def forward(self, weights: nn.Module | Mapping[str, Tensor]) -> ScalingFactors:
        """Factors of every switch, finite and not negative.

        Args:
            weights: The network, or its weights by name of the parameter.

        Raises:
            SwitchError: If weights are missing or of other shapes than those of the network it was built for.

        Warns:
            AllOffWarning: If all factors of a switch would be 0: the strongest one is kept.
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
        """Share of the weights of linear and convolutional layers between what is on and what is off.

        Where :func:`~nns_plugin.switcher.removal.switch_off` cannot remove units exactly, as under a LayerNorm,
        it warns and removes less.
        """
        return self._count.removed({name: (values > 0).cpu() for name, values in factors.items()})

    def _alive(self, level: Tensor, name: str) -> Tensor:
        """ReLU, and division by the mean if factors compete; where nothing is above 0, the strongest becomes 1."""
        factors = level.relu()
        if bool((factors > 0).any()):
            return factors if self.form == "literal" else factors / factors.mean().clamp_min(1e-12)
        if len(level) > 1:
            warnings.warn(f"all factors of {name!r} are 0; its strongest one is kept", AllOffWarning, stacklevel=3)
        strongest = torch.zeros_like(level)
        strongest[level.detach().argmax()] = 1
        return strongest * (1 + level - level.detach())  # 1, with a gradient: others can come back

    def _raw(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the networks give for each switch."""
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
        """A layer's weight, checked and standardised."""
        key = weight_key(name)
        value, expected = weights.get(key), list(weight_of(layer).shape)
        if value is None or list(value.shape) != expected:
            found = "missing" if value is None else list(value.shape)
            raise SwitchError(
                f"{key!r} is {found}; the switcher was built for {expected}: build it for this very model"
            )
        value = value.to(self.progress.dtype)
        return _standardised(value) if self.form == "competing" else value


@dataclass(frozen=True, eq=False)
class _Source:
    """Rows of a layer's weight that tell of the units of a switch.

    Attributes:
        layer: Name of the layer.
        filters: Whether the rows are a convolution's filters, which write the units; or in-positions, which read them.
        port: Which row tells of which unit.
    """

    layer: str
    filters: bool
    port: Port


def _sources(model: nn.Module, switch: Switch) -> list[_Source]:
    """Filters that write the units, and linear layers that read each of them at one position; or any that read them."""
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
    """Means ``[size]`` of the rows of each unit."""
    values = torch.cat([rows[source.port.index.to(rows.device)] for source, rows in found])
    units = torch.cat([source.port.unit for source, _ in found]).to(values.device)
    sums = values.new_zeros(size).index_add(0, units, values)
    return sums / torch.bincount(units, minlength=size).clamp_min(1)


def _standardised(values: Tensor) -> Tensor:
    if values.numel() < 2:
        return values - values
    return (values - values.mean()) / (values.std() + EPSILON)


class RowNetwork(nn.Module):
    """One number for each row of an image, per channel: an encoder and a decoder with skips of width 1.

    Args:
        images: C channels.
        height: Rows.
        width: Columns.
        channels: Of the first block; each further one has twice as many.
        depth: Number of blocks, each of which halves the image; fewer where it is small.
        normed: Whether group norms follow the convolutions.
    """

    def __init__(self, images: int, height: int, width: int, channels: int, depth: int, normed: bool) -> None:
        super().__init__()
        self.size = height, width
        depth = min(depth, max(1, int(math.log2(max(1, min(height, width))))))
        step = 2**depth
        self._padding = -width % step, -height % step
        widths = [channels * 2**level for level in range(depth + 1)]
        columns = [(width + self._padding[0]) // 2**level for level in range(depth + 1)]
        into = [images, *widths]
        self.encoders = nn.ModuleList(_block(into[level], widths[level], (3, 3), normed) for level in range(depth + 1))
        self.rows = nn.ModuleList(nn.Conv2d(c, c, (1, w)) for c, w in zip(widths, columns, strict=True))
        self.raises = nn.ModuleList(
            nn.ConvTranspose2d(widths[level + 1], widths[level], (2, 1), (2, 1)) for level in range(depth)
        )
        self.decoders = nn.ModuleList(_block(2 * c, c, (3, 1), normed) for c in widths[:-1])
        self.head = nn.Conv2d(widths[0], images, 1)

    def forward(self, image: Tensor) -> Tensor:
        """``[C, height]`` out of ``[C, height, width]``."""
        features = nn.functional.pad(image, (0, self._padding[0], 0, self._padding[1]))[None]
        skips = []
        for level, (encoder, row) in enumerate(zip(self.encoders, self.rows, strict=True)):
            features = encoder(nn.functional.max_pool2d(features, 2) if level else features)
            skips.append(row(features))
        found = skips.pop()
        for up, decoder, skip in reversed(list(zip(self.raises, self.decoders, skips, strict=True))):
            found = decoder(torch.cat([skip, up(found)], 1))
        output: Tensor = self.head(found)[0, :, : image.shape[1], 0]
        return output


def _block(into: int, out: int, kernel: tuple[int, int], normed: bool) -> nn.Sequential:
    block = nn.Sequential(nn.Conv2d(into, out, kernel, padding=(kernel[0] // 2, kernel[1] // 2)))
    if normed:
        block.append(nn.GroupNorm(math.gcd(out, 4), out))
    return block.append(nn.ReLU())
