"""Layers: views of weights and activations against the layers' own forwards, for every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nns_plugin.models.layers import (
    Layout,
    axis_length,
    broadcast_to_activation,
    broadcast_to_weight,
    by_channel,
    by_input,
    by_output,
    channel_axis,
    channel_groups,
    consumer_matrices,
    is_batch_norm,
    is_depthwise,
    is_norm_over_units,
    is_plain_convolution,
    narrow_inputs,
    out_axis,
    output_matrix,
    set_consumer_matrices,
    set_unfolded_weight,
    unfolded_input,
    unfolded_weight,
    weight_axis,
)

LAYERS = [
    (nn.Linear(5, 3), (7, 4, 5)),
    (nn.Conv1d(4, 6, 3, padding=1, stride=2, groups=2), (3, 4, 11)),
    (nn.Conv2d(4, 6, 3, padding=2, dilation=2), (3, 4, 9, 8)),
    (nn.Conv2d(4, 6, 4, padding="same", padding_mode="reflect"), (3, 4, 9, 8)),
    (nn.Conv3d(4, 6, (3, 2, 1), padding=1, stride=(1, 2, 1)), (3, 4, 5, 6, 4)),
    (nn.ConvTranspose1d(4, 6, 3, stride=3, dilation=2), (3, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (3, 4, 5, 6)),
]


NAMES = [str(layer).split("(")[0] + str(place) for place, (layer, _) in enumerate(LAYERS)]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=NAMES)
def test_a_layer_is_a_matrix_product(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with torch.no_grad():
        weights = unfolded_weight(layer).float()
        expected = output_matrix(layer, layer(x))
        bias = layer.bias.reshape(weights.shape[0], -1, 1)
        torch.testing.assert_close(weights @ unfolded_input(layer, x) + bias, expected, atol=1e-5, rtol=1e-5)
        before = layer.weight.clone()
        set_unfolded_weight(layer, weights)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=NAMES)
def test_factors_of_in_positions_act_alike_on_inputs_and_on_weights(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x, factors = torch.randn(shape), torch.rand(axis_length(layer, "in", "it")) + 0.5
    weight = layer.weight * broadcast_to_weight(layer, factors, "in", layer.weight.shape)
    with torch.no_grad():
        expected = layer(x * broadcast_to_activation(layer, factors, x.dim()))
        found = torch.func.functional_call(layer, {"weight": weight}, x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=NAMES)
def test_factors_of_out_positions_act_alike_on_outputs_and_on_weights(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x, factors = torch.randn(shape), torch.rand(axis_length(layer, "out", "it")) + 0.5
    weight = layer.weight * broadcast_to_weight(layer, factors, "out", layer.weight.shape)
    bias = layer.bias * factors
    with torch.no_grad():
        expected = layer(x)
        expected = expected * broadcast_to_activation(layer, factors, expected.dim())
        found = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=NAMES)
def test_weights_by_position_are_those_that_a_factor_of_the_position_reaches(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    for side, view in (("in", by_input), ("out", by_output)):
        positions = torch.arange(float(axis_length(layer, side, "it")))
        numbered = view(layer, broadcast_to_weight(layer, positions, side, layer.weight.shape))
        assert len(numbered) == len(positions)
        assert torch.equal(numbered.flatten(1), positions[:, None].expand(-1, numbered[0].numel()))
        axis = weight_axis(layer, side)
        if axis is None:
            assert channel_groups(layer) > 1
        else:
            assert torch.equal(
                layer.weight.movedim(axis, 0).flatten(1).sum(1), view(layer, layer.weight).flatten(1).sum(1)
            )


def test_the_weights_of_a_grouped_layer_by_input_are_those_that_read_it() -> None:
    layer = nn.Conv1d(4, 6, 1, groups=2)
    read = by_input(layer, layer.weight)
    assert read.shape == (4, 3, 1)
    assert torch.equal(read[2], layer.weight[3:, 0])
    assert torch.equal(read[1], layer.weight[:3, 1])


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=NAMES)
def test_consumer_matrices_are_written_back(layer: nn.Module, shape: tuple[int, ...]) -> None:
    positions = torch.arange(axis_length(layer, "in", "it"))
    matrices = consumer_matrices(layer, Layout(positions, positions))
    assert matrices is not None
    assert len(matrices) == channel_groups(layer)
    before = layer.weight.clone()
    set_consumer_matrices(layer, [2 * matrix for matrix in matrices])
    torch.testing.assert_close(layer.weight, 2 * before)
    set_consumer_matrices(layer, matrices)
    assert torch.equal(layer.weight, before)


def test_a_linear_layer_behind_a_flatten_reads_maps() -> None:
    layer = nn.Linear(6, 2)
    channel = torch.tensor([0, 0, 0, 1, 1, 1])
    found = consumer_matrices(layer, Layout(channel, torch.arange(2)))
    assert found is not None
    assert found[0].shape == (2, 3, 2)
    assert torch.equal(found[0][1, :, 1].float(), layer.weight[1, 3:])
    uneven = Layout(torch.tensor([0, 0, 0, 0, 1, 1]), torch.arange(2))
    assert consumer_matrices(layer, uneven) is None
    assert consumer_matrices(nn.Embedding(3, 2), uneven) is None


def test_a_recurrent_layer_reads_in_both_directions() -> None:
    layer = nn.GRU(3, 2, bidirectional=True)
    found = consumer_matrices(layer, Layout(torch.arange(3), torch.arange(3)))
    assert found is not None
    assert torch.equal(found[0][:, 0].float(), torch.cat([layer.weight_ih_l0, layer.weight_ih_l0_reverse]))
    set_consumer_matrices(layer, [found[0] * 0])
    assert not bool(layer.weight_ih_l0_reverse.any())
    assert bool(layer.weight_hh_l0.any())


def test_inputs_are_narrowed_in_place() -> None:
    layer = nn.Linear(5, 3)
    x, indices = torch.randn(2, 5), torch.tensor([0, 3])
    with torch.no_grad():
        layer.weight[:, [1, 2, 4]] = 0
        expected = layer(x)
        narrow_inputs(layer, indices)
        torch.testing.assert_close(layer(x[:, indices]), expected)
    assert layer.in_features == 2


def test_channels_of_an_activation() -> None:
    convolution, linear = nn.Conv2d(3, 3, 1), nn.Linear(3, 3)
    assert (channel_axis(convolution), channel_axis(linear)) == (1, -1)
    image, rows = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 3)
    assert torch.equal(by_channel(convolution, image)[1], image[:, 1].flatten())
    assert torch.equal(by_channel(linear, rows)[1], rows[..., 1].flatten())


def test_out_axis_of_layers_that_are_no_matrix_product() -> None:
    assert out_axis(nn.Embedding(9, 4)) == 1
    assert out_axis(nn.BatchNorm1d(4)) == 0
    assert out_axis(nn.ConvTranspose2d(4, 6, 3)) == 1
    assert out_axis(nn.ConvTranspose2d(4, 6, 3, groups=2)) == 0


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), True),
        (nn.Conv2d(4, 8, 3, groups=4), False),
        (nn.Conv2d(1, 1, 3), False),
        (nn.Conv2d(4, 4, 3, groups=2), False),
        (nn.ConvTranspose2d(4, 4, 3, groups=4), True),
        (nn.Linear(4, 4), False),
    ],
    ids=str,
)
def test_depthwise(layer: nn.Module, expected: bool) -> None:
    assert is_depthwise(layer) is expected


def test_plain_convolutions_are_neither_grouped_nor_transposed() -> None:
    assert is_plain_convolution(nn.Conv1d(2, 2, 1))
    assert not any(
        map(is_plain_convolution, (nn.ConvTranspose1d(2, 2, 1), nn.Conv1d(2, 2, 1, groups=2), nn.Linear(2, 2)))
    )


def test_norms_are_of_two_kinds() -> None:
    each = [nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.BatchNorm3d(4)]
    together = [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)]
    assert all(is_batch_norm(norm) and not is_norm_over_units(norm) for norm in each)
    assert all(is_norm_over_units(norm) and not is_batch_norm(norm) for norm in together)
    assert not is_batch_norm(None)
    assert not is_norm_over_units(nn.Linear(4, 4))
