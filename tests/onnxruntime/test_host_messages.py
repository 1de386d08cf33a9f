"""Errors of the exporter in one line."""

from __future__ import annotations

import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


from nns_plugin.adapters.onnxruntime.host_messages import reason as condensed  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("\x1b[96mone\x1b[0m\ntwo"), "ValueError: one"),
        (ValueError("Conflicts:\n  - batch is 2\n  - more"), "ValueError: Conflicts: - batch is 2"),
        (ValueError("Conflicts:"), "ValueError: Conflicts"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_reason_is_the_root_in_one_line(error: Exception, reason: str) -> None:
    outer = RuntimeError("next steps:\n- read the documentation")
    outer.__cause__ = error
    assert condensed(error) == condensed(outer) == reason
