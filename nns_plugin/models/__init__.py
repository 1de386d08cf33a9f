"""Models: whatever can be done with any torch model, whoever prunes it."""

from nns_plugin.models.activations import (
    Call,
    capture_call,
    capture_input,
    collect_inputs,
    execution_order,
    only_summed,
)
from nns_plugin.models.batch_norms import recalibrate_batch_norms
from nns_plugin.models.batches import Batch, batches, first_inputs, parse_batch
from nns_plugin.models.comparison import same_outputs
from nns_plugin.models.fingerprint import difference, digest, fingerprint, fingerprint_of
from nns_plugin.models.hooks import Hook, hooked
from nns_plugin.models.inputs import (
    INPUT_TYPES,
    check_kinds,
    device_of,
    inputs_like,
    kinds_of,
    map_tensors,
    run_model,
    tensors_of,
    to_device,
)
from nns_plugin.models.preserve import copied, in_evaluation, preserved, preserved_modes, preserved_rng, seeded

__all__ = [
    "INPUT_TYPES",
    "Batch",
    "Call",
    "Hook",
    "batches",
    "capture_call",
    "capture_input",
    "check_kinds",
    "collect_inputs",
    "copied",
    "device_of",
    "difference",
    "digest",
    "execution_order",
    "fingerprint",
    "fingerprint_of",
    "first_inputs",
    "hooked",
    "in_evaluation",
    "inputs_like",
    "kinds_of",
    "map_tensors",
    "only_summed",
    "parse_batch",
    "preserved",
    "preserved_modes",
    "preserved_rng",
    "recalibrate_batch_norms",
    "run_model",
    "same_outputs",
    "seeded",
    "tensors_of",
    "to_device",
]
