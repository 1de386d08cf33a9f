"""The sections of a recipe and their fields, checked before anything runs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from nns_plugin.compensation.least_squares import Merge
from nns_plugin.compensation.options import Method
from nns_plugin.criteria import available
from nns_plugin.errors import MissingExtraError
from nns_plugin.selection import Complement
from nns_plugin.subnets.angles import Angles
from nns_plugin.subnets.options import ExtractionOptions, Framework, Head

try:
    from pydantic import (
        BaseModel,
        ConfigDict,
        Field,
        StrictInt,
        StrictStr,
        field_validator,
        model_validator,
    )
except ModuleNotFoundError as error:
    raise MissingExtraError("pydantic", "cli") from error

WEIGHTS = ("checkpoint", "initial")  # fields of the section model that are paths
Factory = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]


class Section(BaseModel):
    """A section of the recipe; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """Where the model comes from."""

    factory: Factory
    arguments: dict[str, Any] = {}
    checkpoint: Path | None = None
    initial: Path | None = None


class DataSection(Section):
    """Where the data comes from."""

    factory: Factory
    arguments: dict[str, Any] = {}


class CriterionSection(Section):
    """The criterion that scores the units, and its options."""

    name: str | None = None
    options: dict[str, Any] = {}

    @field_validator("name")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        names = available()
        if name is not None and name not in names:
            raise ValueError(f"expected one of {', '.join(sorted(names))}")
        return name


class CompensationSection(Section):
    """How kept units compensate for removed ones; see :class:`nns_plugin.compensation.options.Compensation`."""

    method: Method | None = None
    sequential: bool = False
    ridge: float = Field(default=1e-4, gt=0)
    max_unfolded: int = Field(default=8192, ge=1)


class AngleSection(Section):
    """Selection by angles between units' vectors, in degrees, and how survivors compensate for removed units."""

    similar: float = Field(default=15.0, ge=0, le=180)
    complementary: float = Field(default=165.0, ge=0, le=180)
    complement: Complement = "one"
    merge: Merge = "scaled"


class TrainingSection(Section):
    """Training with AdamW and a one-cycle schedule."""

    epochs: int = Field(default=0, ge=0)
    learning_rate: float = Field(default=0.003, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)


class FineTuningSection(TrainingSection):
    """Training after removal, with a lower learning rate."""

    learning_rate: float = Field(default=0.001, gt=0)


class IterativeSection(Section):
    """Iterative pruning: prune and fine-tune in turns until the mean balanced accuracy on validation data drops."""

    max_rounds: int = Field(default=10, ge=1)
    max_drop: float = Field(default=0.0, ge=0, le=1)


class SynapsesSection(Section):
    """Masks of single weights after removal, in the given linear layers; in all but the head by default."""

    rule: Literal["mean_weight"] = "mean_weight"
    layers: list[str] | None = Field(default=None, min_length=1)


class ExportSection(Section):
    """How models are exported to ONNX."""

    opset: int | None = Field(default=None, ge=18)


class MeasureSection(Section):
    """How parity and latency are measured, and how many bootstrap resamples the intervals of accuracies take."""

    provider: str = "cpu"
    threads: int = Field(default=1, ge=1)
    batch: int = Field(default=1, ge=1)
    samples: int = Field(default=300, ge=20)
    resamples: int = Field(default=1000, ge=0)
    rtol: float = Field(default=1e-3, ge=0)
    atol: float = Field(default=1e-5, ge=0)


