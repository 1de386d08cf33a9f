"""Training with a switcher: against plain training and eq. 5 and 6 by hand, resumed, and with wrong options."""

from __future__ import annotations

import math
import random
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

from nns_plugin import Port  # noqa: E402
from nns_plugin.errors import (  # noqa: E402
    CheckpointError,
    PruningError,
    TrainingError,
)
from nns_plugin.models.preserve import copied  # noqa: E402
from nns_plugin.switcher.network import SwitcherNetwork  # noqa: E402
from nns_plugin.switcher.scaling_factors import ScalingFactors  # noqa: E402
from nns_plugin.switcher.switches import Switch, find_switches  # noqa: E402
from nns_plugin.switcher.training import Epoch, Switched, train_switched  # noqa: E402


def task(seed: int = 0, dropout: float = 0.0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 6, generator=generator)
    y = (x[:, 0] + x[:, 1] ** 2 > 1).long() + (x[:, 2] > 0.5).long()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )
    return model, [(x[start : start + 12], y[start : start + 12]) for start in range(0, 60, 12)]


class Ones(nn.Module):
    """A switcher that is frozen at 1."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        super().__init__()
        self.switches = find_switches(model, inputs)
        self.reads: frozenset[str] = frozenset({"0.weight"})
        self.budget = None

    def forward(self, weights: Any) -> ScalingFactors:
        return ScalingFactors(self.switches, {switch.name: torch.ones(switch.size) for switch in self.switches})

    def removed(self, factors: ScalingFactors) -> float:
        return 0.0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_frozen_at_1_it_is_plain_training(dropout: float) -> None:
    model, batches = task(dropout=dropout)
    plain = copied(model)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    torch.manual_seed(5)
    plain.train()
    for _ in range(3):
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(x), y).backward()
            optimizer.step()
    torch.manual_seed(5)
    switcher: Any = Ones(model, batches[0][0])
    train_switched(
        model,
        batches,
        nn.functional.cross_entropy,
        switcher,
        optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3),
        epochs=3,
        task_steps=2,
    )
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


class OneWeight(nn.Module):
    """The analysis of the source: one factor, of the one input, out of K weights."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        place = torch.zeros(1, dtype=torch.long)
        self.switches = (Switch("inputs of 0", 1, (Port("0", place, place),)),)
        self.reads = frozenset({"0.weight"})
        self.budget = None
        self.own = nn.Parameter(weights.clone())

    def forward(self, weights: Any) -> ScalingFactors:
        values = dict(weights.named_parameters()) if isinstance(weights, nn.Module) else weights
        return ScalingFactors(self.switches, {"inputs of 0": (self.own @ values["0.weight"]).relu()})

    def removed(self, factors: ScalingFactors) -> float:
        return 0.0


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("task_steps", [1, 2, 4])
def test_a_turn_is_equations_5_and_6(task_steps: int, gather: bool) -> None:
    """K = 3 outputs of one input, a switcher with one layer; gradients by hand, in double precision.

    Not gathering, the switcher takes its step on the first batch of a turn, and sees the factors change by it;
    gathering, it takes the mean over the turn's batches afterwards. The last turn is cut short by the end of the data.
    """
    rate, own_rate = 0.05, 0.03
    w, s = np.array([0.5, -0.3, 0.8]), np.array([0.7, 0.2, 0.9])
    model = nn.Sequential(nn.Linear(1, 3, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(w)[:, None])
    switcher: Any = OneWeight(torch.tensor(s))
    inputs, answers = np.array([0.9, -1.3, 0.4, 2.0, 0.3, -0.7]), [0, 2, 1, 2, 0, 1]
    batches = [(torch.tensor([[x]]), torch.tensor([y])) for x, y in zip(inputs, answers, strict=True)]
    train_switched(
        model,
        batches,
        nn.functional.cross_entropy,
        switcher,
        optimizer=torch.optim.SGD(model.parameters(), rate),
        switcher_optimizer=torch.optim.SGD(switcher.parameters(), own_rate),
        epochs=1,
        task_steps=task_steps,
        gather=gather,
        second_term=math.inf,
    )

    def error(factor: float, place: int) -> np.ndarray:
        return softmax(factor * inputs[place] * w) - np.eye(3)[answers[place]]

    for start in range(0, 6, task_steps):
        if not gather:
            s = s - own_rate * w * (error(s @ w, start) * inputs[start] * w).sum()  # eq. 5
        begun, factor, total = w.copy(), s @ w, 0.0
        places = range(start, min(start + task_steps, 6))
        for place in places:
            wrong = error(factor, place)
            step = wrong * inputs[place] * factor  # first term of eq. 6
            total += (wrong * inputs[place] * w).sum()
            if place == places[-1]:
                step = step + s * total  # second term, of the whole turn
            w = w - rate * step
        if gather:
            s = s - own_rate * begun * total / len(places)
    assert np.allclose(switcher.own.detach().numpy(), s, atol=1e-12)
    assert np.allclose(model[0].weight.detach().numpy()[:, 0], w, atol=1e-12)


@pytest.mark.parametrize("limit", [0.0, 0.25, 1.0])
def test_the_second_term_is_no_longer_than_it_may_be(limit: float) -> None:
    found = {}
    for second in (0.0, limit):
        model, batches = task(3)
        start = copied(model)
        switcher = switcher_for(model, ROWS)
        train_switched(
            model,
            batches[:1],
            nn.functional.cross_entropy,
            switcher,
            optimizer=torch.optim.SGD(model.parameters(), 1.0),
            epochs=1,
            task_steps=1,
            second_term=second,
        )
        found[second] = {
            name: (value - dict(start.named_parameters())[name]).detach()
            for name, value in model.named_parameters()
            if name in switcher.reads
        }
    own = math.sqrt(sum(float(step.square().sum()) for step in found[0.0].values()))
    more = math.sqrt(sum(float((found[limit][name] - step).square().sum()) for name, step in found[0.0].items()))
    assert more <= limit * own * (1 + 1e-4) + 1e-9
    assert more > 0 or limit == 0


def test_a_budget_rises_and_only_what_comes_after_counts() -> None:
    """In turns of two steps, of which the data give five an epoch, it is at 0, 2/5 and 4/5 of an epoch."""
    rising = [0, 0.4, 0.8, 1, 1.4, 1.8, 2, 2.4, 2.8, *[3] * 9]
    for options, expected in (({"ramp": 3}, rising), ({}, rising), ({"ramp": 0}, [3] * 18)):
        model, batches = task()
        switcher = switcher_for(model, ROWS, budget=0.6)
        seen: list[tuple[float, float]] = []
        read: list[float] = []

        def note(epoch: Epoch, switcher: SwitcherNetwork = switcher, seen: list[Any] = seen) -> None:
            seen.append((float(switcher.progress), epoch.removed))

        def look(module: nn.Module, args: Any, read: list[float] = read) -> None:
            if torch.is_grad_enabled():
                read.append(float(module.progress))

        with switcher.register_forward_pre_hook(look):
            result = trained(
                model, batches, switcher, epochs=6, callbacks=[note], validation=batches, patience=100, **options
            )
        assert np.allclose(read, np.array(expected) / 3)
        assert np.allclose([progress for progress, _ in seen], np.array(expected[2::3]) / 3)
        for progress, removed in seen:
            assert removed >= 0.6 * (1 - (1 - progress) ** 3) - 1e-9
        assert switcher.removed(result.factors) >= 0.6
        judged = [epoch.judged for epoch in result.epochs]
        model.eval()
        with torch.no_grad():
            weights = result.factors.parameters_of(model)
            value = np.mean(
                [float(nn.functional.cross_entropy(functional_call(model, weights, x), y)) for x, y in batches]
            )
        assert math.isclose(value, min(judged[options.get("ramp", 3) :]), rel_tol=1e-4)


def test_a_budget_rises_batch_by_batch_in_the_separate_mode_and_epoch_by_epoch_without_a_length() -> None:
    class Unmeasured:
        def __init__(self, batches: Any) -> None:
            self.batches = batches

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(self.batches)

    for wrap, alternate, expected in (
        (list, False, [0, 0.2, 0.4, 0.6, 0.8, *[1] * 5]),
        (Unmeasured, False, [*[0] * 5, *[1] * 5]),
        (Unmeasured, True, [0, 0, 0, 1, 1, 1]),
    ):
        model, batches = task()
        switcher = switcher_for(model, ROWS, budget=0.6)
        read: list[float] = []

        def look(module: nn.Module, args: Any, read: list[float] = read) -> None:
            if torch.is_grad_enabled():
                read.append(float(module.progress))

        with switcher.register_forward_pre_hook(look):
            trained(model, wrap(batches), switcher, epochs=2, alternate=alternate)
        assert np.allclose(read, expected)


def trained(model: nn.Module, loader: Any, switcher: SwitcherNetwork, epochs: int = 2, **options: Any) -> Switched:
    given = {
        "optimizer": torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
        "epochs": epochs,
        "task_steps": 2,
        **options,
    }
    return train_switched(model, loader, nn.functional.cross_entropy, switcher, **given)


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
            train_switched(model, batches, loss, switcher, optimizer=torch.optim.SGD(model.parameters(), 0.1), epochs=1)
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


@pytest.mark.parametrize("second_term", [0.0, 1.0, math.inf])
def test_half_precision_takes_the_same_steps(second_term: float) -> None:
    """One turn with tiny rates in float16, with its scaled gradients, against the same in float32."""
    moved: dict[Any, list[Tensor]] = {}
    for amp in (None, torch.float16):
        model, batches = task(4)
        switcher = switcher_for(model, ROWS)
        networks = [*model.parameters(), *switcher.parameters()]
        start = [value.detach().clone() for value in networks]
        trained(
            model, batches[:2], switcher, epochs=1, amp=amp, second_term=second_term,
            optimizer=torch.optim.SGD(model.parameters(), 1e-2),
            switcher_optimizer=torch.optim.SGD(switcher.parameters(), 1e-2),
        )  # fmt: skip
        steps = [(new - old).detach().flatten() for new, old in zip(networks, start, strict=True)]
        count = len(list(model.parameters()))
        moved[amp] = [torch.cat(steps[:count]), torch.cat(steps[count:])]
    for exact, half in zip(*moved.values(), strict=True):
        assert float(exact.norm()) > 0
        assert float((exact - half).norm() / exact.norm()) < 0.05


def test_mixed_precision_reaches_the_model_and_not_the_switcher() -> None:
    model, batches = task()
    switcher = switcher_for(model, ROWS)
    seen: list[torch.dtype] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs.float(), targets)

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train_switched(model, batches, loss, switcher, optimizer=optimizer, epochs=1, amp=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}


