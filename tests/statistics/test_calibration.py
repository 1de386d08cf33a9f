"""Calibration leaves the model as it was, and reports what is wrong with the data."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nns_plugin import Port, UnitGroup, calibrate
from nns_plugin.errors import CalibrationError, GroupError, LabelError, NNSError
from nns_plugin.models.preserve import preserved


class Troublesome(nn.Module):
    """Does in its forward everything that a calibration must undo."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 3)
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("grown", torch.zeros(2))
        self.register_buffer("lazy", None)
        self.register_buffer("nan", torch.tensor([torch.nan, 1.0]))
        self.embedding = nn.Embedding(5, 4, max_norm=0.1)
        self.length, self.calls = 2, 0
        self.fails_in: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.norm.train()  # batch statistics whatever the mode, and running statistics with them
        x = torch.relu(self.norm(self.conv(x)))
        self.written += 1
        self.replaced = torch.ones(3)
        self.grown.data = torch.ones(self.length + 1)
        self.length, self.calls = 3, self.calls + 1
        self.lazy = torch.ones(1)
        if "cache" not in self._buffers:
            self.register_buffer("cache", torch.ones(1), persistent=False)
        self.drop.p = 0.25
        x = x.mean((2, 3)) + self.embedding(torch.zeros(len(x), dtype=torch.int64))
        random.random(), np.random.rand(), torch.rand(1)
        if self.calls == self.fails_in:
            raise RuntimeError("in the middle")
        return self.head(self.drop(x))


def units(name: str, count: int, consumer: str) -> UnitGroup:
    every = torch.arange(count)
    return UnitGroup(name, count, (Port(name, every, every),), (Port(consumer, every, every),))


def troublesome() -> tuple[Troublesome, tuple[UnitGroup, ...]]:
    """The model in a state that is easily lost: mixed modes, frozen and shared parts, gradients, hooks of its own."""
    model = Troublesome()
    model.train()
    model.drop.eval()
    model.conv.bias.requires_grad_(False)
    model(torch.randn(3, 2, 4, 4)).sum().backward()
    model.calls, model.length = 0, 2
    model.grown.data = torch.zeros(2)
    model.head.eval()
    model.norm.weight.grad = None
    del model._buffers["cache"]
    model._non_persistent_buffers_set.clear()
    model.lazy, model.drop.p = None, 0.5
    nn.init.constant_(model.embedding.weight, 3.0)
    model.conv.register_forward_hook(lambda *_: None)
    model.head.register_forward_pre_hook(lambda *_: None)
    model.head.register_full_backward_hook(lambda *_: None)
    return model, (units("conv", 4, "head"),)


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6, 2, 4, 4), torch.arange(6) % 3) for _ in range(count)]


def test_the_model_is_left_as_it_was() -> None:
    model, groups = troublesome()
    loader = batches()
    before = zoo.Snapshot(model)
    statistics = calibrate(model, loader, groups)
    before.check()
    assert int(statistics.records["in", "head"].inputs.sum()) == 18


@pytest.mark.parametrize("call", [1, 2])
def test_the_model_is_left_as_it_was_when_its_forward_raises(call: int) -> None:
    model, groups = troublesome()
    model.fails_in = call
    loader = batches()
    before = zoo.Snapshot(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        calibrate(model, loader, groups)
    before.check()


def test_the_model_is_left_as_it_was_when_the_user_interrupts() -> None:
    model, groups = troublesome()
    loader = batches(1)

    def interrupted() -> Iterator[Any]:
        yield from loader
        raise KeyboardInterrupt

    before = zoo.Snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, interrupted(), groups)
    before.check()


@pytest.mark.parametrize(
    "loader",
    [
        lambda: [(torch.full((6, 2, 4, 4), torch.nan), torch.arange(6) % 3)],
        lambda: [(torch.randn(6, 2, 4, 4), torch.full((6,), 3))],
        lambda: [],
        lambda: [(torch.randn(6, 2, 4, 4), "labels")],
    ],
)
def test_the_model_is_left_as_it_was_when_the_data_is_bad(loader: Callable[[], Any]) -> None:
    model, groups = troublesome()
    data = loader()
    before = zoo.Snapshot(model)
    with pytest.raises(NNSError):
        calibrate(model, data, groups)
    before.check()