class ExtractionSection(Section):
    """What to extract from a model, and how; see :class:`nns_plugin.subnets.options.ExtractionOptions`."""

    framework: Framework = "torch_pruning"
    labels: list[StrictInt | StrictStr] | None = Field(default=None, min_length=1)
    criterion: CriterionSection = CriterionSection()
    compensation: CompensationSection = CompensationSection()
    angle: AngleSection | None = None
    ratio: float | None = Field(default=None, ge=0, lt=1)
    zeta: float | None = Field(default=None, ge=0, le=1)
    max_balanced_accuracy_drop: float | None = Field(default=None, ge=0, le=1)
    confidence: float | None = Field(default=None, ge=0.5, le=0.999)
    config_list: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    target_latency_ms: float | None = Field(default=None, gt=0)
    target_speedup: float | None = Field(default=None, gt=0)
    roundings: list[Annotated[int, Field(ge=1)]] | None = Field(default=None, min_length=1)
    global_pruning: bool = False
    round_to: int = Field(default=1, ge=1)
    ignored_layers: list[str] = []
    recalibrate_batch_norms: bool = True
    head: Head | None = None
    calibrate_head: bool = False

    @field_validator("criterion", mode="before")
    @classmethod
    def _short_criterion(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> ExtractionSection:
        self.to_options()  # the rules between fields
        return self

    def to_options(self) -> ExtractionOptions:
        """The same for the room that extracts.

        Raises:
            RecipeError: If fields contradict each other.
        """
        names = [each.name for each in fields(ExtractionOptions) if each.name in ExtractionSection.model_fields]
        same = {name: getattr(self, name) for name in names}
        return ExtractionOptions(
            **same
            | {
                "criterion": self.criterion.name,
                "criterion_options": self.criterion.options,
                "compensation": self.compensation.method,
                "sequential": self.compensation.sequential,
                "ridge": self.compensation.ridge,
                "max_unfolded": self.compensation.max_unfolded,
                "angle": None if self.angle is None else Angles(**self.angle.model_dump()),
            }
        )


class SweepSection(Section):
    """Which fields ``nns sweep`` varies, and which metric it optimises.

    ``search`` gives, for each varied field of the recipe, a list of values or, for the tuners that sample, a
    distribution in NNI's notation: ``{_type: uniform, _value: [0.2, 0.8]}``.
    """

    search: dict[str, list[Any] | dict[str, Any]] = Field(min_length=1)
    tuner: Literal["GridSearch", "Random", "TPE"] = "GridSearch"
    trials: int = Field(default=20, ge=1)
    concurrency: int = Field(default=1, ge=1)
    max_minutes: float | None = Field(default=None, gt=0)
    metric: str = "subnet.evaluation.mean_balanced_accuracy"
    maximize: bool = True
    seed: int = 0

    @field_validator("search")
    @classmethod
    def _values(cls, search: dict[str, list[Any] | dict[str, Any]]) -> dict[str, list[Any] | dict[str, Any]]:
        for name, values in search.items():
            if not all(part.isidentifier() for part in name.split(".")) or name.partition(".")[0] == "sweep":
                raise ValueError(f"{name!r} is not a field of the recipe that can be searched")
            if not values or (isinstance(values, dict) and values.keys() != {"_type", "_value"}):
                raise ValueError(f"{name} is {values}; expected a list of values, or {{_type: ..., _value: ...}}")
        return search

    @model_validator(mode="after")
    def _lists(self) -> SweepSection:
        ranges = [name for name, values in self.search.items() if isinstance(values, dict)]
        if ranges and self.tuner == "GridSearch":
            raise ValueError(f"{ranges[0]} is a distribution, which needs tuner Random or TPE, not GridSearch")
        return self

    def space(self) -> dict[str, Any]:
        """The search space in NNI's notation."""
        return {
            name: values if isinstance(values, dict) else {"_type": "choice", "_value": values}
            for name, values in self.search.items()
        }


class Recipe(ExtractionSection):
    """A recipe: everything about a job."""

    model: ModelSection
    data: DataSection
    train: TrainingSection = TrainingSection()
    fine_tune: FineTuningSection = FineTuningSection()
    iterative: IterativeSection | None = None
    synapses: SynapsesSection | None = None
    export: ExportSection = ExportSection()
    measure: MeasureSection = MeasureSection()
    sweep: SweepSection | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _turns(self) -> Recipe:
        if self.iterative is None:
            return self
        options = self.to_options()
        if not self.fine_tune.epochs:
            raise ValueError("iterative fine-tunes after each removal: set fine_tune.epochs to at least 1")
        if options.has_target:
            raise ValueError("iterative removes the same share in each turn; drop target_latency_ms and target_speedup")
        if self.max_balanced_accuracy_drop is not None:
            raise ValueError("iterative has its own max_drop; give ratio, zeta or angle for what each turn removes")
        if options.effective_criterion == "wsf":
            raise ValueError("wsf needs weights from before training, which the smaller models of iterative lack")
        return self
