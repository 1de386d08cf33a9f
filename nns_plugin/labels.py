"""Labels: names, indices, and the label set that a subnet keeps."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from nns_plugin.errors import LabelError

OTHER = "other"


def resolve_label(label: int | str, names: Sequence[str]) -> int:
    """Index of a label given by name or by index.

    Raises:
        LabelError: If there is no such label.
    """
    if isinstance(label, str):
        if label in names:
            return names.index(label)
        label = int(label) if label.isdecimal() else label
    try:
        index = -1 if isinstance(label, (bool, str)) else operator.index(label)
    except TypeError:
        index = -1
    if 0 <= index < len(names):
        return index
    raise LabelError(
        f"label {label!r} does not exist; expected an index in 0..{len(names) - 1} or one of {', '.join(names)}"
    )
