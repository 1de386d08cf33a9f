"""Batches: the one way to go through a loader."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nns_plugin.errors import CalibrationError
from nns_plugin.models.batches import batches, first_inputs

X, LABELS = torch.randn(6, 4), torch.arange(6) % 3


def test_batches_are_numbered_and_moved_to_the_models_device() -> None:
    model = nn.Linear(4, 3, device="meta")
    found = list(batches([(X, LABELS.int()), {"x": X[:2]}, [(X, X)]], model))
    assert [batch.number for batch in found] == [0, 1, 2]
    assert [batch.size for batch in found] == [6, 2, 6]
    assert found[0].labels is not None
    assert found[0].labels.dtype == torch.int64
    assert found[0].labels.device.type == "cpu"
    assert found[1].labels is None
    tensors = (found[0].inputs, found[1].inputs["x"], *found[2].inputs)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert next(batches([X])).inputs is X


def test_batches_without_inputs_are_skipped_and_keep_their_number() -> None:
    found = list(batches([X[:0], X]))
    assert [(batch.number, batch.size) for batch in found] == [(1, 6)]


@pytest.mark.parametrize("loader", [[], [X[:0]]], ids=["no batch", "no input"])
def test_a_loader_without_inputs_is_an_error(loader: list[Any]) -> None:
    with pytest.raises(CalibrationError, match="the test loader yielded no inputs; it must yield at least one batch"):
        list(batches(loader, name="test loader"))
    with pytest.raises(CalibrationError, match="the loader yielded no inputs"):
        first_inputs(loader)


@pytest.mark.parametrize("progress", [False, True])
def test_a_loader_is_asked_for_one_iterator(progress: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    expected = torch.Generator().manual_seed(0)
    for _ in DataLoader(TensorDataset(X), batch_size=2, shuffle=True, generator=expected):
        pass
    loader = DataLoader(TensorDataset(X), batch_size=2, shuffle=True, generator=generator)
    assert len(list(batches(loader, progress=progress))) == 3
    assert torch.equal(generator.get_state(), expected.get_state())


def test_an_iterator_that_is_used_up_is_named() -> None:
    used = iter([X])
    list(batches(used))
    with pytest.raises(CalibrationError, match="at least one batch, anew each time: it is an iterator"):
        list(batches(used))


@pytest.mark.parametrize("loader", [5, "text", {"x": X}, X])
def test_what_yields_no_batches_is_refused(loader: Any) -> None:
    with pytest.raises(CalibrationError, match=f"the test loader is a {type(loader).__name__}; expected batches"):
        list(batches(loader, name="test loader"))


def test_errors_name_the_loader_and_the_batch() -> None:
    with pytest.raises(CalibrationError, match="batch 1 of the training loader has inputs of type str"):
        list(batches([X, "text"], name="training loader"))


def test_the_first_inputs_are_on_the_models_device() -> None:
    assert first_inputs([X], nn.Linear(1, 1, device="meta")).device.type == "meta"
    assert torch.equal(first_inputs([(X, LABELS)]), X)
