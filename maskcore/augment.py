"""Random variation of the training pictures, with Keras' ranges and semantics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from maskcore import philox
from maskcore.errors import UserError
from maskcore.image import known_keys

#: The matrix of no transformation: see Warp.matrix.
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Augment:
    """Keras' ``ImageDataGenerator`` ranges; the defaults are those of the original course setting.

    One affine warp about the picture's centre (rotation, then shift, then zoom, as Keras multiplies
    them; bilinear; after the resize), then the flips. Keras 1.1.2 of 2020 took the centre half a pixel
    off; this is its later, corrected formula (size/2 - 0.5).

    Args:
        rotation: Largest angle in degrees; the angle is uniform in [-rotation, rotation].
        shift: Largest shift, of rows and of columns each. A whole number n >= 1 draws as Keras does for an
            int: a whole number of pixels from 0 to n-1 and a sign, so that 0 is twice as likely as any
            other. Below 1: uniform, a fraction of the size. Another number: uniform, pixels.
        zoom: The factors of width and of height are drawn independently from [1-zoom, 1+zoom]; a factor
            above 1 makes things smaller, as it multiplies coordinates.
        horizontal_flip, vertical_flip: Each with probability one half.
        fill: Value, 0 to 255, of what comes from outside the picture.
    """

    rotation: float = 10.0
    shift: float = 10
    zoom: float = 0.3
    horizontal_flip: bool = True
    vertical_flip: bool = True
    fill: int = 0

    def __post_init__(self) -> None:
        limits = {"rotation": (0, 180), "shift": (0, 8192), "zoom": (0, 0.99), "fill": (0, 255)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise UserError(f"the augmentation's {name} must be from {low} to {high}, not {value!r}")
        for name in ("horizontal_flip", "vertical_flip"):
            value = getattr(self, name)
            if type(value) is not bool:
                raise UserError(f"the augmentation's {name} must be true or false, not {value!r}")

    @classmethod
    def none(cls) -> Augment:
        """Leaves every picture as it is."""
        return cls(rotation=0.0, shift=0, zoom=0.0, horizontal_flip=False, vertical_flip=False)

    def to_dict(self) -> dict[str, Any]:
        """The settings, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Augment:
        """The reverse of ``to_dict``; UserError for a key or value that is not known."""
        return cls(**known_keys(cls, values, "augmentation"))

    def draw(self, size: int, seed: int, epoch: int, index: int) -> Warp:
        """The transformation of picture ``index`` in ``epoch``.

        Every number has its place in the stream, so changing one range leaves the others' draws alone.
        """
        u = philox.uniform(philox.AUGMENT, seed, epoch, index, 9)
        return Warp(
            degrees=(2 * u[0] - 1) * self.rotation,
            down=self._shift(size, u[1], u[2]),
            right=self._shift(size, u[3], u[4]),
            zoom_x=1 + (2 * u[5] - 1) * self.zoom,
            zoom_y=1 + (2 * u[6] - 1) * self.zoom,
            flip_x=self.horizontal_flip and u[7] < 0.5,
            flip_y=self.vertical_flip and u[8] < 0.5,
        )

    def _shift(self, size: int, amount: float, sign: float) -> float:
        side = -1.0 if sign < 0.5 else 1.0
        if self.shift >= 1 and float(self.shift).is_integer():
            return side * math.floor(amount * self.shift)
        return side * amount * self.shift * (size if self.shift < 1 else 1)


@dataclass(frozen=True)
class Warp:
    """One drawn transformation; lengths in pixels, seen from the result back to the source."""

    degrees: float
    down: float
    right: float
    zoom_x: float
    zoom_y: float
    flip_x: bool
    flip_y: bool

    def matrix(self, size: int) -> tuple[float, float, float, float, float, float]:
        """m of ``_native.warp``: result (x, y) comes from (m0*x + m1*y + m2, m3*x + m4*y + m5).

        centre * rotation * shift * zoom * -centre * flips, multiplied out.
        """
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        m0, m1 = cos * self.zoom_x, -sin * self.zoom_y
        m3, m4 = sin * self.zoom_x, cos * self.zoom_y
        centre, far = (size - 1) / 2, size - 1
        m2 = cos * self.right - sin * self.down + centre - (m0 + m1) * centre
        m5 = sin * self.right + cos * self.down + centre - (m3 + m4) * centre
        if self.flip_x:
            m0, m2, m3, m5 = -m0, m2 + m0 * far, -m3, m5 + m3 * far
        if self.flip_y:
            m1, m2, m4, m5 = -m1, m2 + m1 * far, -m4, m5 + m4 * far
        return m0, m1, m2, m3, m4, m5
