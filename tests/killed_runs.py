"""Runs that are killed: a script that forks one process for each, so that torch is imported once.

    python killed_runs.py PICTURES FOLDER SCENARIOS

SCENARIOS is a JSON list of {"name", "kills"}. A scenario trains into FOLDER/NAME, is killed as each
of its kills says, is resumed after each, and at last runs to its end. A kill is a number (that
share of an uninterrupted run's time) or [function, call, stage]: at that call of ``os.replace``,
``os.fsync`` or ``save_file``, and there "before" it, "after" it, or "amid" (save_file only: half of
the file is written).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  (the first optimizer imports it: once here, not in every child)
from small_runs import small

from maskcore import checkpoint, figures, train

EPOCHS = 3


def arguments(pictures: Path, out: Path, save_minutes: float) -> list[str]:
    more = ("--epochs", EPOCHS, "--lr", 1e-3, "--keep-best", 2, "--save-minutes", save_minutes)
    return small(pictures, out, *more)


def child(argv: list[str], kill: Any = None) -> int:
    """Starts a training process; ``kill`` as in the module's docstring, if by function."""
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    figures.available = lambda: False  # most of a small run's time
    if isinstance(kill, list):
        plant(*kill)
    os._exit(train.main(argv))


def plant(function: str, call: int, stage: str) -> None:
    """Makes a call of ``function`` in this process end in SIGKILL."""
    module = checkpoint if function == "save_file" else os
    original: Callable[..., Any] = getattr(module, function)
    calls = 0

    def replacement(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and stage == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == call:
            if stage == "amid":
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, function, replacement)


def status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def play(pictures: Path, out: Path, kills: list[Any], seconds: float) -> int:
    """Plays a scenario; returns how often the process was really killed."""
    killed = 0
    for kill in [*kills, None]:
        begun = (out / "checkpoints" / checkpoint.LAST).exists()
        if not begun and out.exists():  # killed before the first checkpoint: nothing to resume
            out = out.rename(out.with_name(f"{out.name}-unborn-{killed}")).with_name(out.name)
        # With so few minutes between saves there is one after every batch.
        argv = ["--resume", str(out)] if begun else arguments(pictures, out, 1e-9)
        pid = child(argv, kill)
        if isinstance(kill, float):
            time.sleep(kill * seconds)
            os.kill(pid, signal.SIGKILL)
        code = status(pid)
        killed += code == -signal.SIGKILL
        if kill is None and code != 0:
            raise SystemExit(f"{out} ended with status {code}")
    return killed


def main() -> None:
    pictures, folder = Path(sys.argv[1]), Path(sys.argv[2])
    started = time.monotonic()
    if status(child(arguments(pictures, folder / "whole", 0))) != 0:
        raise SystemExit("the uninterrupted run failed")
    seconds = time.monotonic() - started
    killed = {
        scenario["name"]: play(pictures, folder / scenario["name"], scenario["kills"], seconds)
        for scenario in json.loads(sys.argv[3])
    }
    print(json.dumps(killed))


def random_kills(seed: int) -> list[float]:
    """One to four moments at which a run is killed, as shares of its whole time."""
    source = random.Random(seed)
    return [source.uniform(0.05, 1.3) for _ in range(source.randint(1, 4))]


if __name__ == "__main__":
    main()