def test_what_is_frozen_or_foreign_stays_whatever_gradients_it_has() -> None:
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
    with pytest.raises(PruningError, match="optimizer holds none of the 7 parameters of the model"):
        trained(model, batches, switcher_for(model, ROWS), optimizer=torch.optim.SGD([other], 0.1))
    with pytest.raises(PruningError, match="nothing would be"):
        trained(model, batches, switcher_for(model, ROWS).requires_grad_(False), alternate=False)


def test_several_steps_of_the_switcher_on_the_first_batch() -> None:
    calls: dict[int, int] = {}
    for steps in (0, 1, 3):
        model, batches = task()
        seen = [0]

        def loss(outputs: Tensor, targets: Tensor, seen: list[int] = seen) -> Tensor:
            seen[0] += 1
            return nn.functional.cross_entropy(outputs, targets)

        train_switched(
            model,
            batches,
            loss,
            switcher_for(model, ROWS),
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            epochs=1,
            task_steps=2,
            gather=False,
            switcher_steps=steps,
        )
        calls[steps] = seen[0]
    assert calls == {0: 5, 1: 5 + 3, 3: 5 + 9}  # three turns


def test_an_exception_puts_the_budget_back_and_the_next_training_starts_anew() -> None:
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


def test_modes_of_a_training_model_stay() -> None:
    model, batches = task()
    model.train()
    model[1].eval()  # a frozen norm
    mean = model[1].running_mean.clone()
    trained(model, batches, switcher_for(model, ROWS))
    assert torch.equal(model[1].running_mean, mean)
    assert model.training
    assert not model[1].training


