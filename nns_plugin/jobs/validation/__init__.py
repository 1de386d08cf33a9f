"""The validation job: two ONNX files in, measurements, a verdict and reports out."""

from nns_plugin.jobs.validation.judging import validate
from nns_plugin.jobs.validation.options import ReportPaths, ValidationOptions
from nns_plugin.jobs.validation.result import Validation
from nns_plugin.jobs.validation.writing import reported_errors

__all__ = ["ReportPaths", "Validation", "ValidationOptions", "reported_errors", "validate"]
