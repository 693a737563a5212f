"""Random numbers that belong to a place, not to a moment: functions of (purpose, seed, epoch, index).

Philox counts, and a number is a function of the count: nothing has to be drawn before it, no state has to
be saved, and threads draw the same numbers as one would.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ORDER, AUGMENT, SPLIT, DROPOUT = 1, 2, 3, 4


def raw(purpose: int, seed: int, epoch: int, index: int, count: int) -> NDArray[np.uint64]:
    """``count`` random 64-bit numbers that belong to (purpose, seed, epoch, index) alone.

    Philox's own stream, not numpy's distributions: those may change from one version to the next.
    """
    mask = 2**64 - 1
    key = np.array([seed & mask, purpose], dtype=np.uint64)
    # The generator counts in the lowest word; the others tell the streams apart.
    counter = np.array([0, index & mask, epoch & mask, 0], dtype=np.uint64)
    words: NDArray[np.uint64] = np.random.Philox(key=key, counter=counter).random_raw(count)
    return words


def uniform(purpose: int, seed: int, epoch: int, index: int, count: int) -> list[float]:
    """``count`` numbers from [0, 1)."""
    words = raw(purpose, seed, epoch, index, count)
    numbers: list[float] = ((words >> np.uint64(11)) * 2.0**-53).tolist()
    return numbers


def permutation(purpose: int, seed: int, epoch: int, index: int, count: int) -> NDArray[np.int64]:
    return np.argsort(raw(purpose, seed, epoch, index, count), kind="stable").astype(np.int64)
