"""What a recipe may ask for besides one cut: pruning and fine-tuning in turns, and masks on single weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.utils import prune

from nns_plugin.adapters.torch_pruning.backend import TorchPruningBackend
from nns_plugin.compensation.options import Compensation
from nns_plugin.errors import LabelError
from nns_plugin.evaluation.evaluation import evaluate
from nns_plugin.evaluation.prediction import predict
from nns_plugin.jobs.data import Datasets
from nns_plugin.jobs.extraction import chosen_labels, extract_from, stage
from nns_plugin.jobs.iterative import prune_iteratively
from nns_plugin.jobs.recipe import IterativeSection, Recipe, SynapsesSection
from nns_plugin.subnets.steps import Extraction, carry_out, finish_head, prepare
from nns_plugin.synapses.mean_weight import prune_under_mean


class _Holder(nn.Module):
    """A model that a turn may replace by a smaller one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def iterative_extraction(
    dense: nn.Module,
    data: Datasets,
    recipe: Recipe,
    section: IterativeSection,
    tune: Callable[[Extraction], None],
    progress: bool = False,
) -> Extraction:
    """Prune and fine-tune in turns, as long as the mean balanced accuracy on the validation data holds.

    Args:
        dense: The model; left as it was found.
        data: Its data.
        recipe: What each turn removes.
        section: How long to go on.
        tune: Fine-tunes the model of a cut, in place.
        progress: Whether to show progress bars.

    Returns:
        The last cut that held, with the kept units counted from the dense model.
    """
    chosen = chosen_labels(recipe, data.label_names)
    with stage("data.calibration"):
        prepared = prepare(
            dense,
            data.example_inputs,
            data.calibration,
            data.label_names,
            labels=chosen,
            head=recipe.effective_head,
            gram=False,
            backend=TorchPruningBackend,
            ignored_layers=recipe.ignored_layers,
            progress=progress,
        )
        start = carry_out(
            prepared,
            {},
            Compensation("none", recalibrate_batch_norms=False),
            data.calibration,
            backend=TorchPruningBackend,
            validation=data.decisive if recipe.calibrate_head else None,
        )
    extractions: list[Extraction] = []

    def turn(holder: nn.Module) -> int:
        keeping = recipe.model_copy(update={"head": "keep", "calibrate_head": False})
        extraction, _ = extract_from(holder.get_submodule("model"), data, keeping, progress=progress)
        whole = {group.name: group.size for group in extraction.groups}
        extraction = replace(extraction, head=start.head, opens=start.opens, outputs=start.outputs)
        with stage("data.calibration"):
            extraction = finish_head(
                extraction, data.calibration, data.decisive if recipe.calibrate_head else None, progress
            )
        extractions.append(extraction)
        holder.model = extraction.model
        return sum(whole[name] - units.numel() for name, units in extraction.kept.items())

    def accuracy(holder: nn.Module) -> float:
        with stage("data.validation"):
            logits, truth = predict(holder.get_submodule("model"), data.decisive)
        found = evaluate(logits, truth, start.outputs, start.labels, data.label_names)
        if found.mean_balanced_accuracy is None:
            raise LabelError("one label with a closed head cannot be mistaken: there is no balanced accuracy to hold")
        return found.mean_balanced_accuracy

    iterative = prune_iteratively(
        _Holder(start.model),
        turn,
        lambda holder: tune(replace(start, model=holder.get_submodule("model"))),
        accuracy,
        pretrain=False,
        max_drop=section.max_drop,
        max_rounds=section.max_rounds,
        progress=progress,
    )
    accepted = extractions[: sum(turn.accepted for turn in iterative.rounds)]
    return replace(start, model=iterative.model.get_submodule("model"), kept=_composed(accepted))


def _composed(extractions: Sequence[Extraction]) -> dict[str, Tensor]:
    """The kept units of several cuts in a row, counted from before the first."""
    kept: dict[str, Tensor] = {}
    for extraction in extractions:
        kept |= {name: kept[name][units] if name in kept else units for name, units in extraction.kept.items()}
    return kept


@contextmanager
def masked_synapses(extraction: Extraction, section: SynapsesSection | None) -> Iterator[None]:
    """Mask the weights of linear layers under their mean; at the end of the block the zeros become permanent."""
    if section is None:
        yield
        return
    linear = [name for name, module in extraction.model.named_modules() if isinstance(module, nn.Linear)]
    layers = list(dict.fromkeys(section.layers or [])) or [
        name for name in linear if name not in TorchPruningBackend(extraction.model, extraction.example_inputs).heads
    ]
    prune_under_mean(extraction.model, layers)
    yield
    for name in layers:
        prune.remove(extraction.model.get_submodule(name), "weight")
