"""Models inside NNI's wrappers: plain copies of them, and the masks that the wrappers hold."""

from __future__ import annotations

from nni.compression.base.target_space import TargetType
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn

from nns_plugin.circle import copied


def wrappers_of(model: nn.Module) -> dict[str, ModuleWrapper]:
    """NNI's wrappers by name of the module that they wrap."""
    found = {name: getattr(module, "_nni_wrapper", None) for name, module in model.named_modules()}
    return {name: wrapper for name, wrapper in found.items() if isinstance(wrapper, ModuleWrapper)}


def held_masks(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Masks of parameters, by name of the module and of the parameter."""
    return {
        name: {
            target: space.mask.detach().cpu()
            for target, space in wrapper.pruning_target_spaces.items()
            if space.type is TargetType.PARAMETER and space.mask is not None
        }
        for name, wrapper in wrappers_of(model).items()
    }


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy without NNI's wrappers and masks: parameters have the names they had, and the values behind the masks.

    NNI's own ``unwrap_model`` makes new parameters, which an optimizer would not know.
    """
    twin = copied(model)
    for wrapper in wrappers_of(twin).values():
        wrapper.unwrap()
        if getattr(wrapper.module_forward, "__func__", None) is type(wrapper.module).forward:
            vars(wrapper.module).pop("forward", None)  # NNI leaves the bound method there
    return twin
