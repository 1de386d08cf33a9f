"""Hooks: the only place that registers them on modules, and always removes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

Hook = tuple[nn.Module, Literal["input", "output"], Callable[..., Any]]


@contextmanager
def hooked(*hooks: Hook) -> Iterator[None]:
    """Register hooks and remove them on leaving, also after an exception in the block or in a registration.

    Args:
        hooks: For each hook the module, ``"input"`` or ``"output"``, and a function. An input hook is called before the
            module's forward as ``function(x)``, an output hook after it as ``function(x, output)``, where ``x`` is the
            module's first positional argument, or else its keyword argument ``input``, or else ``None``. What an output
            hook returns replaces the output, unless it is ``None``; what an input hook returns is ignored.

    Raises:
        ValueError: If a hook is for something other than ``"input"`` or ``"output"``.

    Example:
        >>> import torch
        >>> seen = []
        >>> layer = nn.ReLU()
        >>> with hooked((layer, "input", lambda x: seen.append(x.item()))):
        ...     _ = layer(torch.tensor(-1.0))
        >>> _ = layer(torch.tensor(5.0))
        >>> seen
        [-1.0]
    """
    handles: list[RemovableHandle] = []
    try:
        for module, side, function in hooks:
            handles.append(_register(module, side, function))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _register(module: nn.Module, side: str, function: Callable[..., Any]) -> RemovableHandle:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        function(_first(args, kwargs))

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return function(_first(args, kwargs), output)

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    if side == "output":
        return module.register_forward_hook(after, with_kwargs=True)
    raise ValueError(f"a hook is for {side!r}; expected 'input' or 'output'")


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("input")
