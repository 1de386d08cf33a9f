"""Any criterion as an NNI pruner: what NNI's norm pruners do with weights, this one does with scores of units."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from nni.compression.base.compressor import Compressor
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.pruning.basic_pruner import _NormPruner
from nni.compression.pruning.tools import generate_sparsity, is_active_target
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from nns_plugin.adapters.nni.block_metrics import splits_units, unit_metric
from nns_plugin.adapters.nni.global_groups import decided_globally
from nns_plugin.adapters.nni.masks import apply_masks, masked_units, silencing_masks
from nns_plugin.adapters.nni.targets import Metrics, Spaces, aligned_target, check_targets
from nns_plugin.adapters.nni.wrappers import check_config_list, check_unwrapped, held_masks, plain_copy, wrappers_of
from nns_plugin.adapters.torch_pruning.graph import build_graph
from nns_plugin.adapters.torch_pruning.traced_units import TracedUnits, traced_units
from nns_plugin.criteria.contract import Criterion, Needs, UnscoredGroupWarning, score_groups
from nns_plugin.criteria.ties import separate_ties
from nns_plugin.errors import CriterionError, PruningError
from nns_plugin.models.inputs import device_of, run_model
from nns_plugin.models.layers import out_axis
from nns_plugin.models.preserve import preserved
from nns_plugin.statistics.calibration import calibrate
from nns_plugin.statistics.statistics import Statistics

ADVICE = "pass calibration=loader to collect them anew whenever masks are made"


class CriterionPruner(_NormPruner):
    """Any criterion as an NNI pruner.

    Use it like NNI's norm pruners: ``compress()`` makes masks at once, and schedulers such as ``LinearPruner`` and
    ``AGPPruner`` make them repeatedly while an evaluator trains. Masked units stay masked.

    Layers whose units the criterion cannot score, such as the one that writes the model's output, are named in a
    warning and stay whole. Whole units are scored, so layers that share units get the same mask; ``granularity`` may
    be any that leaves units whole, or joins some of them.

    Args:
        model: As for NNI's pruners.
        config_list: As for NNI's pruners.
        evaluator: As for NNI's pruners.
        existed_wrappers: As for NNI's pruners.
        example_inputs: Inputs that the model can run on: a tensor, or a tuple or mapping of tensors.
        calibration: Re-iterable; yields ``(inputs, labels)`` or ``inputs``.
        statistics: From :func:`nns_plugin.calibrate`, in place of a loader; valid until weights change.
        calibration_options: Options of :func:`nns_plugin.calibrate`.
        labels: The labels to keep, for a criterion that takes a label set.

    Raises:
        PruningError: If the config list is wrong or selects nothing, or the model is wrapped already.
        CriterionError: If something that the criterion needs is missing, or something is given that it does not take.
        GroupError: If the model cannot be traced.
        StaleStatisticsError: If the statistics belong to other weights.
    """

    _needs: ClassVar[Needs] = Needs()

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        example_inputs: Any,
        calibration: Iterable[Any] | None = None,
        statistics: Statistics | None = None,
        calibration_options: Mapping[str, Any] | None = None,
        labels: Sequence[int | str] | None = None,
    ) -> None:
        self._check_given(calibration, statistics, labels)
        check_unwrapped(model)
        check_config_list(model, config_list)
        if statistics is not None:
            statistics.check_current(model, advice=ADVICE)
        self._units = self._trace(model, example_inputs)
        self._example_inputs = example_inputs
        self._calibration, self._statistics, self._labels = calibration, statistics, labels
        self._options = {"gram": True} if self._needs.gram else {}
        self._options.update(calibration_options or {})
        try:
            super().__init__(model, config_list, evaluator, existed_wrappers)
        except Exception as error:  # assertions and errors of several libraries
            for wrapper in wrappers_of(model).values():
                wrapper.unwrap()
            raise PruningError(f"NNI refuses the config list: {_first_line(error)}") from error
        try:
            check_targets(self._target_spaces)
        except PruningError:
            self.unwrap_model()
            raise
        for name, spaces in self._target_spaces.items():
            bias = spaces.get("bias")
            if bias is not None and bias.align is not None and bias.align["module_name"] in (None, name):
                bias._setting["align"] = {**bias.align, "dims": [out_axis(model.get_submodule(name))]}

    @classmethod
    def from_compressor(
        cls,
        compressor: Compressor,
        new_config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        **options: Any,
    ) -> CriterionPruner:
        """Continue from another compressor, with its wrappers and its evaluator; see the class for the options."""
        wrapped = compressor._is_wrapped
        spaces = {name: dict(wrapper.pruning_target_spaces) for name, wrapper in compressor._module_wrappers.items()}
        try:
            made: CriterionPruner = super(_NormPruner, cls).from_compressor(
                compressor, new_config_list, evaluator=evaluator, **options
            )
        except Exception:
            for name, wrapper in compressor._module_wrappers.items():
                wrapper.pruning_target_spaces = spaces[name]
            if wrapped and not compressor._is_wrapped:
                compressor.wrap_model()
            raise
        return made

    def scores(self) -> dict[str, Tensor]:
        """The criterion's scores of each group that it can score, ``[U]`` float64, for the model as it is now."""
        return score_groups(self._criterion_now(), self._units.groups)

    def _trace(self, model: nn.Module, example_inputs: Any) -> TracedUnits:
        return traced_units(build_graph(model, example_inputs))

    def _criterion(self, model: nn.Module, statistics: Statistics | None) -> Criterion:
        """The criterion for a model, and for what is known of its units."""
        raise NotImplementedError

    def _criterion_now(self) -> Criterion:
        model = plain_copy(self.bound_model)
        if not self._observes():
            return self._criterion(model, None)
        if self._statistics is not None:
            self._statistics.check_current(model, advice=ADVICE)
            return self._criterion(model, self._statistics)
        assert self._calibration is not None
        masks = held_masks(self.bound_model)
        silent = silencing_masks(model, self._units.carriers, masked_units(model, self._units.groups, masks))
        apply_masks(model, masks)
        apply_masks(model, silent)
        return self._criterion(model, calibrate(model, self._calibration, self._units.groups, **self._options))

    def _collect_data(self) -> dict[str, Tensor]:
        """Scores of the groups that the config list is about."""
        found = self._criterion_now()
        selected = self._target_spaces.keys()
        concerned = [
            group
            for group in self._units.groups
            if any(port.name in selected for port in (*self._units.carriers.get(group.name, ()), *group.consumers))
        ]
        return score_groups(found, concerned)

    def _calculate_metrics(self, data: dict[str, Tensor]) -> Metrics:
        """Scores as NNI's metrics: one for each block of a target that its granularity keeps together."""
        masked = masked_units(self.bound_model, self._units.groups, held_masks(self.bound_model))
        wanted = [space.sparse_threshold for spaces in self._target_spaces.values() for space in spaces.values()]
        lowest = [float(values.min()) for values in data.values()]
        floor = min([*lowest, *(threshold for threshold in wanted if threshold is not None), 0.0]) - 1
        exact = {name: values.masked_fill(masked[name], floor) for name, values in data.items()}
        apart = {name: separate_ties(values, ordinal) for ordinal, (name, values) in enumerate(exact.items())}
        device = device_of(self.bound_model)
        metrics: Metrics = defaultdict(dict)
        left: dict[str, None] = {}
        for name, spaces in self._target_spaces.items():
            for target, space in spaces.items():
                if not is_active_target(space) or (space.type is TargetType.PARAMETER and space.target is None):
                    continue
                module, shape = self.bound_model.get_submodule(name), self._shape(name, space)
                if splits_units(space, shape):
                    metric: Tensor | None = self._weight_metric(name, space)
                else:
                    scores = exact if space.sparse_ratio is None else apart
                    metric = unit_metric(module, space, shape, self._units, scores, device)
                if metric is None:
                    left[name] = None
                else:
                    metrics[name][target] = metric
        if left:
            _warn_left(left)
        return metrics

    def _weight_metric(self, name: str, space: PruningTargetSpace) -> Tensor:
        """The metric of a target whose granularity splits units."""
        raise PruningError(
            f"granularity {space.granularity!r} of {name!r} asks for single weights, but {type(self).__name__} scores "
            "whole units; use 'default', or WSFPruner, which scores weights as well"
        )

    def _shape(self, name: str, space: PruningTargetSpace) -> list[int]:
        if space.shape is None:
            with preserved(self.bound_model), torch.no_grad():
                run_model(self.bound_model, self._example_inputs)
        if space.shape is None:
            raise PruningError(
                f"{name!r} did not run on the example inputs, so its outputs are unknown; pass inputs that reach it"
            )
        return list(space.shape)

    def _generate_sparsity(self, metrics: Metrics) -> dict[str, dict[str, Tensor]]:
        """Masks by NNI's own rules, of targets that are scored and of those aligned with them.

        Raises:
            PruningError: If a layer would lose all of its units, or is aligned with one that the config list leaves
                out; no mask changes then.
        """
        spaces: Spaces = defaultdict(dict)
        for name, targets in self._target_spaces.items():
            for target, space in targets.items():
                if target in metrics.get(name, {}):
                    spaces[name][target] = space
                elif not is_active_target(space) and space.align is not None:
                    found = aligned_target(self._target_spaces, name, target)
                    if found.align["target_name"] in metrics.get(found.align["module_name"], {}):
                        spaces[name][target] = found
        try:
            masks: dict[str, dict[str, Tensor]] = generate_sparsity(*decided_globally(metrics, spaces))
        except (AssertionError, KeyError, RuntimeError) as error:
            raise PruningError(
                f"NNI cannot make masks of this config list: {_first_line(error)}; layers that share a group id need "
                "the same number of blocks, and aligned targets the same width"
            ) from error
        for name, targets in spaces.items():
            for target, space in targets.items():
                if space.align is not None and target in masks[name]:
                    source = masks[space.align["module_name"]][space.align["target_name"]]
                    if source.dim() == len(space.align["dims"]):  # NNI would sum over all axes where none is left
                        masks[name][target] = source
        for name, targets in masks.items():
            for target, mask in targets.items():
                if not bool(mask.any()):
                    space = spaces[name][target]
                    rule = "sparse_ratio" if space.sparse_threshold is None else "sparse_threshold"
                    raise PruningError(
                        f"{rule} {getattr(space, rule)} would leave nothing of {target!r} of {name!r}; lower it, or "
                        "set max_sparse_ratio for this layer"
                    )
        return {name: {t: mask.float() for t, mask in targets.items()} for name, targets in masks.items()}

    def _set_default_sparse_granularity(self, target_space: PruningTargetSpace) -> str | None:
        # NNI means axis 0 by "out_channel", and axis 1 by "in_channel".
        if target_space.type is TargetType.PARAMETER:
            return "in_channel" if out_axis(target_space._wrapper.module) else "out_channel"
        return "per_channel"

    @classmethod
    def _observes(cls) -> bool:
        return "statistics" in cls._needs.requires

    @classmethod
    def _check_given(
        cls, calibration: Iterable[Any] | None, statistics: Statistics | None, labels: Sequence[int | str] | None
    ) -> None:
        if labels is not None and not cls._needs.labels:
            raise CriterionError(f"{cls.__name__} takes no labels; leave labels out, or use SemanticPruner")
        given = [calibration is not None, statistics is not None]
        if cls._observes() and sum(given) != 1:
            found = "both" if all(given) else "neither"
            raise CriterionError(
                f"{cls.__name__} scores activations, and {found} of calibration and statistics is given; "
                "pass calibration=loader, or statistics of nns_plugin.calibrate"
            )
        if not cls._observes() and any(given):
            raise CriterionError(f"{cls.__name__} scores weights; leave calibration and statistics out")
        if calibration is not None and (not isinstance(calibration, Iterable) or isinstance(calibration, Iterator)):
            raise CriterionError("calibration must yield batches anew each time; pass a loader or a list of batches")


def _warn_left(names: Iterable[str]) -> None:
    warnings.warn(
        f"left whole: {', '.join(map(repr, names))}, of which no unit is scored: they write the model's output, or "
        "their units cannot be followed or scored; leave them out with exclude_op_names",
        UnscoredGroupWarning,
        stacklevel=5,
    )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'a value is out of range'}"
