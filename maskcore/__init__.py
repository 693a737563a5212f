"""maskcore trains and runs a convolutional mask classifier with kernels of its own."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("maskcore")
except PackageNotFoundError:  # a source tree that was built in place
    __version__ = "0+unknown"

from maskcore import models, nn, ops, optim
from maskcore._library import config, show_config
from maskcore.errors import UserError

__all__ = ["UserError", "__version__", "config", "models", "nn", "ops", "optim", "show_config"]
