"""Models whose forward is written at the place where they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Free(nn.Module):
    """A model from a forward and layers."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.run(self, *inputs, **named)
