"""The steps of a turn: against plain training, and against eq. 5 and 6 by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
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

from nns_plugin import Port  # noqa: E402
from nns_plugin.models.preserve import copied  # noqa: E402
from nns_plugin.switcher.network import SwitcherNetwork  # noqa: E402
from nns_plugin.switcher.scaling_factors import ScalingFactors  # noqa: E402
from nns_plugin.switcher.switches import Switch, find_switches  # noqa: E402
from nns_plugin.switcher.training import Epoch  # noqa: E402


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
    trained(
        model,
        batches,
        switcher,
        optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3),
        epochs=3,
        task_steps=2,
    )
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


class OneWeight(nn.Module):
    """The paper's analysis: one factor, of one input, computed from K weights."""

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

    Without gathered gradients, the switcher steps on the first batch of a turn, before the factors are computed; with
    them, it steps along the mean over the turn's batches afterwards. The end of the data shortens the last turn.
    """
    rate, own_rate = 0.05, 0.03
    w, s = np.array([0.5, -0.3, 0.8]), np.array([0.7, 0.2, 0.9])
    model = nn.Sequential(nn.Linear(1, 3, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(w)[:, None])
    switcher: Any = OneWeight(torch.tensor(s))
    inputs, answers = np.array([0.9, -1.3, 0.4, 2.0, 0.3, -0.7]), [0, 2, 1, 2, 0, 1]
    batches = [(torch.tensor([[x]]), torch.tensor([y])) for x, y in zip(inputs, answers, strict=True)]
    trained(
        model,
        batches,
        switcher,
        optimizer=torch.optim.SGD(model.parameters(), rate),
        switcher_optimizer=torch.optim.SGD(switcher.parameters(), own_rate),
        epochs=1,
        task_steps=task_steps,
        gather_gradients=gather,
        max_second_term=math.inf,
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
def test_the_norm_of_the_second_term_is_limited(limit: float) -> None:
    found = {}
    for second in (0.0, limit):
        model, batches = task(3)
        start = copied(model)
        switcher = switcher_for(model, ROWS)
        trained(
            model,
            batches[:1],
            switcher,
            optimizer=torch.optim.SGD(model.parameters(), 1.0),
            epochs=1,
            task_steps=1,
            max_second_term=second,
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


def test_a_budget_rises_and_only_later_epochs_count() -> None:
    """With five batches per epoch and turns of two steps, it rises at 0, 2/5 and 4/5 of an epoch."""
    rising = [0, 0.4, 0.8, 1, 1.4, 1.8, 2, 2.4, 2.8, *[3] * 9]
    for options, expected in (({"ramp_epochs": 3}, rising), ({}, rising), ({"ramp_epochs": 0}, [3] * 18)):
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
        judged = [epoch.monitored for epoch in result.epochs]
        model.eval()
        with torch.no_grad():
            weights = result.factors.parameters_of(model)
            value = np.mean(
                [float(nn.functional.cross_entropy(functional_call(model, weights, x), y)) for x, y in batches]
            )
        assert math.isclose(value, min(judged[options.get("ramp_epochs", 3) :]), rel_tol=1e-4)


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


@pytest.mark.parametrize("second_term", [0.0, 1.0, math.inf])
def test_half_precision_takes_the_same_steps(second_term: float) -> None:
    """One turn at low learning rates in float16, with scaled gradients, against the same turn in float32."""
    moved: dict[Any, list[Tensor]] = {}
    for amp in (None, torch.float16):
        model, batches = task(4)
        switcher = switcher_for(model, ROWS)
        networks = [*model.parameters(), *switcher.parameters()]
        start = [value.detach().clone() for value in networks]
        trained(
            model, batches[:2], switcher, epochs=1, amp=amp, max_second_term=second_term,
            optimizer=torch.optim.SGD(model.parameters(), 1e-2),
            switcher_optimizer=torch.optim.SGD(switcher.parameters(), 1e-2),
        )  # fmt: skip
        steps = [(new - old).detach().flatten() for new, old in zip(networks, start, strict=True)]
        count = len(list(model.parameters()))
        moved[amp] = [torch.cat(steps[:count]), torch.cat(steps[count:])]
    for exact, half in zip(*moved.values(), strict=True):
        assert float(exact.norm()) > 0
        assert float((exact - half).norm() / exact.norm()) < 0.05


def test_several_steps_of_the_switcher_on_the_first_batch() -> None:
    calls: dict[int, int] = {}
    for steps in (0, 1, 3):
        model, batches = task()
        seen = [0]

        def loss(outputs: Tensor, targets: Tensor, seen: list[int] = seen) -> Tensor:
            seen[0] += 1
            return nn.functional.cross_entropy(outputs, targets)

        trained(
            model,
            batches,
            switcher_for(model, ROWS),
            loss,
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            epochs=1,
            task_steps=2,
            gather_gradients=False,
            switcher_steps=steps,
        )
        calls[steps] = seen[0]
    assert calls == {0: 5, 1: 5 + 3, 3: 5 + 9}  # three turns


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