def test_nothing_is_registered_before_the_arguments_are_checked() -> None:
    model, groups = troublesome()
    touched: list[Any] = []
    model.register_forward_pre_hook(lambda *_: touched.append(1))
    before = zoo.Snapshot(model)
    for wrong in (
        lambda: calibrate(model, batches(1), groups, labels=0),
        lambda: calibrate(model, batches(1), ()),
        lambda: calibrate(model, batches(1), (units("conv", 4, "nowhere"),)),
        lambda: calibrate(model, batches(1), (units("conv", 4, "drop"),)),
    ):
        with pytest.raises(NNSError):
            wrong()
    assert not touched
    before.check(rng=False)


def test_statistics_of_a_troublesome_model_are_those_of_its_evaluation_mode() -> None:
    """Dropout does not drop while calibrating, even where the module was in training mode."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.9), nn.Linear(5, 3)).train()
    x = torch.randn(50, 4)
    statistics = calibrate(model, [(x, torch.arange(50) % 3)], (units("0", 5, "3"),))
    expected = torch.relu(model[0](x)).sum(0).detach().numpy()
    np.testing.assert_allclose(statistics.records["in", "3"].total.sum(0), expected, rtol=1e-5)


class Noisy(Dataset[tuple[Tensor, int]]):
    """Draws from every generator for each item."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(4) + random.random() + float(np.random.rand()), index % 3


def test_a_loader_may_consume_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    before = zoo.Snapshot(model)
    loader = DataLoader(Noisy(), batch_size=4, shuffle=True)
    first = calibrate(model, loader, (units("0", 5, "2"),))
    before.check()
    again = calibrate(model, loader, (units("0", 5, "2"),))
    assert torch.equal(first.records["in", "2"].total, again.records["in", "2"].total), "the same random state"


