"""Hooks: what they see and replace, and that none is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nns_plugin.models.hooks import Hook, hooked


class Named(nn.Module):
    """Passes its inputs to a layer by the chosen keyword, or by position."""

    def __init__(self, keyword: str | None = None) -> None:
        super().__init__()
        self.layer = Doubling()
        self.keyword = keyword

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x) if self.keyword is None else self.layer(**{self.keyword: x})
        return result


class Doubling(nn.Module):
    def forward(self, input: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        value = other if input is None else input
        assert value is not None
        return 2 * value


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken")


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks)
        + len(module._forward_pre_hooks)
        + len(module._forward_hooks_with_kwargs)
        + len(module._forward_pre_hooks_with_kwargs)
        for module in model.modules()
    )


@pytest.mark.parametrize(("keyword", "expected"), [(None, 3.0), ("input", 3.0), ("other", None)])
def test_hooks_see_the_first_input_and_the_output(keyword: str | None, expected: float | None) -> None:
    model = Named(keyword)
    seen: list[Any] = []
    hooks: list[Hook] = [
        (model.layer, "input", lambda x: seen.append(x)),
        (model.layer, "output", lambda x, output: seen.extend((x, output))),
    ]
    with hooked(*hooks):
        model(torch.tensor(3.0))
    found = [None if value is None else value.item() for value in seen]
    assert found == [expected, expected, 6.0]


def test_an_output_hook_replaces_the_output_and_an_input_hook_replaces_nothing() -> None:
    model = Named()
    with hooked((model.layer, "output", lambda x, output: output + x)):
        assert model(torch.tensor(3.0)).item() == 9
    with hooked((model.layer, "input", lambda x: x + 100)):
        assert model(torch.tensor(3.0)).item() == 6
    assert model(torch.tensor(3.0)).item() == 6


def test_a_failing_forward_leaves_no_hook_behind() -> None:
    model = nn.Sequential(nn.ReLU(), Broken())
    counted: list[int] = []
    hooks: list[Hook] = [
        (model[0], "input", lambda x: counted.append(hooks_of(model))),
        (model[1], "output", lambda x, output: None),
    ]
    with pytest.raises(RuntimeError, match="broken"), hooked(*hooks):
        model(torch.zeros(1))
    assert counted == [4]  # each is listed a second time, as one that takes keyword arguments
    assert hooks_of(model) == 0


def test_a_failing_registration_leaves_no_hook_behind() -> None:
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    wrong: Any = "outpt"
    with pytest.raises(ValueError, match="'outpt'"), hooked((model[0], "input", print), (model[1], wrong, print)):
        raise AssertionError("the block must not run")
    assert hooks_of(model) == 0


def test_other_hooks_stay() -> None:
    model = nn.ReLU()
    calls: list[int] = []
    with model.register_forward_hook(lambda *_: calls.append(1)):
        with hooked((model, "input", lambda x: None)):
            model(torch.zeros(1))
        model(torch.zeros(1))
    assert calls == [1, 1]
