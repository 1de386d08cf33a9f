"""Label sets: names and indices resolved once."""

from __future__ import annotations

import pytest

from nns_plugin.errors import LabelError
from nns_plugin.labels import LabelSet

NAMES = ("ant", "bee", "cat", "dog")


def test_labels_are_resolved_by_name_and_index_ascending_and_once_each() -> None:
    labels = LabelSet.of(NAMES, ["dog", 1, "bee", "3"])
    assert labels.indices == (1, 3)
    assert labels.kept_names == ("bee", "dog")
    assert labels.outputs == (0, 1, 2, 3)
    assert not labels.keeps_all
    assert LabelSet.of(NAMES).keeps_all


def test_outputs_of_each_head() -> None:
    labels = LabelSet.of(NAMES, [3, 1])
    assert labels.closed().output_names == ("bee", "dog")
    assert labels.opened().output_names == ("bee", "dog", "other")
    assert (labels.closed().other, labels.opened().other) == (None, 2)
    assert labels.opened().with_all_outputs() == labels


def test_a_name_goes_before_an_index_and_an_index_that_is_another_name_is_ambiguous() -> None:
    assert LabelSet.of(["1", "0", "2"], ["0", "2"]).indices == (1, 2)
    with pytest.raises(
        LabelError, match='label 0 is ambiguous: it is an index, and the name of label number 1; write "0"'
    ):
        LabelSet.of(["1", "0", "2"], [0])


@pytest.mark.parametrize("label", ["fox", 4, -1, True, 1.0])
def test_unknown_labels_are_refused(label: object) -> None:
    with pytest.raises(LabelError, match=r"does not exist; expected an index in 0\.\.3 or one of ant, bee, cat, dog"):
        LabelSet.of(NAMES, [label])  # type: ignore[list-item]


def test_names_must_be_distinct() -> None:
    with pytest.raises(LabelError, match="expected distinct names"):
        LabelSet.of(["a", "a"])