def test_calibration_inside_other_modes() -> None:
    """Under inference_mode, and with an inference tensor from the loader."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x, labels = torch.randn(6, 4), torch.arange(6) % 3
    plain = calibrate(model, [(x, labels)], (units("0", 5, "2"),))
    with torch.inference_mode():
        inside = calibrate(model, [(x, labels)], (units("0", 5, "2"),))
        made_inside = x.clone()
    assert torch.equal(plain.records["in", "2"].total, inside.records["in", "2"].total)
    direct = (units("0", 4, "0"),)
    inference_tensor = calibrate(model, [(made_inside, labels)], direct)
    assert torch.equal(
        inference_tensor.records["in", "0"].total, calibrate(model, [(x, labels)], direct).records["in", "0"].total
    )


def test_loaders_may_be_anything_that_yields_batches() -> None:
    model, groups = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (units("0", 5, "2"),)
    x, labels = torch.randn(6, 4), torch.arange(6) % 3
    expected = calibrate(model, [(x, labels)], groups).records["in", "2"].total
    loaders = [
        ((x, labels) for _ in range(1)),
        DataLoader(TensorDataset(x, labels), batch_size=6),
        [[x, labels]],
        [(x, labels.to(torch.uint8))],
        [(x, labels.to(torch.int32))],
        [(x, labels), (x[:0], labels[:0])],
    ]
    for loader in loaders:
        assert torch.equal(calibrate(model, loader, groups).records["in", "2"].total, expected)


def test_preserved_restores_in_place_changes_of_other_shapes() -> None:
    model = nn.BatchNorm1d(3)
    before = zoo.Snapshot(model)
    with preserved(model):
        model.running_mean.data = torch.ones(5)
        model.num_batches_tracked.fill_(7)
        model.running_var = None
    before.check()


# --- bad input -----------------------------------------------------------------------------------------------------


MODEL = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
nn.init.constant_(MODEL[0].weight, 0.5)  # a random one could stop infinity at the ReLU
GROUPS = (units("0", 5, "2"),)
X, LABELS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
GOOD = (X, LABELS)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], CalibrationError, "the loader yielded no inputs"),
        ([(X[:0], LABELS[:0])], CalibrationError, "the loader yielded no inputs"),
        (X, CalibrationError, "the loader is a Tensor; expected batches"),
        ({"x": X}, CalibrationError, "the loader is a dict; expected batches"),
        ("data", CalibrationError, "the loader is a str; expected batches"),
        (7, CalibrationError, "the loader is a int; expected batches"),
        (None, CalibrationError, "the loader is a NoneType; expected batches"),
        ([GOOD, (X, LABELS, LABELS)], CalibrationError, "batch 1 of the loader has 3 parts; expected"),
        ([()], CalibrationError, "batch 0 of the loader has 0 parts"),
        (["data"], CalibrationError, "batch 0 of the loader has inputs of type str"),
        ([(X.numpy(), LABELS)], CalibrationError, "batch 0 of the loader has inputs of type ndarray"),
        ([({}, LABELS)], CalibrationError, "batch 0 of the loader has inputs of type dict"),
        ([(((X, X), X), LABELS)], CalibrationError, "batch 0 of the loader has inputs of type tuple"),
        ([((X, X[:3]), LABELS)], CalibrationError, r"inputs of lengths \[6, 3\]"),
        ([(torch.tensor(1.0), LABELS)], CalibrationError, "batch 0 of the loader has inputs of type Tensor"),
        ([GOOD, (X, LABELS[:5])], CalibrationError, "batch 1 of the loader has 6 inputs and 5 labels"),
        ([(X, LABELS.tolist())], CalibrationError, "batch 0 of the loader has labels of type list"),
        ([(X, LABELS.numpy())], CalibrationError, "batch 0 of the loader has labels of type ndarray"),
        ([(X, LABELS.float())], CalibrationError, r"labels of shape \[6\] and type torch.float32"),
        ([(X, LABELS.bool())], CalibrationError, r"labels of shape \[6\] and type torch.bool"),
        ([(X, LABELS[:, None])], CalibrationError, r"labels of shape \[6, 1\] and type torch.int64"),
        ([(X, nn.functional.one_hot(LABELS))], CalibrationError, r"labels of shape \[6, 3\]"),
        ([GOOD, X], CalibrationError, "batch 1 of the loader changes between labelled and unlabelled"),
        ([X, GOOD], CalibrationError, "batch 1 of the loader changes between labelled and unlabelled"),
        ([GOOD, (X, LABELS + 1)], LabelError, r"batch 1 of the loader has labels 1\.\.3; expected 0\.\.2"),
        ([(X, LABELS - 1)], LabelError, r"batch 0 of the loader has labels -1\.\.1; expected 0\.\.2"),
        ([GOOD, (X * torch.nan, LABELS)], CalibrationError, "module '2' has NaN.* in batch 1; check the inputs"),
        ([(torch.where(X[2, 1] == X, torch.inf, X), LABELS)], CalibrationError, "module '2' has NaN.* in batch 0"),
        ([(X * 1e30, LABELS)], CalibrationError, "module '2' has .*overflowing activations in batch 0"),
    ],
)
def test_bad_loaders(loader: Any, error: type[NNSError], message: str) -> None:
    with pytest.raises(error, match=message):
        calibrate(MODEL, loader, GROUPS)


def test_one_nan_of_many_is_found() -> None:
    x = torch.randn(32, 3, 16, 16)
    x[17, 1, 3, 5] = torch.nan
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1))
    with pytest.raises(CalibrationError, match="module '1' has NaN"):
        calibrate(model, [torch.randn(2, 3, 4, 4), x], (units("0", 4, "1"),))


@pytest.mark.parametrize("labels", [0, -1, [], ["a", "a"], [0, 1, 2], "abc"])
def test_bad_label_names(labels: Any) -> None:
    with pytest.raises(LabelError, match="labels must be a positive number or distinct names"):
        calibrate(MODEL, [GOOD], GROUPS, labels=labels)


def test_label_names() -> None:
    assert calibrate(MODEL, [GOOD], GROUPS).labels == ("0", "1", "2")
    assert calibrate(MODEL, [GOOD], GROUPS, labels=5).labels == ("0", "1", "2", "3", "4")
    assert calibrate(MODEL, [GOOD], GROUPS, labels=["a", "b", "c"]).labels == ("a", "b", "c")
    with pytest.raises(LabelError, match=r"labels 0\.\.2; expected 0\.\.1"):
        calibrate(MODEL, [GOOD], GROUPS, labels=2)


def test_a_model_whose_output_has_no_columns_needs_the_number_of_labels() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.Flatten(0))
    with pytest.raises(LabelError, match=r"the number of labels is unknown.*pass labels="):
        calibrate(model, [GOOD], GROUPS)
    assert calibrate(model, [GOOD], GROUPS, labels=3).labels == ("0", "1", "2")


def test_a_nan_threshold_is_refused() -> None:
    with pytest.raises(CalibrationError, match="threshold is nan"):
        calibrate(MODEL, [GOOD], GROUPS, threshold=float("nan"))


def test_groups_that_do_not_fit_the_model() -> None:
    with pytest.raises(
        CalibrationError, match="there are no unit groups to observe: nothing in this model can be pruned"
    ):
        calibrate(MODEL, [GOOD], ())
    with pytest.raises(CalibrationError, match="the model has no module 'nowhere'"):
        calibrate(MODEL, [GOOD], (units("0", 5, "nowhere"),))
    with pytest.raises(CalibrationError, match="module '1' is a ReLU; units can be observed at"):
        calibrate(MODEL, [GOOD], (units("0", 5, "1"),))
    with pytest.raises(GroupError, match=r"'2': positions 0\.\.5 are out of range, the axis has 5"):
        calibrate(MODEL, [GOOD], (units("0", 6, "2"),))


class Sometimes(nn.Module):
    """Runs one of its layers only for large inputs, and none for small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 3:
            return torch.zeros(len(x), 3)
        return self.second(x) if len(x) < 5 else self.second(self.first(x))


