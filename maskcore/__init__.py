"""maskcore trains and runs a convolutional mask classifier with kernels of its own."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("maskcore")
except PackageNotFoundError:  # a source tree that was built in place
    __version__ = "0+unknown"


def _is_command() -> bool:
    """Whether this process is ``maskcore VERB`` or ``python -m maskcore.VERB``."""
    if sys.argv[0] == "-m":  # Python is looking for the module that it is to run
        return sys.orig_argv[sys.orig_argv.index("-m") + 1].partition(".")[0] == "maskcore"
    return Path(sys.argv[0]).stem == "maskcore"


try:
    from maskcore import models, nn, ops, optim
    from maskcore._library import config, show_config
    from maskcore.errors import UserError
except ImportError as error:  # no kernels, a wrong MASKCORE_ISA, no torch
    if not _is_command():
        raise
    print(f"maskcore: error: {error}", file=sys.stderr)
    raise SystemExit(2) from None

__all__ = ["UserError", "__version__", "config", "models", "nn", "ops", "optim", "show_config"]
