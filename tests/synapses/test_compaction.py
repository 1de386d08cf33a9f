"""Compaction: the compact model gives the outputs of the masked one, and is as small as possible."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

from nns_plugin.models.inputs import run_model  # noqa: E402
from nns_plugin.models.preserve import copied  # noqa: E402
from nns_plugin.synapses.compaction import compact, count_synapses, permanent  # noqa: E402
from nns_plugin.synapses.dead_units import DeadUnitsWarning  # noqa: E402
from nns_plugin.synapses.input_selection import UnusedInputsWarning  # noqa: E402


def sparse(model: nn.Module, share: float, seed: int) -> nn.Module:
    """Mask a random share of the synapses of every linear and convolutional layer."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv1d)):
            prune.custom_from_mask(module, "weight", torch.rand(module.weight.shape, generator=generator) >= share)
    return model.eval()


def perceptron(widths: list[int], activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for left, right in itertools.pairwise(widths):
        layers += [nn.Linear(left, right), activation()]
    return nn.Sequential(*layers[:-1])


def reached_widths(masks: list[np.ndarray]) -> tuple[list[int], int]:
    """Hidden units of a perceptron with biases between some input and some output, and inputs that such units read.

    A unit that no input reaches is a constant, which its consumers' biases take up; a unit that nothing reads is of no
    use. A layer without any useful unit keeps one, without synapses.
    """
    masks = [mask.copy() for mask in masks]
    while True:
        before = [mask.copy() for mask in masks]
        for layer in range(len(masks) - 1):
            useful = (masks[layer] != 0).any(1) & (masks[layer + 1] != 0).any(0)
            masks[layer] = masks[layer] * useful[:, None]
            masks[layer + 1] = masks[layer + 1] * useful
        if all((old == new).all() for old, new in zip(before, masks, strict=True)):
            widths = [max(1, int((mask != 0).any(1).sum())) for mask in masks[:-1]]
            return widths, max(1, int((masks[0] != 0).any(0).sum()))


@given(share=st.floats(0, 1), seed=st.integers(0, 1000), deep=st.booleans())
def test_a_perceptron_loses_all_dead_units_and_computes_the_same(share: float, seed: int, deep: bool) -> None:
    torch.manual_seed(seed)
    widths = [7, 6, 5, 4, 3] if deep else [9, 8, 2]
    model = sparse(perceptron(widths), share, seed)
    linear = [module for module in model if isinstance(module, nn.Linear)]
    hidden, inputs = reached_widths([module.weight_mask.numpy() for module in linear])
    small = compact(model, torch.randn(2, widths[0]))
    made = [module for module in small.model if isinstance(module, nn.Linear)]
    assert [module.out_features for module in made] == [*hidden, widths[-1]]
    assert made[0].in_features == inputs
    x = torch.randn(50, widths[0])
    assert torch.allclose(small(x), model(x), atol=1e-5)
    assert not any(hasattr(module, "weight_mask") for module in small.model.modules())
    assert [module.weight.dtype for module in made] == [torch.float32] * len(made)


def test_kept_inputs_are_reported_by_index() -> None:
    torch.manual_seed(0)
    model = perceptron([5, 4, 2])
    with torch.no_grad():
        model[0].weight[:, [0, 3]] = 0
    small = compact(model, torch.randn(2, 5))
    assert small.inputs is not None
    assert small.inputs.indices.tolist() == [1, 2, 4]
    assert small.inputs.total == 5
    x = torch.randn(3, 5)
    assert torch.equal(small.inputs(x), x[:, [1, 2, 4]])
    assert torch.allclose(small.model(x[:, [1, 2, 4]]), model(x), atol=1e-6)
    whole = compact(model, torch.randn(2, 5), narrow_inputs=False)
    assert whole.inputs is None
    assert torch.allclose(whole.model(x), model(x), atol=1e-6)


def test_a_constant_unit_is_absorbed_by_the_biases_of_its_consumers() -> None:
    model = perceptron([2, 2, 1])
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
        model[0].bias.copy_(torch.tensor([0.5, 0.0]))
        model[2].weight.copy_(torch.tensor([[3.0, 1.0]]))
        model[2].bias.copy_(torch.tensor([0.25]))
    small = compact(model, torch.randn(2, 2)).model
    assert small[2].weight.tolist() == [[1.0]]
    assert small[2].bias.item() == pytest.approx(0.25 + 3 * np.tanh(0.5), rel=1e-6)


def convolutional(padding: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=padding),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(5 * (9 if padding else 1), 4),
    )


