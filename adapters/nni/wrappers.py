"""NNI's wrappers and config lists: checks, the masks that wrappers hold, and plain copies of wrapped models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nni.compression.base.config import select_modules_by_config, trans_legacy_config_list
from nni.compression.base.target_space import TargetType
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn

from nns_plugin.errors import PruningError
from nns_plugin.models.preserve import copied

SELECTORS = ("op_names", "op_types", "op_names_re", "exclude_op_names", "exclude_op_types", "exclude_op_names_re")


def wrappers_of(model: nn.Module) -> dict[str, ModuleWrapper]:
    """NNI's wrappers, by name of the wrapped module."""
    found = {name: getattr(module, "_nni_wrapper", None) for name, module in model.named_modules()}
    return {name: wrapper for name, wrapper in found.items() if isinstance(wrapper, ModuleWrapper)}


def check_unwrapped(model: nn.Module) -> None:
    """Refuse a model inside NNI's wrappers, which cannot be traced.

    Raises:
        PruningError: If a layer is wrapped.
    """
    if wrapped := list(wrappers_of(model)):
        raise PruningError(
            f"{len(wrapped)} layers of the model are inside NNI's wrappers, such as {wrapped[0]!r}; call "
            "unwrap_model() of the pruner that wrapped them, or start a new one by from_compressor(pruner, ...)"
        )


def held_masks(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The wrappers' masks of parameters, by name of the module and of the parameter."""
    return {
        name: {
            target: space.mask.detach().cpu()
            for target, space in wrapper.pruning_target_spaces.items()
            if space.type is TargetType.PARAMETER and space.mask is not None
        }
        for name, wrapper in wrappers_of(model).items()
    }


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy without NNI's wrappers and masks: parameters with their original names and unmasked values.

    NNI's own ``unwrap_model`` makes new parameters, which an optimizer does not know.
    """
    twin = copied(model)
    for wrapper in wrappers_of(twin).values():
        wrapper.unwrap()
        if getattr(wrapper.module_forward, "__func__", None) is type(wrapper.module).forward:
            vars(wrapper.module).pop("forward", None)  # NNI leaves the bound method there
    return twin


def check_config_list(model: nn.Module, config_list: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a malformed config list, or one that selects no layer.

    Raises:
        PruningError: If it is one.
    """
    if not isinstance(config_list, Sequence) or not all(isinstance(config, Mapping) for config in config_list):
        raise PruningError(f"config_list is {config_list!r}; expected a list of NNI's config dictionaries")
    known = {name for name, _ in model.named_modules()}
    selected = 0
    for config in trans_legacy_config_list([dict(config) for config in config_list]):
        for key in SELECTORS:
            if isinstance(config.get(key), str) or not isinstance(config.get(key, []), Sequence):
                raise PruningError(f"{key} is {config[key]!r}; expected a list")
        if unknown := [name for name in config.get("op_names") or () if name not in known]:
            raise PruningError(f"op_names has {unknown[0]!r}, which is not a module of the model")
        try:
            selected += len(select_modules_by_config(model, config)[0])
        except re.error as error:
            raise PruningError(f"op_names_re or exclude_op_names_re is not a regular expression: {error}") from error
    if not selected:
        types = sorted({type(module).__name__ for module in model.modules() if not list(module.children())})
        names = [name for name, module in model.named_modules() if name and not list(module.children())]
        more = ", ..." if len(names) > 8 else ""
        raise PruningError(
            f"the config list selects no layer; the model has layers of the types {', '.join(types)}, and of the names "
            f"{', '.join(names[:8])}{more}"
        )
