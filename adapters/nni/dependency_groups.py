"""Dependency groups for NNI's config lists, derived from unit groups."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from nni.compression.base.config import select_modules_by_config, trans_legacy_config_list
from nni.compression.base.setting import PruningSetting, canonicalize_settings
from torch import Tensor, nn

from nns_plugin.adapters.nni.wrappers import check_config_list, check_unwrapped
from nns_plugin.adapters.torch_pruning.graph import build_graph
from nns_plugin.adapters.torch_pruning.traced_units import TracedUnits, traced_units
from nns_plugin.errors import PruningError
from nns_plugin.models.layers import TransposedConvolution, by_output, out_axis
from nns_plugin.units import Port

Config = dict[str, Any]
SPARSE = ("sparse_ratio", "sparse_threshold", "max_sparse_ratio", "min_sparse_ratio", "global_group_id")
OURS = (*SPARSE, "dependency_group_id", "internal_metric_block")  # settings that aligned layers lack
WHOLE = ("default", "out_channel", "in_channel")


class UngroupedLayersWarning(UserWarning):
    """Layers share units, but the config list cannot give them one mask."""


def with_dependency_groups(
    config_list: Sequence[Mapping[str, Any]], model: nn.Module, example_inputs: Any
) -> list[Config]:
    """Complete a config list so that layers that share units get one mask, for NNI's pruners and for ours.

    Layers that write the same units, as in a residual stream, share a ``dependency_group_id``; where NNI would ignore
    it, beside a ``global_group_id`` or a ``sparse_threshold``, the later layers are aligned with the first one instead.
    Units that a grouped convolution couples get an ``internal_metric_block``. Layers that pass units on, batch norms
    and depthwise convolutions, are aligned with their producers, so that masked units are silent: a norm would turn
    them into constants. Transposed convolutions, of which NNI would prune the wrong axis, get a ``granularity``.

    Args:
        config_list: As for NNI's pruners.
        model: The model; not inside NNI's wrappers.
        example_inputs: Inputs that the model can run on.

    Returns:
        A config for each layer, in the order of the model.

    Raises:
        PruningError: If layers that share units ask for different sparsity.
        GroupError: If the model cannot be traced.

    Warns:
        UngroupedLayersWarning: If layers share units with others that the list leaves out, or share only some of them.
    """
    check_unwrapped(model)
    check_config_list(model, config_list)
    return grouped_configs(config_list, model, traced_units(build_graph(model, example_inputs)))


def grouped_configs(config_list: Sequence[Mapping[str, Any]], model: nn.Module, units: TracedUnits) -> list[Config]:
    """The same, for a model that is traced already."""
    order = [name for name, _ in model.named_modules()]
    configs = _one_each(config_list, model)
    settings = {name: _settings(model.get_submodule(name), config) for name, config in configs.items()}
    active = {name for name, targets in settings.items() if _is_active(targets.get("weight", {}))}
    for name in active:
        _with_own_axis(model.get_submodule(name), configs[name], settings[name]["weight"])
    for group in units.groups:
        found = sorted(units.carriers.get(group.name, ()), key=lambda port: order.index(port.name))
        producers = {port.name for port in group.producers}
        alike = _alike(model, found)
        written = [layers for layers in alike if any(layer.name in producers & active for layer in layers)]
        if len(written) > 1:
            _warn(
                f"{' and '.join(repr(layers[0].name) for layers in written)} write the same units at different "
                "positions"
            )
        missing = [port.name for port in group.producers if port.name not in configs]
        if missing and producers & active:
            first = min(producers & active, key=order.index)
            _warn(f"{first!r} shares its units with {', '.join(missing)}, which the config list leaves out")
        for layers in alike:
            chosen = [layer for layer in layers if layer.name in active]
            if not chosen:
                continue
            leader = next((layer for layer in chosen if layer.name in producers), chosen[0])
            members = [leader] + [
                layer
                for layer in chosen
                if layer is not leader and layer.name in producers and layer.shape == leader.shape
            ]
            split = [layer.name for layer in chosen if settings[layer.name]["weight"].get("granularity") not in WHOLE]
            if split:
                if len(layers) > 1:
                    _warn(f"{split[0]!r} has a granularity of its own, and shares its units with other layers")
                continue
            _join(group.name, leader, members, model, configs, settings)
            for layer in layers:
                if layer not in members and type(model.get_submodule(layer.name)).__name__ in PruningSetting.registry:
                    config = configs.get(layer.name, {"op_names": [layer.name]})
                    configs[layer.name] = _aligned(config, leader, model.get_submodule(layer.name))
        whole = {layer.name for layers in alike for layer in layers}
        for port in found:
            if port.name in active and port.name not in whole:
                _warn(f"{port.name!r} shares only some of its units, those of group {group.name!r}")
    return [configs[name] for name in order if name in configs]


@dataclass(frozen=True, eq=False)
class GroupedLayer:
    """A layer whose out axis holds the units of one group.

    Attributes:
        name: Name of the module.
        unit: ``[n]``, the unit of each position.
        shape: Shape of NNI's metric of the layer's weight.
        axis: The axis of the weight that counts the positions.
    """

    name: str
    unit: Tensor
    shape: tuple[int, ...]
    axis: int

    @property
    def blocks(self) -> int:
        """Number of positions of a unit, if they lie in equal blocks side by side; 1 otherwise."""
        count = self.unit.numel() // self.unit.unique().numel()
        parts = self.unit.reshape(count, -1) if self.unit.numel() % count == 0 else self.unit[None]
        return count if bool((parts == parts[0]).all()) else 1


def _one_each(config_list: Sequence[Mapping[str, Any]], model: nn.Module) -> dict[str, Config]:
    """A config for each selected layer; the first that selects it counts, as in NNI."""
    found: dict[str, Config] = {}
    for config in trans_legacy_config_list([deepcopy(dict(config)) for config in config_list]):
        modules, public, _ = select_modules_by_config(model, config)
        for name in modules:
            found.setdefault(name, {"op_names": [name], **deepcopy(public)})
    return found


def _settings(module: nn.Module, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """NNI's settings of a layer, by target."""
    public = {key: value for key, value in config.items() if key != "op_names"}
    try:
        found: dict[str, dict[str, Any]] = canonicalize_settings(module, public, "pruning")
    except (AssertionError, KeyError) as error:
        raise PruningError(f"NNI cannot prune {config['op_names'][0]!r}, a {type(module).__name__}: {error}") from error
    return found


