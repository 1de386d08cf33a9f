"""Criteria for structured pruning that torch-pruning and NNI lack, compensation, and evidence for what is kept."""

from importlib.metadata import PackageNotFoundError, version

import lazy_loader

try:
    __version__ = version("nns-plugin")
except PackageNotFoundError:  # the source tree, not installed
    __version__ = "0+unknown"

# The public names are those of __init__.pyi; each is imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