def test_layers_that_never_run_are_named() -> None:
    groups = (units("first", 4, "second"), units("other", 4, "first"))
    model, loader = Sometimes(), [(X[:4], LABELS[:4])]
    with pytest.raises(CalibrationError, match="module 'first' never ran during calibration"):
        calibrate(model, loader, groups)
    with pytest.raises(CalibrationError, match="module 'second' never ran during calibration"):
        calibrate(model, [(X[:2], LABELS[:2])], groups)
    mixed = calibrate(model, [(X[:2], LABELS[:2]), (X, LABELS)], groups).records
    assert int(mixed["in", "second"].inputs.sum()) == 6


class Shaped(nn.Module):
    """A layer behind a change of shape."""

    def __init__(self, layer: nn.Module, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.layer, self.change = nn.Linear(4, 4), layer, change

    def forward(self, x: Tensor) -> Any:
        return self.layer(self.change(x))


@pytest.mark.parametrize(
    ("layer", "change", "found"),
    [
        (nn.Linear(4, 3), lambda x: x.sum(0), r"torch.float32\[4\]"),
        (nn.Linear(4, 3), lambda x: x[:4], r"torch.float32\[4, 4\]"),
        (nn.Linear(4, 3), lambda x: x[None].expand(5, 6, 4), r"torch.float32\[5, 6, 4\]"),
        (nn.Conv2d(6, 3, 1), lambda x: x[:, None], r"torch.float32\[6, 1, 4\]"),
        (nn.LSTM(4, 3), lambda x: x, r"torch.float32\[6, 4\]"),
        (nn.LSTM(4, 3, batch_first=True), lambda x: x, r"torch.float32\[6, 4\]"),
        (nn.LSTM(4, 3), lambda x: x[None].expand(7, 6, 4)[:, :5], r"torch.float32\[7, 5, 4\]"),
        (
            nn.LSTM(4, 3, batch_first=True),
            lambda x: nn.utils.rnn.pack_padded_sequence(x[:, None], torch.ones(6), batch_first=True),
            "PackedSequence",
        ),
    ],
)
def test_activations_without_the_batch_in_front_are_refused(
    layer: nn.Module, change: Callable[[Tensor], Any], found: str
) -> None:
    width = getattr(layer, "in_channels", 4)
    with pytest.raises(CalibrationError, match=f"module 'layer' is {found}; expected .* the batch of 6"):
        calibrate(Shaped(layer, change), [X], (units("first", width, "layer"),))


def test_a_batch_of_one_hides_no_lost_dimension() -> None:
    """Any length is a multiple of 1."""
    for layer, change in (
        (nn.Linear(4, 3), lambda x: x[0]),
        (nn.LSTM(4, 3), lambda x: x),
        (nn.LSTM(1, 3), lambda x: x.T),
    ):
        width = getattr(layer, "in_features", getattr(layer, "input_size", 4))
        with pytest.raises(CalibrationError, match="module 'layer' is .* expected"):
            calibrate(Shaped(layer, change), [X[:1]], (units("first", width, "layer"),))


def test_a_progress_bar_is_shown_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    calibrate(MODEL, [GOOD, GOOD], GROUPS)
    assert capfd.readouterr().err == ""
    calibrate(MODEL, [GOOD, GOOD], GROUPS, progress=True)
    assert "calibrating" in capfd.readouterr().err
