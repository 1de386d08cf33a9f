"""Switched training: what it changes, when it stops, and invalid options and data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

from switch_models import ROWS, switcher_for  # noqa: E402
from switch_training import task, trained  # noqa: E402

from nns_plugin.errors import (  # noqa: E402
    CheckpointError,
    PruningError,
    TrainingError,
)
from nns_plugin.models.preserve import copied  # noqa: E402
from nns_plugin.switcher.network import SwitcherNetwork  # noqa: E402
from nns_plugin.switcher.row_network import SwitcherArchitecture  # noqa: E402
from nns_plugin.switcher.scaling_factors import ScalingFactors  # noqa: E402
from nns_plugin.switcher.training import Epoch  # noqa: E402


def test_alternate_training_trains_both_and_separate_training_the_switcher_alone() -> None:
    for alternate in (True, False):
        model, batches = task(dropout=0.2)
        switcher = switcher_for(model, ROWS)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        own = [value.detach().clone() for value in switcher.parameters()]
        result = trained(model, batches, switcher, epochs=4, alternate=alternate)
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert bool(changed) == alternate
        assert any(not torch.equal(left, right) for left, right in zip(own, switcher.parameters(), strict=True))
        assert len(result.epochs) == 4
        assert result.epochs[-1].loss < result.epochs[0].loss
        with torch.no_grad():
            assert all(torch.equal(values, result.factors[name]) for name, values in switcher(model).items())
        assert result.epochs[-1].counts == result.factors.counts()
        assert result.epochs[-1].removed == switcher.removed(result.factors)


def test_nothing_but_weights_and_buffers_changes() -> None:
    model, batches = task(dropout=0.2)
    model.eval()
    gradient = torch.ones_like(model[0].weight)
    model[0].weight.grad = gradient
    switcher = switcher_for(model, ROWS)
    calls = 0

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ZeroDivisionError
        assert model.training
        return nn.functional.cross_entropy(outputs, targets)

    identity = [id(parameter) for parameter in model.parameters()]
    for loss in (broken, nn.functional.cross_entropy):
        try:
            trained(model, batches, switcher, loss, optimizer=torch.optim.SGD(model.parameters(), 0.1), epochs=1)
        except ZeroDivisionError:
            assert loss is broken
        assert not model.training
        assert model[0].weight.grad is gradient
        assert model[4].weight.grad is None
        assert all(value.grad is None and value.requires_grad for value in switcher.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert [id(parameter) for parameter in model.parameters()] == identity
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_end_of_the_data_ends_a_turn_and_the_last_batch_may_be_small() -> None:
    """Mean losses are over inputs, not over batches."""
    model, batches = task()
    x, y = batches[0]
    uneven = [batches[1], (x[:3], y[:3])]
    start = copied(model)
    result = trained(
        model, uneven, switcher_for(model, ROWS), epochs=1, optimizer=torch.optim.SGD(model.parameters(), 1e-12),
        validation=uneven,
    )  # fmt: skip

    def mean(network: nn.Module, factors: ScalingFactors) -> float:
        with torch.no_grad():
            weights = factors.parameters_of(network)
            losses = [nn.functional.cross_entropy(functional_call(network, weights, i), t) for i, t in uneven]
        return float((12 * losses[0] + 3 * losses[1]) / 15)

    assert math.isclose(result.epochs[0].loss, mean(start.train(), switcher_for(start, ROWS)(start)), rel_tol=1e-4)
    assert math.isclose(result.epochs[0].validation or 0, mean(model.eval(), result.factors), rel_tol=1e-4)


def test_schedulers_step_after_each_epoch() -> None:
    model, batches = task()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    halve = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    trained(model, batches, switcher_for(model, ROWS), epochs=3, optimizer=optimizer, schedulers=[halve])
    assert math.isclose(optimizer.param_groups[0]["lr"], 0.1 / 8)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=0, threshold=10.0)
    trained(model, batches, switcher_for(model, ROWS), epochs=3, optimizer=optimizer, schedulers=[plateau])
    assert optimizer.param_groups[0]["lr"] < 1e-3


def test_mixed_precision_reaches_the_model_and_not_the_switcher() -> None:
    model, batches = task()
    switcher = switcher_for(model, ROWS)
    seen: list[torch.dtype] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs.float(), targets)

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trained(model, batches, switcher, loss, optimizer=optimizer, epochs=1, amp=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}


def test_frozen_and_foreign_parameters_do_not_change_whatever_their_gradients() -> None:
    model, batches = task()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[4].weight.requires_grad_(False)
    other = nn.Parameter(torch.zeros(2))
    other.grad = torch.ones(2)
    frozen = model[4].weight.clone()
    optimizer = torch.optim.SGD([*model.parameters(), other], 0.1)
    trained(model, batches, switcher_for(model, ROWS), optimizer=optimizer)
    assert torch.equal(model[4].weight, frozen)
    assert other.tolist() == [0.0, 0.0]
    assert other.grad.tolist() == [1.0, 1.0]
    assert bool((model[0].weight.grad == 1).all())
    with pytest.raises(PruningError, match="optimizer holds none of the 7 trainable parameters of the model"):
        trained(model, batches, switcher_for(model, ROWS), optimizer=torch.optim.SGD([other], 0.1))
    with pytest.raises(PruningError, match="nothing would be trained"):
        trained(model, batches, switcher_for(model, ROWS).requires_grad_(False), alternate=False)


def test_an_exception_restores_the_budget_and_the_next_training_starts_anew() -> None:
    model, batches = task()
    switcher = switcher_for(model, ROWS, budget=0.6)

    def stop(epoch: Epoch) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trained(model, batches, switcher, epochs=8, callbacks=[stop])
    assert float(switcher.progress) == 1.0
    trained(model, batches, switcher, epochs=8, callbacks=[lambda epoch: np.True_])
    assert math.isclose(switcher.progress, 0.8 / 4, rel_tol=1e-6)  # where the last turn of the first epoch began
    result = trained(model, batches, switcher, epochs=1)
    assert result.epochs[0].removed >= 0.6


def test_modes_of_a_model_in_training_mode_are_kept() -> None:
    model, batches = task()
    model.train()
    model[1].eval()  # a frozen norm
    mean = model[1].running_mean.clone()
    trained(model, batches, switcher_for(model, ROWS))
    assert torch.equal(model[1].running_mean, mean)
    assert model.training
    assert not model[1].training


def test_it_stops_when_the_loss_no_longer_falls_and_keeps_the_best() -> None:
    model, batches = task()
    switcher = switcher_for(model, ROWS)
    seen: list[Epoch] = []
    states: list[dict[str, Tensor]] = []

    def note(epoch: Epoch) -> None:
        seen.append(epoch)
        states.append({name: value.clone() for name, value in model.state_dict().items()})

    x, y = batches[0]
    result = trained(
        model, batches, switcher, epochs=60, validation=[(x, 2 - y)], patience=3, callbacks=[note]
    )  # wrong targets: the loss soon rises
    losses = [epoch.validation for epoch in seen]
    best = int(np.argmin(losses))
    assert list(result.epochs) == seen
    assert 3 < len(losses) < 60
    assert len(losses) == best + 1 + 3
    assert all(torch.equal(value, states[best][name]) for name, value in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        value = nn.functional.cross_entropy(functional_call(model, result.factors.parameters_of(model), x), 2 - y)
    assert math.isclose(float(value), losses[best], rel_tol=1e-5)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_mixed_precision(amp: torch.dtype) -> None:
    model, batches = task()
    result = trained(model, batches, switcher_for(model, ROWS), epochs=5, amp=amp)
    assert result.epochs[-1].loss < result.epochs[0].loss
    assert all(value.dtype == torch.float32 for value in model.parameters())


def test_models_with_several_inputs_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(8, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.head(torch.cat([self.left(a).relu(), self.right(b).relu()], 1))

    torch.manual_seed(0)
    model = Two()
    inputs = {"a": torch.randn(8, 3), "b": torch.randn(8, 3)}
    switcher = SwitcherNetwork(model, inputs, architecture=SwitcherArchitecture(2, 1), budget=None)
    assert "inputs of left" in switcher(model)
    loader = [(inputs, torch.randint(0, 2, (8,)))]
    assert len(trained(model, loader, switcher, epochs=2).epochs) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"task_steps": 0}, "task_steps is 0"),
        ({"patience": 0}, "patience is 0"),
        ({"switcher_steps": -1}, "switcher_steps is -1"),
        ({"ramp_epochs": -1}, "ramp_epochs is -1"),
        ({"ramp_epochs": 2}, "ramp_epochs is 2 of 2 epochs"),
        ({"max_second_term": float("nan")}, "max_second_term is nan"),
        ({"amp": torch.float64}, "amp is torch.float64"),
    ],
)
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    model, batches = task()
    with pytest.raises(PruningError, match=message):
        trained(model, batches, switcher_for(model, ROWS), **options)


def test_invalid_data() -> None:
    model, batches = task()
    switcher = switcher_for(model, ROWS)
    for loader, message in (
        ([], "yields nothing"),
        ([batches[0][0]], "a Tensor; expected a pair"),
        ([(batches[0][0] * torch.nan, batches[0][1])], "the loss is nan"),
    ):
        with pytest.raises(TrainingError, match=message):
            trained(model, loader, switcher)
    with pytest.raises(PruningError, match="a loader is an iterator"):
        trained(model, iter(batches), switcher)
    with pytest.raises(TrainingError, match="the validation loss over 0 inputs"):
        trained(model, batches, switcher, validation=[])


def test_loaders_of_unknown_length() -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            x, y = (torch.cat(part) for part in zip(*task()[1], strict=True))
            yield from zip(x, y, strict=True)

    for amp in (None, torch.float16):
        model, _ = task()
        switcher = switcher_for(model, ROWS)
        own = [value.detach().clone() for value in switcher.parameters()]
        loader = torch.utils.data.DataLoader(Stream(), 12)
        result = trained(model, loader, switcher, epochs=4, task_steps=7, amp=amp)  # an epoch is less than a turn
        assert result.epochs[-1].loss < result.epochs[0].loss
        assert any(not torch.equal(left, right) for left, right in zip(own, switcher.parameters(), strict=True))


def test_invalid_losses_and_optimizers(tmp_path: Path) -> None:
    model, batches = task()
    switcher = switcher_for(model, ROWS)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    losses: list[tuple[Any, str]] = [
        (lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, reduction="none"), r"a \[12\]"),
        (lambda outputs, targets: 1.0, "the loss is a float"),
        (lambda outputs, targets: torch.zeros(()), r"the loss is a \[\]"),
    ]
    for loss, message in losses:
        with pytest.raises(TrainingError, match=message):
            trained(model, batches, switcher, loss, optimizer=sgd, epochs=1)
    with pytest.raises(TrainingError, match="the inputs of batch 0 are a ndarray; expected tensors"):
        trained(model, [(np.zeros((2, 6)), torch.zeros(2))], switcher)
    with pytest.raises(PruningError, match="the loader is a int"):
        trained(model, 5, switcher)
    with pytest.raises(PruningError, match="the same object"):
        trained(model, batches, switcher, optimizer=sgd, switcher_optimizer=sgd)
    with pytest.raises(PruningError, match="LBFGS"):
        trained(model, batches, switcher, optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(PruningError, match="weights are float16"):
        trained(copied(model).half(), batches, switcher, amp=torch.float16)
    with pytest.raises(CheckpointError, match="there is no folder"):
        trained(model, batches, switcher, checkpoint=tmp_path / "no" / "file")
    file = tmp_path / "file"
    trained(model, batches, switcher, checkpoint=file, max_second_term=1)
    with pytest.raises(CheckpointError, match="validation is False, not True"):
        trained(model, batches, switcher, checkpoint=file, validation=batches)
    trained(model, batches, switcher, checkpoint=file, max_second_term=1.0, epochs=3)
