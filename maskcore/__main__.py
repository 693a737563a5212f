"""The console command ``maskcore``: finds the verb and imports only that."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "train": "train a network on pictures; --quick to try it",
    "evaluate": "measure a trained network on labelled pictures",
    "predict": "say what pictures show",
    "export": "write a network as safetensors, ONNX or a torch program",
    "summary": "print the layers of a network",
    "generate": "draw labelled pictures to train on",
}

HELP = "\n".join(
    [
        "usage: maskcore VERB ...",
        "",
        "Trains and runs a network that tells whether everybody, nobody or not everybody in a "
        "picture wears a mask.",
        "",
        *(f"  {verb:<10}{text}" for verb, text in VERBS.items()),
        "",
        "maskcore VERB --help      what a verb takes",
        "maskcore --version        versions, and what it computes with on this machine",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``maskcore VERB ...`` and returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb == "--version":
        from maskcore import show_config

        show_config()
        return 0
    if verb not in VERBS:
        print(f"maskcore: error: there is no verb {verb!r}: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"maskcore.{verb}")
    return int(module.main(rest))


if __name__ == "__main__":
    sys.exit(main())
