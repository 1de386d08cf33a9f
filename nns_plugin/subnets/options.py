"""Options of an extraction: what decides which units stay, the rules between options, and their defaults."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from nns_plugin.compensation.options import Compensation, Method
from nns_plugin.criteria.contract import needs_of, options_of
from nns_plugin.criteria.registry import BUILT_IN, available, find
from nns_plugin.errors import CriterionError, RecipeError
from nns_plugin.subnets.angles import Angles
from nns_plugin.subnets.option_checks import as_tuple, check, check_choice, check_count, check_number

Head = Literal["keep", "closed", "open"]
Framework = Literal["torch_pruning", "nni"]

CONFIDENCE = 0.95
RATIO = 0.5
ROUNDINGS = (1, 8, 16)
EVIDENCE = ("statistics", "model", "snapshot")  # what an extraction can build a criterion from
TARGETS = ("target_latency_ms", "target_speedup")
NUMBERS = ("ratio", "zeta", "max_balanced_accuracy_drop", "confidence", *TARGETS, "ridge")
COUNTS = ("round_to", "max_unfolded")
SELECTIONS = ("ratio", "zeta", "angle", "max_balanced_accuracy_drop", "config_list", *TARGETS)
TOGETHER = frozenset({"max_balanced_accuracy_drop", "confidence", "roundings", *TARGETS})  # others exclude each other


@dataclass(frozen=True)
class ExtractionOptions:
    """What to extract from a model, and how.

    One of ``ratio``, ``zeta``, ``angle``, ``max_balanced_accuracy_drop`` and ``config_list`` decides how many units go;
    a ratio of 0.5 by default. Or ``target_latency_ms`` and ``target_speedup`` do, within ``max_balanced_accuracy_drop``
    if that is given, and try all ``roundings``.

    Attributes:
        labels: Labels to keep, by index or name; all by default.
        label_names: Name of each label of the dense model; their numbers by default.
        framework: The backend: ``"torch_pruning"`` or ``"nni"``.
        criterion: Name of the criterion; by default ``"semantic"`` with labels, else ``"distinctiveness"``.
        criterion_options: Options of the criterion. ``"distinctiveness"`` has ``mode="span"`` here unless units are
            selected by angles.
        compensation: How kept units take over; by default ``"merge"`` with ``angle``, ``"refit"`` with
            ``"distinctiveness"``, else ``"none"``.
        sequential: See :class:`nns_plugin.compensation.options.Compensation`, as for the next three.
        recalibrate_batch_norms: Whether batch norms are recalibrated.
        ridge: For ``"refit"``.
        max_unfolded: For ``"refit"``.
        angle: Selects units by the angles between their vectors.
        ratio: Share of units to remove, in [0, 1).
        zeta: Keep units that score at least this, in [0, 1].
        max_balanced_accuracy_drop: Search the smallest subnet whose mean balanced accuracy over the labels is at most
            this far (0.02: two points) under the dense model's.
        confidence: Confidence level of the bound on that drop in each trial, in [0.5, 0.999]; 0.95 by default. It is
            the share of the bootstrap resamples of the validation data in which the bound must hold. More data, and a
            lower confidence, allow smaller subnets.
        config_list: NNI's config list, with framework ``"nni"``.
        target_latency_ms: Maximum median latency in milliseconds.
        target_speedup: Minimum speed-up (ratio of medians, dense over subnet).
        roundings: Multiples of channels to try for a target; 1, 8 and 16 by default.
        global_pruning: Whether to rank the units of all groups together.
        round_to: Keep a multiple of this many units in each group.
        ignored_layers: Names of layers whose outputs must stay whole.
        head: ``"open"`` (the default with labels) adds an output "other" for every other label, ``"closed"`` has the
            kept labels alone, ``"keep"`` leaves the head as it is.
        calibrate_head: Whether to shift the output "other" for the best balanced accuracy on the validation data. The
            dense model is not shifted, so a budget can be spent on that.

    Raises:
        RecipeError: If an option is out of range, or options contradict each other.
        CriterionError: If the criterion needs something that an extraction cannot provide.
    """

    labels: tuple[int | str, ...] | None = None
    label_names: tuple[str, ...] | None = None
    framework: Framework = "torch_pruning"
    criterion: str | None = None
    criterion_options: Mapping[str, Any] = field(default_factory=dict)
    compensation: Method | None = None
    sequential: bool = False
    recalibrate_batch_norms: bool = True
    ridge: float = 1e-4
    max_unfolded: int = 8192
    angle: Angles | None = None
    ratio: float | None = None
    zeta: float | None = None
    max_balanced_accuracy_drop: float | None = None
    confidence: float | None = None
    config_list: tuple[Mapping[str, Any], ...] | None = None
    target_latency_ms: float | None = None
    target_speedup: float | None = None
    roundings: tuple[int, ...] | None = None
    global_pruning: bool = False
    round_to: int = 1
    ignored_layers: tuple[str, ...] = ()
    head: Head | None = None
    calibrate_head: bool = False

    def __post_init__(self) -> None:
        for name in ("labels", "label_names", "ignored_layers", "config_list", "roundings"):
            object.__setattr__(self, name, as_tuple(name, getattr(self, name)))
        if self.labels is not None:
            object.__setattr__(self, "labels", tuple(_plain(label) for label in self.labels))
        if self.label_names is not None:
            object.__setattr__(self, "label_names", tuple(str(name) for name in self.label_names))
        self._check_values()
        for name, kind in (*dict.fromkeys(NUMBERS, float).items(), *dict.fromkeys(COUNTS, int).items()):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, kind(getattr(self, name)))
        if self.roundings is not None:
            object.__setattr__(self, "roundings", tuple(int(multiple) for multiple in self.roundings))
        self._check_rules()

    @classmethod
    def of(cls, settings: Mapping[str, Any], options: ExtractionOptions | None = None) -> ExtractionOptions:
        """Options given by name, on top of others.

        Raises:
            RecipeError: If there is no such option, or one is wrong.
        """
        known = [each.name for each in fields(cls)]
        for name in settings:
            if name not in known:
                raise RecipeError(f"there is no option {name!r}; the options are {', '.join(known)}")
        if not isinstance(options, (cls, type(None))):
            raise RecipeError(
                f"options is {options!r}; expected ExtractionOptions. Give options of a criterion as criterion_options"
            )
        return replace(options or cls(), **settings)

    def _check_values(self) -> None:
        if self.labels is not None:
            allowed = all(isinstance(label, (int, str)) and not isinstance(label, bool) for label in self.labels)
            check("labels", self.labels, bool(self.labels) and allowed, "at least one label, by index or name")
        check("ignored_layers", self.ignored_layers, all(isinstance(n, str) for n in self.ignored_layers), "names")
        check_choice("framework", self.framework, Framework)
        check("criterion", self.criterion, isinstance(self.criterion, (str, type(None))), "its name")
        if self.criterion is not None and self.criterion not in BUILT_IN:
            names = available()
            check("criterion", self.criterion, self.criterion in names, f"one of {', '.join(sorted(names))}")
        check("criterion_options", self.criterion_options, isinstance(self.criterion_options, Mapping), "a mapping")
        check("angle", self.angle, isinstance(self.angle, (Angles, type(None))), "Angles")
        for name, kind in (("compensation", Method), ("head", Head)):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), kind)
        for name, low, high in (("ratio", 0, 1), ("zeta", 0, 1), ("max_balanced_accuracy_drop", 0, 1)):
            check_number(name, getattr(self, name), low, high, below=name == "ratio")
        check_number("confidence", self.confidence, 0.5, 0.999)
        for name in (*TARGETS, "ridge"):
            check_number(name, getattr(self, name), 0, math.inf, above=True)
        for name in COUNTS:
            check_count(name, getattr(self, name))
        for name in ("roundings", "config_list"):
            check(name, getattr(self, name), getattr(self, name) != (), "at least one entry")
        for multiple in self.roundings or ():
            check_count("roundings", multiple)
        for config in self.config_list or ():
            check("config_list", config, isinstance(config, Mapping), "a mapping in each entry")
        for name in ("sequential", "global_pruning", "recalibrate_batch_norms", "calibrate_head"):
            check(name, getattr(self, name), isinstance(getattr(self, name), bool), "True or False")

    def _check_rules(self) -> None:
        given = [name for name in SELECTIONS if getattr(self, name) is not None]
        if len(given) > 1 and not TOGETHER.issuperset(given):
            raise RecipeError(f"{' and '.join(given)} exclude each other; give one of them")
        if self.confidence is not None and self.max_balanced_accuracy_drop is None:
            raise RecipeError("confidence requires max_balanced_accuracy_drop: it is the confidence level of its bound")
        if self.roundings is not None and not self.has_target:
            raise RecipeError("roundings require target_latency_ms or target_speedup; without these, give round_to")
        if self.has_target and self.round_to != 1:
            raise RecipeError(f"round_to is {self.round_to}; with a target for latency give roundings: [1, 8, 16]")
        if self.angle is not None:
            self._check_angle()
        if self.framework == "nni":
            self._check_nni()
        elif self.config_list is not None:
            raise RecipeError(f"config_list requires framework nni, not {self.framework}")
        if self.labels is None and self.head in ("closed", "open"):
            raise RecipeError(f"head {self.head!r} needs labels; name some, or use head: keep")
        if self.calibrate_head and self.effective_head != "open":
            raise RecipeError(f"calibrate_head requires head open, not {self.effective_head}")
        if self.sequential and self.effective_method not in ("refit", "least_squares"):
            raise RecipeError(f"sequential requires refit or least_squares, not {self.effective_method}")
        if self.global_pruning and (self.zeta is not None or self.angle is not None):
            raise RecipeError("global_pruning requires ratio, not zeta or angle")

    def _check_angle(self) -> None:
        if self.framework == "nni":
            raise RecipeError("angle requires framework torch_pruning, not nni, whose masks have no survivors")
        if self.effective_criterion != "distinctiveness":
            raise RecipeError(f"angle requires criterion distinctiveness, not {self.effective_criterion}")
        if self.compensation not in (None, "merge"):
            raise RecipeError(f"angle requires compensation merge, not {self.compensation}")
        if self.round_to != 1:
            raise RecipeError("round_to requires ratio or zeta, not angle")

    def _check_nni(self) -> None:
        if self.effective_roundings != (1,) and self.has_target:
            raise RecipeError(f"roundings is {list(self.roundings or ())}; NNI's masks cannot be rounded: give [1]")
        if self.round_to != 1:
            raise RecipeError(f"round_to is {self.round_to}; NNI's masks cannot be rounded: give 1")
        if self.global_pruning:
            raise RecipeError(
                "global_pruning ranks units, but NNI ranks shares of weights: set global_group_id in a config_list"
            )

    @property
    def has_target(self) -> bool:
        """Whether a latency must be met."""
        return any(getattr(self, name) is not None for name in TARGETS)

    @property
    def effective_roundings(self) -> tuple[int, ...]:
        """Multiples that numbers of units are rounded to; with a target for latency all of them are tried."""
        if not self.has_target:
            return (self.round_to,)
        return tuple(dict.fromkeys(self.roundings or ((1,) if self.framework == "nni" else ROUNDINGS)))

    @property
    def effective_head(self) -> Head:
        """The head: ``open`` with a label set and ``keep`` without, unless one is named."""
        return self.head or ("keep" if self.labels is None else "open")

    @property
    def effective_criterion(self) -> str:
        """Name of the criterion: by default ``semantic`` with a label set, and ``distinctiveness`` without."""
        if self.criterion is not None:
            return self.criterion
        return "semantic" if self.labels is not None and self.angle is None else "distinctiveness"

    @property
    def effective_criterion_options(self) -> dict[str, Any]:
        """Options of the criterion: ``distinctiveness`` scores by ``"span"`` by default, for angles pair by pair."""
        by_span = self.effective_criterion == "distinctiveness" and self.angle is None
        return ({"mode": "span"} if by_span else {}) | dict(self.criterion_options)

    @property
    def effective_method(self) -> Method:
        """How survivors take over: ``merge`` after a selection by angles, else ``refit`` with ``distinctiveness``."""
        if self.compensation is not None:
            return self.compensation
        if self.angle is not None:
            return "merge"
        return "refit" if self.effective_criterion == "distinctiveness" else "none"

    @property
    def effective_compensation(self) -> Compensation:
        """How kept units take over, with nothing left open."""
        return Compensation(
            self.effective_method, self.sequential, self.recalibrate_batch_norms, self.ridge, self.max_unfolded
        )

    @property
    def effective_confidence(self) -> float | None:
        """Confidence level of the bound on the drop; ``None`` without a budget."""
        if self.max_balanced_accuracy_drop is None:
            return None
        return CONFIDENCE if self.confidence is None else self.confidence

    @property
    def needs_gram(self) -> bool:
        """Whether compensation or the criterion needs Gram matrices."""
        return self.effective_method != "none" or needs_of(self.criterion_class).gram

    @functools.cached_property
    def criterion_class(self) -> type[Any]:
        """The criterion, after a check of its options.

        Raises:
            CriterionError: If it needs something that an extraction cannot provide.
            RecipeError: If it has no such option.
        """
        name, criterion = self.effective_criterion, find(self.effective_criterion)
        missing = [need for need in needs_of(criterion).requires if need not in EVIDENCE]
        if missing:
            raise CriterionError(
                f"criterion {name!r} needs {', '.join(missing)}, which an extraction cannot provide; use its "
                "importance class in nns_plugin.adapters.torch_pruning"
            )
        allowed = options_of(criterion)
        for option in self.effective_criterion_options:
            if option not in allowed:
                raise RecipeError(f"criterion.options: found {option!r}; {name!r} has the options {', '.join(allowed)}")
        return criterion

    @property
    def selection(self) -> dict[str, Any]:
        """What decides how many units go, for the provenance of a subnet."""
        given = {name: getattr(self, name) for name in SELECTIONS if getattr(self, name) is not None}
        if self.angle is not None:
            given["angle"] = asdict(self.angle)
        if self.config_list is not None:
            given["config_list"] = [dict(config) for config in self.config_list]
        more = {name: getattr(self, name) for name in ("sequential", "global_pruning", "round_to")}
        more["confidence"] = self.effective_confidence
        if self.has_target:
            more["roundings"] = list(self.effective_roundings)
        return (given or {"ratio": RATIO}) | {k: value for k, value in more.items() if value not in (None, False, 1)}


def _plain(label: Any) -> Any:
    """A label as a Python integer or string: NumPy and torch have integers of their own."""
    if isinstance(label, (str, bool)):
        return label
    try:
        return operator.index(label)
    except TypeError:
        return label
