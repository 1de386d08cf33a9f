"""Labels: names, indices, and the set of labels that a subnet keeps."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nns_plugin.errors import LabelError

OTHER = "other"


@dataclass(frozen=True)
class LabelSet:
    """The labels that a subnet keeps, and the label of each of its outputs.

    Attributes:
        names: Names of all labels of the dense model.
        indices: Indices of the kept labels, ascending.
        outputs: The label of each output; ``None`` for "other".
    """

    names: tuple[str, ...]
    indices: tuple[int, ...]
    outputs: tuple[int | None, ...]

    @classmethod
    def of(cls, names: Iterable[Any], labels: Sequence[int | str] | None = None) -> LabelSet:
        """Resolve labels given by name or by index; the outputs are those of the dense model.

        Args:
            names: Name of each label, distinct.
            labels: The labels to keep; all of them by default.

        Raises:
            LabelError: If names are not distinct, or a label is unknown, or an index is the name of another label.

        Example:
            >>> LabelSet.of(["ant", "bee", "cat"], ["cat", 0]).kept_names
            ('ant', 'cat')
        """
        every = tuple(str(name) for name in names)
        if len(set(every)) != len(every):
            raise LabelError(f"the label names are {every}; expected distinct names")
        whole = tuple(range(len(every)))
        if labels is None:
            return cls(every, whole, whole)
        for label in labels:
            if isinstance(label, int) and str(label) in every and every.index(str(label)) != label:
                raise LabelError(
                    f"label {label} is ambiguous: it is an index, and the name of label number "
                    f'{every.index(str(label))}; write "{label}" for the name'
                )
        return cls(every, tuple(sorted({resolve_label(label, every) for label in labels})), whole)

    @property
    def kept_names(self) -> tuple[str, ...]:
        """Names of the kept labels."""
        return tuple(self.names[label] for label in self.indices)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Name of each output."""
        return tuple(OTHER if label is None else self.names[label] for label in self.outputs)

    @property
    def keeps_all(self) -> bool:
        """Whether every label is kept."""
        return len(self.indices) == len(self.names)

    @property
    def other(self) -> int | None:
        """Index of the output "other"; ``None`` if there is none."""
        return self.outputs.index(None) if None in self.outputs else None

    def with_all_outputs(self) -> LabelSet:
        """The same labels, with the outputs of the dense model."""
        return replace(self, outputs=tuple(range(len(self.names))))

    def closed(self) -> LabelSet:
        """The same labels, with one output for each."""
        return replace(self, outputs=self.indices)

    def opened(self) -> LabelSet:
        """The same labels, with one output for each, and "other"."""
        return replace(self, outputs=(*self.indices, None))


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
