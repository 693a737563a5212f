"""How far an epoch is: a bar on a terminal, and now and then a plain line where there is none."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

PLAIN_SECONDS = 60.0  # between two plain lines
SHOW_SECONDS = 0.2  # between two changes of the figures beside the bar


class Progress:
    """Counts pictures up to ``total``; a context manager.

    On a terminal it is a tqdm bar on stderr that leaves nothing behind, elsewhere a line a minute
    on stdout.
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
        """Counts ``count`` pictures more; ``text`` (when due) is shown beside."""
        self._done += count
        if self._bar is not None:
            if text is not None:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count)
        elif text is not None:
            elapsed = max(time.monotonic() - self._started, 1e-9)
            rate = (self._done - self._from) / elapsed
            left = duration((self._total - self._done) / max(rate, 1e-9))
            share = self._done / max(self._total, 1)
            print(
                f"  {self._title}: {share:4.0%}, {rate:.1f} images/s, {left} left, {text}",
                flush=True,
            )
        if text is not None:
            self._shown = time.monotonic()


def duration(seconds: float) -> str:
    """``seconds`` as 0:07, 12:34 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