def same_state(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(value, right.state_dict()[name]) for name, value in left.state_dict().items())


class Halved:
    """A loader whose order and inputs are drawn from the random numbers of torch, NumPy and Python."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for place in torch.randperm(len(self.batches)).tolist():
            x, y = self.batches[place]
            yield x + random.random() + torch.from_numpy(np.random.rand(6)).float(), y


@pytest.mark.parametrize("kind", ["global", "generator", "batches"])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_training_that_was_interrupted_ends_as_if_it_had_not_been(tmp_path: Path, stop: int, kind: str) -> None:
    def run(checkpoint: Path | None, stop_after: int | None) -> tuple[nn.Module, SwitcherNetwork, Switched]:
        model, batches = task(2, dropout=0.3)
        loader: Any = Halved(batches)
        if kind == "generator":
            data = torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*batches, strict=True)))
            generator = torch.Generator().manual_seed(3)
            loader = torch.utils.data.DataLoader(data, 12, shuffle=True, generator=generator)
        if kind == "batches":
            data = torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*batches, strict=True)))
            order = torch.utils.data.RandomSampler(data, generator=torch.Generator().manual_seed(4))
            loader = torch.utils.data.DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(order, 12, False))
        switcher = switcher_for(model, ROWS)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        result = trained(
            model,
            loader,
            switcher,
            epochs=5,
            optimizer=optimizer,
            schedulers=[torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)],
            validation=batches[:2],
            checkpoint=checkpoint,
            callbacks=[lambda epoch: epoch.number == stop_after],
        )
        return model, switcher, result

    def seed(value: int) -> None:
        torch.manual_seed(value)
        random.seed(value)
        np.random.seed(value)

    seed(11)
    whole = run(None, None)
    file = tmp_path / "training.safetensors"
    seed(11)
    assert len(run(file, stop)[2].epochs) == stop
    seed(99)  # comes back from the file
    again = run(file, None)
    assert same_state(whole[0], again[0])
    assert same_state(whole[1], again[1])
    assert whole[2].epochs == again[2].epochs
    assert all(torch.equal(values, again[2].factors[name]) for name, values in whole[2].factors.items())


def test_a_checkpoint_that_does_not_fit_is_left_as_it_is(tmp_path: Path) -> None:
    model, batches = task()
    switcher = switcher_for(model, ROWS)
    file = tmp_path / "training.safetensors"
    trained(model, batches, switcher, checkpoint=file)
    content = file.read_bytes()
    before = copied(model)
    other = switcher_for(model, ROWS, channels=3)
    with pytest.raises(CheckpointError, match="belongs to another training"):
        trained(model, batches, other, checkpoint=file)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(CheckpointError, match="belongs to another training"):
        trained(model, batches, switcher, checkpoint=file, optimizer=optimizer, schedulers=[scheduler])
    for options in ({"optimizer": torch.optim.Adam(model.parameters())}, {"optimizer": torch.optim.SGD([
        {"params": [*model[0].parameters()]}, {"params": [*model[4].parameters()]}
    ], 0.1, momentum=0.9)}):  # fmt: skip
        with pytest.raises(CheckpointError, match="belongs to another training"):
            trained(model, batches, switcher, checkpoint=file, **options)
    with pytest.raises(CheckpointError, match="other options: its task_steps is 2, not 3"):
        trained(model, batches, switcher, checkpoint=file, task_steps=3)
    assert same_state(before, model)
    assert file.read_bytes() == content
    file.write_bytes(content[:-20])
    with pytest.raises(CheckpointError, match="damaged"):
        trained(model, batches, switcher, checkpoint=file)
    assert same_state(before, model)


def test_it_stops_when_the_loss_no_longer_falls_and_keeps_the_best() -> None:
    model, batches = task()
    switcher = switcher_for(model, ROWS)
    told: list[Epoch] = []
    states: list[dict[str, Tensor]] = []

    def note(epoch: Epoch) -> None:
        told.append(epoch)
        states.append({name: value.clone() for name, value in model.state_dict().items()})

    x, y = batches[0]
    result = trained(
        model, batches, switcher, epochs=60, validation=[(x, 2 - y)], patience=3, callbacks=[note]
    )  # wrong answers: it soon rises
    losses = [epoch.validation for epoch in told]
    best = int(np.argmin(losses))
    assert list(result.epochs) == told
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
    switcher = SwitcherNetwork(model, inputs, channels=2, depth=1, budget=None)
    assert "inputs of left" in switcher(model)
    loader = [(inputs, torch.randint(0, 2, (8,)))]
    assert len(trained(model, loader, switcher, epochs=2).epochs) == 2


# What goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"task_steps": 0}, "task_steps is 0"),
        ({"patience": 0}, "patience is 0"),
        ({"switcher_steps": -1}, "switcher_steps is -1"),
        ({"ramp": -1}, "ramp is -1"),
        ({"ramp": 2}, "ramp is 2 of 2 epochs"),
        ({"second_term": float("nan")}, "second_term nan"),
        ({"amp": torch.float64}, "amp is torch.float64"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], message: str) -> None:
    model, batches = task()
    with pytest.raises(PruningError, match=message):
        trained(model, batches, switcher_for(model, ROWS), **options)


def test_wrong_data_is_told() -> None:
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


def test_loaders_that_do_not_know_their_length() -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            x, y = (torch.cat(part) for part in zip(*task()[1], strict=True))
            yield from zip(x, y, strict=True)

    for amp in (None, torch.float16):
        model, _ = task()
        switcher = switcher_for(model, ROWS)
        own = [value.detach().clone() for value in switcher.parameters()]
        loader = torch.utils.data.DataLoader(Stream(), 12)
        result = trained(model, loader, switcher, epochs=4, task_steps=7, amp=amp)  # all of it is less than a turn
        assert result.epochs[-1].loss < result.epochs[0].loss
        assert any(not torch.equal(left, right) for left, right in zip(own, switcher.parameters(), strict=True))


def test_gradients_that_share_memory_are_not_scaled_twice() -> None:
    class Twofold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
            self.left, self.right = nn.Parameter(torch.zeros(5, 6)), nn.Parameter(torch.zeros(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.first(x) + nn.functional.linear(x, self.left + self.right)))

    steps = []
    for amp in (None, torch.float16):
        torch.manual_seed(0)
        model = Twofold()
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        trained(model, task()[1][:1], switcher_for(model, ROWS), epochs=1, amp=amp, optimizer=optimizer)
        assert torch.allclose(model.left, model.right)
        steps.append(float(model.left.norm().detach()))
    assert math.isclose(steps[0], steps[1], rel_tol=0.05)


def test_buffers_that_are_not_in_the_state_dictionary_resume(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def get_extra_state(self) -> Any:
            return {"kind": "counting"}

        def set_extra_state(self, state: Any) -> None:
            """Nothing to do."""

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return self.head(torch.relu(self.first(x))) / (1 + self.seen)

    found = []
    for stops in ((None,), (2, None)):
        torch.manual_seed(0)
        model = Counting()
        for stop in stops:
            trained(
                model, task()[1], switcher_for(model, ROWS), epochs=4, checkpoint=tmp_path / str(len(stops)),
                callbacks=[lambda epoch, stop=stop: epoch.number == stop],
            )  # fmt: skip
            if stop:
                model.seen.zero_()
        found.append(model)
    whole, again = ([*model.parameters(), *model.buffers()] for model in found)
    assert all(torch.equal(left, right) for left, right in zip(whole, again, strict=True))


def test_wrong_losses_and_optimizers_are_told(tmp_path: Path) -> None:
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
            train_switched(model, batches, loss, switcher, optimizer=sgd, epochs=1)
    with pytest.raises(TrainingError, match="the inputs of batch 0 are a ndarray without tensors"):
        trained(model, [(np.zeros((2, 6)), torch.zeros(2))], switcher)
    with pytest.raises(PruningError, match="the loader is a int"):
        trained(model, 5, switcher)
    with pytest.raises(PruningError, match="one and the same"):
        trained(model, batches, switcher, optimizer=sgd, switcher_optimizer=sgd)
    with pytest.raises(PruningError, match="LBFGS"):
        trained(model, batches, switcher, optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(PruningError, match="weights are float16"):
        trained(copied(model).half(), batches, switcher, amp=torch.float16)
    with pytest.raises(CheckpointError, match="there is no folder"):
        trained(model, batches, switcher, checkpoint=tmp_path / "no" / "file")
    file = tmp_path / "file"
    trained(model, batches, switcher, checkpoint=file, second_term=1)
    with pytest.raises(CheckpointError, match="validation is False, not True"):
        trained(model, batches, switcher, checkpoint=file, validation=batches)
    trained(model, batches, switcher, checkpoint=file, second_term=1.0, epochs=3)