def _with_own_axis(module: nn.Module, config: Config, setting: Mapping[str, Any]) -> None:
    """Have NNI prune axis 1 of a weight whose outputs lie there; its default is axis 0."""
    if out_axis(module) and setting.get("granularity") == "default":
        targets = config.setdefault("target_settings", {})
        targets.setdefault("weight", {})["granularity"] = "in_channel"
        if isinstance(module, TransposedConvolution):
            own = {"module_name": None, "target_name": "weight", "dims": [1]}
            targets.setdefault("bias", {}).setdefault("align", own)


def _is_active(setting: Mapping[str, Any]) -> bool:
    return setting.get("sparse_ratio") is not None or setting.get("sparse_threshold") is not None


def _alike(model: nn.Module, ports: Sequence[Port]) -> list[list[GroupedLayer]]:
    """Layers whose whole out axis belongs to the group; those with the same units at the same positions together."""
    found: list[list[GroupedLayer]] = []
    for port in ports:
        module = model.get_submodule(port.name)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or len(by_output(module, weight)) != port.index.numel():
            continue
        axis = out_axis(module)
        shape = tuple(length if place == axis else 1 for place, length in enumerate(weight.shape))
        layer = GroupedLayer(port.name, port.unit[port.index.argsort()], shape, axis)
        for layers in found:
            if torch.equal(layers[0].unit, layer.unit):
                layers.append(layer)
                break
        else:
            found.append([layer])
    return found


def _join(
    group: str,
    leader: GroupedLayer,
    members: Sequence[GroupedLayer],
    model: nn.Module,
    configs: dict[str, Config],
    settings: Mapping[str, Any],
) -> None:
    """Give layers one mask: by an id, or by aligning all others with the leader."""
    wanted = {layer.name: {key: settings[layer.name]["weight"].get(key) for key in SPARSE} for layer in members}
    for layer in members:
        if wanted[layer.name] != wanted[leader.name]:
            raise PruningError(
                f"{leader.name!r} and {layer.name!r} share their units, but ask for "
                f"{_described(wanted[leader.name])} and {_described(wanted[layer.name])}; ask for the same of both"
            )
    ranked = wanted[leader.name]["global_group_id"] is not None or wanted[leader.name]["sparse_ratio"] is None
    for layer in members:
        if ranked:
            if layer is not leader:
                configs[layer.name] = _aligned(configs[layer.name], leader, model.get_submodule(layer.name))
            else:  # NNI would apply it alone
                for place in (configs[layer.name], configs[layer.name].get("target_settings", {}).get("weight", {})):
                    place.pop("dependency_group_id", None)
        elif len(members) > 1 or leader.blocks > 1:
            setting = configs[layer.name].setdefault("target_settings", {}).setdefault("weight", {})
            setting["dependency_group_id"] = f"units of {group}"
            if leader.blocks > 1:
                setting["internal_metric_block"] = leader.blocks


def _aligned(config: Mapping[str, Any], leader: GroupedLayer, module: nn.Module) -> Config:
    """A config that copies the masks of the leader."""
    named = {key: deepcopy(value) for key, value in config.items() if key not in (*OURS, "target_names")}
    settings = named.setdefault("target_settings", {})
    for target in PruningSetting.registry[type(module).__name__]:
        kept = {key: value for key, value in settings.get(target, {}).items() if key not in OURS}
        settings[target] = {
            **kept,
            "align": {"module_name": leader.name, "target_name": "weight", "dims": [leader.axis]},
        }
    return named


def _described(wanted: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in wanted.items() if value is not None) or "nothing"


def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason}; their masks may differ, and then units are not removed", UngroupedLayersWarning, stacklevel=3
    )
