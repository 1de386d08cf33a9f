"""Float32 arithmetic on GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


from nns_plugin.adapters.onnxruntime.modes import ieee_float32  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")


def test_tf32_is_off_inside_and_put_back() -> None:
    cudnn: Any = torch.backends.cudnn
    backends: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    before = [backend.fp32_precision for backend in backends]
    assert before != ["ieee"] * 3
    inside = []

    def fail() -> None:
        with ieee_float32():
            inside.extend(backend.fp32_precision for backend in backends)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == ["ieee"] * 3
    assert [backend.fp32_precision for backend in backends] == before
