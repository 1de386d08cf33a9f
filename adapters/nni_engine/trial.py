"""A trial's side of NNI: the parameters that it receives, and the numbers that it reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nns_plugin.errors import MissingExtraError

try:
    import nni
except ImportError as error:
    raise MissingExtraError("nni", "nni") from error


def next_trial() -> tuple[dict[str, Any], int]:
    """The tuner's choice, and the number of the trial."""
    parameters = nni.get_next_parameter()
    return dict(parameters), int(nni.get_sequence_id())


def report(numbers: Mapping[str, Any]) -> None:
    """Report numbers to the tuner, which optimises ``"default"``."""
    nni.report_final_result(dict(numbers))