@pytest.mark.parametrize("padding", [0, 1])
def test_constant_maps_are_removed_if_a_bias_absorbs_them_exactly(padding: int) -> None:
    """A constant map is not constant at the border after zero padding: a padded consumer keeps the unit."""
    torch.manual_seed(1)
    model = convolutional(padding).eval()
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
        model[1].bias.fill_(1.0)  # constants that the ReLU passes
        model[0].weight[2] = 0  # constant
        model[3].weight[:, 4] = 0  # not read
        model[3].weight[1] = 0  # constant, followed by a pooling and a flatten
        model[3].bias.fill_(0.5)
        model[0].weight[:, 1] = 0  # a channel that is not used
    small = compact(model, torch.randn(2, 2, 6, 6))
    assert small.model[0].out_channels == (5 if padding else 4)
    assert small.model[3].out_channels == 4
    assert small.inputs is not None
    assert (small.inputs.indices.tolist(), small.model[0].in_channels) == ([0], 1)
    x = torch.randn(3, 2, 6, 6)
    assert torch.allclose(small(x), model(x), atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_all_kinds_of_models_compute_the_same(zoo: Any, share: float) -> None:
    for case, made in zoo.CASES.items():
        torch.manual_seed(0)
        model = sparse(made.make(), share, 0)
        inputs = made.inputs(4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small = compact(model, inputs)
        with torch.no_grad():
            assert torch.allclose(small(inputs), run_model(model, inputs), atol=1e-5), case
        assert small.synapses <= count_synapses(permanent(copied(model))), case


def test_dead_units_before_a_norm_over_units_are_kept_with_a_warning() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[3].weight[:, 2] = 0
        model[5].weight[:, 1] = 0
    with pytest.warns(DeadUnitsWarning, match="dead units of 0 are kept"):
        small = compact(model, torch.randn(2, 4)).model
    assert (small[0].out_features, small[3].out_features) == (6, 4)


class Reading(nn.Module):
    """A model that reads its input in more than one place."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.left, self.right, self.head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        beside = {"both": lambda: self.right(x), "scaled": lambda: self.right(2 * x), "added": lambda: x[:, :3]}
        return self.head(torch.tanh(self.left(x)) + beside[self.kind]())


@pytest.mark.parametrize(("kind", "left"), [("both", [0, 2]), ("scaled", None), ("added", None)])
def test_inputs_are_narrowed_only_if_every_consumer_can_be(kind: str, left: list[int] | None) -> None:
    torch.manual_seed(0)
    model = Reading(kind).eval()
    with torch.no_grad():
        model.left.weight[:, 1:] = 0
        model.right.weight[:, [1, 3]] = 0
    warned = (
        nullcontext() if left else pytest.warns(UnusedInputsWarning, match="1 of the 1 layers .* else also reads them")
    )
    with warned:
        small = compact(model, torch.randn(2, 4))
    assert (None if small.inputs is None else small.inputs.indices.tolist()) == left
    x = torch.randn(3, 4)
    assert torch.allclose(small(x), model(x), atol=1e-6)


def test_pixels_are_removed_from_flattened_images_only() -> None:
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Flatten(), *perceptron([9, 4, 2]))
    shaped = nn.Sequential(nn.Unflatten(1, (1, 3, 3)), nn.Flatten(), *perceptron([9, 4, 2]))
    for model in (flat, shaped):
        with torch.no_grad():
            next(module for module in model if isinstance(module, nn.Linear)).weight[:, [0, 8]] = 0
    x = torch.randn(3, 1, 3, 3)
    small = compact(flat, x)
    assert small.inputs is not None
    assert small.inputs.indices.tolist() == list(range(1, 8))
    assert torch.allclose(small.model(x.flatten(1)[:, 1:8]), flat(x), atol=1e-6)
    with pytest.warns(UnusedInputsWarning, match="needs their original shape"):
        assert compact(shaped, x.flatten(1)).inputs is None


def test_the_model_is_not_changed() -> None:
    torch.manual_seed(0)
    model = sparse(convolutional(0), 0.6, 0).train()
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    compact(model, torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert [len(module._forward_pre_hooks) for module in model] == [1, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("seed", [81, 142])
def test_the_result_does_not_depend_on_the_order_of_removals(seed: int) -> None:
    """For networks with layers that lose all their units."""
    for deep in (True, False):
        test_a_perceptron_loses_all_dead_units_and_computes_the_same.hypothesis.inner_test(0.875, seed, deep)


class Odd(nn.Module):
    """A unit that nothing writes is multiplied or weighted by something that differs between inputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.f, self.h = nn.Linear(4, 6), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.rand(6)) if kind == "scaled" else None
        with torch.no_grad():
            self.f.weight[2], self.f.bias[2] = 0, 2.0

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = torch.relu(self.f(x))
        if self.kind == "gated":
            hidden = hidden * x[..., :1]
        if self.scale is not None:
            hidden = hidden * self.scale
        if mask is not None:
            hidden = (hidden * mask[..., None]).sum(1)
        return self.h(hidden)


@pytest.mark.parametrize("kind", ["gated", "masked", "scaled"])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_only_values_equal_for_all_inputs_count_as_constant(kind: str, batch: int) -> None:
    torch.manual_seed(0)
    model = Odd(kind).eval()
    shape = (3, 4) if kind == "masked" else (4,)
    examples: tuple[torch.Tensor, ...] = (torch.randn(batch, *shape),)
    others: tuple[torch.Tensor, ...] = (torch.randn(50, *shape),)
    if kind == "masked":  # the mask is 1 for the examples and random elsewhere
        examples, others = (*examples, torch.ones(batch, 3).long()), (*others, torch.randint(0, 2, (50, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = compact(model, examples if kind == "masked" else examples[0], narrow_inputs=False)
    if kind != "masked":
        assert torch.allclose(run_model(small.model, others), model(*others), atol=1e-5)
    else:
        assert torch.allclose(run_model(small.model, examples), model(*examples), atol=1e-5)


def test_a_branch_that_nothing_reads_uses_no_inputs() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two, self.head = (
                nn.Linear(6, 4),
                nn.Linear(6, 5),
                nn.Linear(5, 4),
                nn.Linear(4, 2),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.stem(x)) + self.two(torch.tanh(self.one(x))))

    torch.manual_seed(0)
    model = Branch().eval()
    with torch.no_grad():
        model.stem.weight[:, 2:] = 0
        model.two.weight.zero_()
    small = compact(model, torch.randn(8, 6))
    assert small.inputs is not None
    assert small.inputs.indices.tolist() == [0, 1]
    assert small.synapses == 16
    x = torch.randn(9, 6)
    assert torch.allclose(small(x), model(x), atol=1e-5)


def test_units_that_are_constantly_zero_are_removed_whatever_reads_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False)).eval()
    with torch.no_grad():
        model[0].weight[1:4] = 0
    small = compact(model, torch.randn(3, 4))
    assert small.model[0].out_features == 3
    x = torch.randn(9, 4)
    assert torch.allclose(small(x), model(x), atol=1e-6)


def test_models_with_tied_weights_are_compacted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[4].weight[:, 0] = 0
    x = torch.randn(9, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = compact(model.eval(), torch.randn(3, 4))
    assert torch.allclose(small(x), model(x), atol=1e-6)


def test_a_forward_with_random_numbers_leaves_the_random_state_unchanged() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = perceptron([4, 5, 2])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x + 0 * torch.randn_like(x))

    model = Noisy()
    with torch.no_grad():
        model.body[2].weight[:, 1:] = 0
    state = torch.get_rng_state()
    small = compact(model, torch.zeros(2, 4), narrow_inputs=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert small.model.body[0].out_features == 1


def test_a_model_in_training_mode_is_compacted_as_in_evaluation_mode() -> None:
    torch.manual_seed(1)
    model = convolutional(0)
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
        model[3].weight[:, 4] = 0
    small = compact(model.train(), torch.randn(2, 2, 6, 6))
    assert not any(module.training for module in small.model.modules())
    assert model.training
    x = torch.randn(3, 2, 6, 6)
    assert torch.allclose(small(x), model.eval()(x), atol=1e-5)


def test_inputs_read_in_channel_groups_are_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        model[0].weight[:2, 1] = 0  # channel 1 is not used
    small = compact(model, torch.randn(2, 4, 2, 2))
    assert small.inputs is None
    x = torch.randn(3, 4, 2, 2)
    assert torch.allclose(small(x), model(x), atol=1e-6)


def test_frozen_weights_stay_frozen() -> None:
    torch.manual_seed(0)
    model = perceptron([4, 5, 2])
    with torch.no_grad():
        model[0].weight[:, 0] = 0
    model[0].weight.requires_grad_(False)
    small = compact(model, torch.randn(2, 4)).model
    assert [parameter.requires_grad for parameter in small.parameters()] == [False, True, True, True]


def test_inputs_read_in_different_layouts_are_kept() -> None:
    class Forms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.all = nn.Linear(3, 2), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rows(x).sum(1) + self.all(x.flatten(1))

    torch.manual_seed(0)
    model = Forms().eval()
    with torch.no_grad():
        model.all.weight[:, 0] = 0
    with pytest.warns(UnusedInputsWarning, match="1 of the 2 layers .* in different layouts"):
        assert compact(model, torch.randn(2, 2, 3)).inputs is None
