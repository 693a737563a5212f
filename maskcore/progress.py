"""How far an epoch is: a bar on a terminal, and now and then a plain line where there is none."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

PLAIN_SECONDS = 60.0  # between two plain lines
SHOW_SECONDS = 0.2  # between two changes of the figures beside the bar


class Progress:
    """Counts pictures up to ``total``; a context manager.

    On a terminal it is a tqdm bar that leaves nothing behind, elsewhere a line a minute; both on
    stderr, so that stdout has results only.
    """

    def __init__(self, title: str, total: int, done: int = 0):
        self._title, self._total, self._done, self._from = title, total, done, done
        self._started = self._shown = time.monotonic()
        self._bar = (
            tqdm(
                desc=title,
                total=total,
                initial=done,
                unit=" images",
                # tqdm's own would turn to seconds an image where that is more than one.
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, "
                "{rate_noinv_fmt}{postfix}]",
                leave=False,
                dynamic_ncols=True,
                file=sys.stderr,
            )
            if sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def due(self) -> bool:
        """Whether it is time to give ``add`` a new text."""
        since = time.monotonic() - self._shown
        return since >= (SHOW_SECONDS if self._bar is not None else PLAIN_SECONDS)

    def add(self, count: int, text: str | None = None) -> None:
        """Counts ``count`` pictures more; ``text``, wanted when due, is shown beside from then on."""
        due = self.due
        self._done += count
        if self._bar is not None:
            if text is not None:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count)
        elif due:
            print(self._line() + (f", {text}" if text else ""), file=sys.stderr, flush=True)
        if due:
            self._shown = time.monotonic()

    def _line(self) -> str:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        rate = max((self._done - self._from) / elapsed, 1e-9)
        left = duration((self._total - self._done) / rate)
        share = self._done / max(self._total, 1)
        return f"  {self._title}: {share:4.0%}, {rate:.1f} images/s, {left} left"


def duration(seconds: float) -> str:
    """``seconds`` as 0:07, 12:34 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
