"""What every verb shares on the command line: one-sentence errors and exit statuses."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from maskcore.errors import UserError

EXIT_STATUSES = """\
exit status: 0 done; 1 stopped because a result was wrong (a loss that is not a number, an export
that disagrees); 2 input that cannot be used; 130 stopped by Ctrl-C; 143 stopped by SIGTERM"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, and whose help keeps its line breaks."""

    def __init__(self, verb: str, description: str, epilog: str = "", usage: str | None = None):
        super().__init__(
            prog=f"maskcore {verb}",
            description=description,
            epilog="\n\n".join(part for part in (epilog, EXIT_STATUSES) if part),
            usage=usage,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=32, width=100
            ),
            allow_abbrev=False,
        )
        self.verb = verb

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (maskcore {self.verb} --help lists what it takes)")


def run(
    parser: Parser,
    body: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
) -> int:
    """Parses ``argv`` (None: the process's own), runs ``body`` and returns the exit status.

    A UserError, and an OSError that nothing nearer has explained, becomes one line on stderr.
    """
    try:
        return body(parser.parse_args(argv))
    except UserError as error:
        return _complain(parser.verb, str(error), 2)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: no message, and none from the interpreter
        # when it flushes stdout on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(parser.verb, f"{where}{error.strerror or error}", 2)
    except KeyboardInterrupt:
        return _complain(parser.verb, "stopped by Ctrl-C", 130)
    except SystemExit as exit_:  # --help and --version leave this way
        return exit_.code if isinstance(exit_.code, int) else 0


def _complain(verb: str, sentence: str, status: int) -> int:
    print(f"maskcore {verb}: error: {sentence}", file=sys.stderr)
    return status
