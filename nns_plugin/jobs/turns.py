"""What a recipe may ask for besides one cut: pruning and fine-tuning in turns, and masks on single weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.utils import prune

from nns_plugin.adapters.torch_pruning.backend import TorchPruningSurgery
from nns_plugin.backends import Compensation
from nns_plugin.errors import LabelError
from nns_plugin.evaluation.evaluation import evaluate, predict
from nns_plugin.jobs.data import Datasets
from nns_plugin.jobs.extraction import chosen_labels, extract_from, stage
from nns_plugin.jobs.iterative import train_prune_circle
from nns_plugin.jobs.recipe import CircleSection, Recipe, SynapsesSection
from nns_plugin.subnets.steps import Cut, carry_out, finish_head, prepare
from nns_plugin.synapses.masks import prune_under_mean


class _Holder(nn.Module):
    """A model that a turn may replace by a smaller one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def circle_of_cuts(
    dense: nn.Module,
    data: Datasets,
    recipe: Recipe,
    section: CircleSection,
    tune: Callable[[Cut], None],
    progress: bool = False,
) -> Cut:
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
            surgeon=TorchPruningSurgery,
            ignored_layers=recipe.ignored_layers,
            progress=progress,
        )
        start = carry_out(
            prepared,
            {},
            Compensation("none", reestimate=False),
            data.calibration,
            surgeon=TorchPruningSurgery,
            validation=data.decisive if recipe.calibrate_head else None,
        )
    cuts: list[Cut] = []

    def turn(holder: nn.Module) -> int:
        keeping = recipe.model_copy(update={"head": "keep", "calibrate_head": False})
        cut, _ = extract_from(holder.get_submodule("model"), data, keeping, progress=progress)
        whole = {group.name: group.size for group in cut.groups}
        cut = replace(cut, head=start.head, opens=start.opens, outputs=start.outputs)
        with stage("data.calibration"):
            cut = finish_head(cut, data.calibration, data.decisive if recipe.calibrate_head else None, progress)
        cuts.append(cut)
        holder.model = cut.model
        return sum(whole[name] - units.numel() for name, units in cut.kept.items())

    def accuracy(holder: nn.Module) -> float:
        with stage("data.validation"):
            logits, truth = predict(holder.get_submodule("model"), data.decisive)
        found = evaluate(logits, truth, start.outputs, start.labels, data.label_names)
        if found.mean_balanced_accuracy is None:
            raise LabelError("one label with a closed head cannot be mistaken: there is no balanced accuracy to hold")
        return found.mean_balanced_accuracy

    circle = train_prune_circle(
        _Holder(start.model),
        turn,
        lambda holder: tune(replace(start, model=holder.get_submodule("model"))),
        accuracy,
        pretrain=False,
        max_drop=section.max_drop,
        max_rounds=section.max_rounds,
        progress=progress,
    )
    accepted = cuts[: sum(turn.accepted for turn in circle.rounds)]
    return replace(start, model=circle.model.get_submodule("model"), kept=_composed(accepted))


def _composed(cuts: Sequence[Cut]) -> dict[str, Tensor]:
    """The kept units of several cuts in a row, counted from before the first."""
    kept: dict[str, Tensor] = {}
    for cut in cuts:
        kept |= {name: kept[name][units] if name in kept else units for name, units in cut.kept.items()}
    return kept


@contextmanager
def masked_synapses(cut: Cut, section: SynapsesSection | None) -> Iterator[None]:
    """Mask the weights of linear layers under their mean; at the end of the block the zeros become permanent."""
    if section is None:
        yield
        return
    linear = [name for name, module in cut.model.named_modules() if isinstance(module, nn.Linear)]
    layers = list(dict.fromkeys(section.layers or [])) or [
        name for name in linear if name not in TorchPruningSurgery(cut.model, cut.example_inputs).heads
    ]
    prune_under_mean(cut.model, layers)
    yield
    for name in layers:
        prune.remove(cut.model.get_submodule(name), "weight")
