"""Beyond a single extraction: iterative pruning, and masks on single weights, as a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.utils import prune

from nns_plugin.errors import LabelError
from nns_plugin.evaluation.evaluation import evaluate
from nns_plugin.evaluation.prediction import predict
from nns_plugin.jobs.extraction import extract
from nns_plugin.jobs.iterative import prune_iteratively
from nns_plugin.jobs.job import Job
from nns_plugin.jobs.recipe import IterativeSection, SynapsesSection
from nns_plugin.jobs.stages import stage
from nns_plugin.subnets.extraction import Choice, Extraction, Preparation
from nns_plugin.subnets.steps import PLAIN, carry_out, finish_head, prepare
from nns_plugin.synapses.mean_weight import prune_under_mean


class _Holder(nn.Module):
    """A model that a turn may replace by a smaller one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def iterative_extraction(job: Job, section: IterativeSection, tune: Callable[[Extraction], None]) -> Extraction:
    """Prune and fine-tune in turns, as long as the mean balanced accuracy on the validation data holds.

    Args:
        job: Its options say what each turn removes; the dense model is left as it was found.
        section: When to stop.
        tune: Fine-tunes the model of an extraction, in place.

    Returns:
        The last extraction that held, with the kept units counted from the dense model.
    """
    data, options, progress = job.data, job.options, job.progress
    validation = data.decisive if options.calibrate_head else None
    with stage("data.calibration"):
        prepared = prepare(
            job.dense,
            data.example_inputs,
            data.calibration,
            job.labels,
            Preparation(options.effective_head, False, options.ignored_layers, options.framework),
            progress=progress,
        )
        start = carry_out(prepared, Choice({}), PLAIN, data.calibration, validation=validation)
    extractions: list[Extraction] = []
    keeping = replace(options, head="keep", calibrate_head=False)
    sources = replace(job.sources, snapshot=None)

    def turn(holder: nn.Module) -> int:
        extraction, _ = extract(holder.get_submodule("model"), sources, keeping, job.labels, progress=progress)
        whole = {group.name: group.size for group in extraction.groups}
        extraction = replace(extraction, head=start.head, opens=start.opens, labels=start.labels)
        with stage("data.calibration"):
            extraction = finish_head(extraction, data.calibration, validation, progress)
        extractions.append(extraction)
        holder.model = extraction.model
        return sum(whole[name] - units.numel() for name, units in extraction.kept.items())

    def accuracy(holder: nn.Module) -> float:
        with stage("data.validation"):
            logits, truth = predict(holder.get_submodule("model"), data.decisive)
        labels = start.labels
        found = evaluate(logits, truth, labels.outputs, labels.indices, labels.names)
        if found.mean_balanced_accuracy is None:
            raise LabelError("one label with a closed head cannot be mistaken: there is no balanced accuracy to judge")
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
    """The kept units of consecutive extractions, counted from before the first."""
    kept: dict[str, Tensor] = {}
    for extraction in extractions:
        kept |= {name: kept[name][units] if name in kept else units for name, units in extraction.kept.items()}
    return kept


@contextmanager
def masked_synapses(extraction: Extraction, section: SynapsesSection | None) -> Iterator[None]:
    """Mask the weights of linear layers under their mean; when the block ends, the zeros become permanent."""
    if section is None:
        yield
        return
    linear = [name for name, module in extraction.model.named_modules() if isinstance(module, nn.Linear)]
    layers = list(dict.fromkeys(section.layers or [])) or [name for name in linear if name not in extraction.heads]
    prune_under_mean(extraction.model, layers)
    yield
    for name in layers:
        prune.remove(extraction.model.get_submodule(name), "weight")
