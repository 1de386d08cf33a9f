"""Activations: captured inputs and outputs of single modules, and what their outputs are added to."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import Tensor, nn

from nns_plugin.errors import CalibrationError
from nns_plugin.models.activations import capture_call, capture_input, collect_inputs, execution_order, only_summed

MODEL = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
X, LABELS = torch.randn(6, 4), torch.arange(6) % 3


class Sometimes(nn.Module):
    """Never runs its second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.first(self.first(x))
        return result


def test_the_forward_stops_at_the_module() -> None:
    ran: list[int] = []
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with model[2].register_forward_pre_hook(lambda *_: ran.append(2)), torch.no_grad():
        found = capture_input(model, "1", X)
    torch.testing.assert_close(found, model[0](X).detach())
    assert not ran


def test_a_module_without_a_tensor_first_is_an_error() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(mask=x)
            return result

    class Inner(nn.Module):
        def forward(self, mask: Tensor) -> Tensor:
            return mask

    with pytest.raises(CalibrationError, match="first argument of module 'inner' is a NoneType; expected a tensor"):
        capture_input(Keyword(), "inner", X)


def test_execution_order_counts_calls() -> None:
    assert execution_order(Sometimes(), ["second", "first"], X) == {"first": 2}
    assert list(execution_order(MODEL, ["2", "0"], X)) == ["0", "2"]


def test_only_summed() -> None:
    class Sum(nn.Module):
        def __init__(self, twice: bool) -> None:
            super().__init__()
            self.layer, self.twice = nn.Linear(4, 4), twice

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y + x + (y.relu() if self.twice else 0)

    with torch.no_grad():
        assert only_summed(Sum(False), "layer", X)
        assert not only_summed(Sum(True), "layer", X)


@pytest.mark.parametrize("kind", ["plus", "in place", "function", "method", "reversed"])
def test_the_other_summand_is_found_however_the_sum_is_written(kind: str) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y, other = self.layer(x), x * 2
            match kind:
                case "plus":
                    return y + other
                case "in place":
                    y += other
                    return y
                case "function":
                    return torch.add(y, other)
                case "method":
                    return y.add(other)
            return other + y

    x = torch.randn(2, 3)
    with torch.no_grad():
        addend = capture_call(Sum(), "layer", x, "layer").addend
    assert addend is not None
    torch.testing.assert_close(addend, x * 2)


def test_without_a_sum_there_is_no_addend() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with torch.no_grad():
        found = capture_call(model, "0", torch.ones(2, 3), "0")
    assert found.addend is None
    assert found.output.shape == (2, 3)


def test_inputs_of_a_layer_are_collected_in_order() -> None:
    inputs, labels = collect_inputs(MODEL, "2", [(X[:4], LABELS[:4]), (X[4:], LABELS[4:])])
    assert torch.equal(inputs, torch.relu(MODEL[0](X)).detach())
    assert labels is not None
    assert torch.equal(labels, LABELS)
    assert collect_inputs(MODEL, "2", [X])[1] is None


def test_bad_inputs_of_a_layer() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)).train()
    before = zoo.Snapshot(model)
    with pytest.raises(CalibrationError, match="the loader yielded no inputs"):
        collect_inputs(model, "3", [])
    with pytest.raises(CalibrationError, match=r"input of module '0' has shape \[6, 2, 2, 2\]"):
        collect_inputs(model, "0", [torch.randn(6, 2, 2, 2)])
    with pytest.raises(CalibrationError, match="input of module '3' has NaN"):
        collect_inputs(model, "3", [torch.full((6, 2, 2, 2), torch.nan)])
    before.check(rng=False)
    with pytest.raises(CalibrationError, match="module 'second' did not run"):
        collect_inputs(Sometimes(), "second", [X[:2]])
