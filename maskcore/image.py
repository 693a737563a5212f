"""One picture file -> pixels: what is decoded, what is refused, and how it becomes the network's input."""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from maskcore.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_FILE_BYTES = 64 * 10**6
MAX_PIXELS = 50 * 10**6
PIXEL_SCALE = 1 / 255

Pixels = NDArray[np.uint8]

# Pillow only warns between one and two times its own limit. The ceiling above is checked in any case;
# this makes Pillow refuse as well wherever it meets such a picture by itself.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class BadPicture(UserError):
    """A file that cannot be used as a picture; ``reason`` (and the text) stands behind its name."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def decode(path: str | Path, *, exif: bool = True) -> Image.Image:
    """The picture in a file as an RGB image, upright unless ``exif`` is false.

    Args:
        path: Any file; the table at the top of this module says what is accepted.
        exif: Whether to turn the picture as its EXIF orientation says. Keras did not.

    Raises:
        BadPicture: The file is refused or cannot be decoded.
    """
    content = _read(Path(path))
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadPicture(_too_many_pixels(width, height))
            image.load()
            return _to_rgb(image, exif)
    except BadPicture:
        raise
    except UnidentifiedImageError:
        raise BadPicture(f"is not a picture of a known format ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadPicture(f"has more than {MAX_PIXELS // 10**6} megapixels") from None
    except Exception as error:  # decoders of hostile files raise nearly every exception there is
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        reason = "is truncated" if "truncated" in text.lower() else "cannot be decoded"
        raise BadPicture(f"{reason} ({printable(text)})") from None


def _too_many_pixels(width: int, height: int) -> str:
    return f"has {width}x{height} pixels, more than {MAX_PIXELS // 10**6} megapixels"


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        # Opening a pipe would wait for a writer, so the kind is looked at first.
        if not stat.S_ISREG(status.st_mode):
            raise BadPicture("is not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise BadPicture(f"is larger than {MAX_FILE_BYTES // 10**6} MB")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise BadPicture("is missing") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadPicture(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not content:
        raise BadPicture("is empty (zero bytes)")
    if len(content) > MAX_FILE_BYTES:
        raise BadPicture(f"is larger than {MAX_FILE_BYTES // 10**6} MB")
    return content


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112


def _to_rgb(image: Image.Image, exif: bool) -> Image.Image:
    """``image`` as RGB, turned if asked; then without the metadata that would turn it again."""
    turn = TURNS.get(_orientation(image)) if exif else None
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit values at 255, which makes nearly every such picture white.
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        rgb = Image.alpha_composite(black, rgba).convert("RGB")
        if not exif:
            rgb.info = dict(image.info)
    else:
        rgb = image.convert("RGB")
    if turn is not None:
        rgb = rgb.transpose(turn)
    if exif:
        rgb.info = {}
    return rgb


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken metadata does not make a picture useless
        return 1


@dataclass(frozen=True)
class Preprocess:
    """The one way from a picture to the network's input; training, evaluation, prediction and export
    all go through it, and checkpoints record it.

    Args:
        size: Side of the result in pixels, 1 to 8192.
        resize: "nearest" stretches to the nearest pixel, as Keras' ``load_img`` did for the original work;
            "bilinear" stretches with Pillow's antialiased bilinear filter; "letterbox" keeps the
            proportions (bilinear) and centres the picture on black.
        exif: Turn pictures upright by their EXIF orientation. Keras did not.
    """

    size: int = 256
    resize: Literal["nearest", "bilinear", "letterbox"] = "nearest"
    exif: bool = True

    def __post_init__(self) -> None:
        if type(self.size) is not int or not 1 <= self.size <= 8192:
            raise UserError(f"the picture size must be a whole number from 1 to 8192, not {self.size!r}")
        if self.resize not in ("nearest", "bilinear", "letterbox"):
            raise UserError(f"resize must be nearest, bilinear or letterbox, not {self.resize!r}")
        if type(self.exif) is not bool:
            raise UserError(f"exif must be true or false, not {self.exif!r}")

    def __call__(self, image: Image.Image) -> Pixels:
        """The picture as uint8 [size, size, 3]; times 1/255 in float32 it is the network's input."""
        rgb = _to_rgb(image, self.exif)
        if self.resize == "letterbox":
            return np.array(self._letterbox(rgb))
        nearest = self.resize == "nearest"
        filter_ = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
        return np.array(rgb.resize((self.size, self.size), filter_))

    def _letterbox(self, rgb: Image.Image) -> Image.Image:
        scale = self.size / max(rgb.size)
        width, height = (max(1, round(side * scale)) for side in rgb.size)
        canvas = Image.new("RGB", (self.size, self.size))
        corner = ((self.size - width) // 2, (self.size - height) // 2)
        canvas.paste(rgb.resize((width, height), Image.Resampling.BILINEAR), corner)
        return canvas

    def to_dict(self) -> dict[str, Any]:
        """The settings, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The reverse of ``to_dict``; UserError for a key or value that is not known."""
        return cls(**known_keys(cls, values, "preprocessing"))


def load(path: str | Path, preprocess: Preprocess) -> Pixels:
    """A picture file as uint8 [size, size, 3]; raises BadPicture as ``decode`` does."""
    return preprocess(decode(path, exif=preprocess.exif))


def network_input(pixels: Pixels) -> torch.Tensor:
    """uint8 [N,S,S,3] as the network takes it: float32 [N,3,S,S] from 0 to 1, channels_last.

    The same bits as an un-augmented ``Loader`` gives.
    """
    return torch.from_numpy(pixels).to(torch.float32).mul_(PIXEL_SCALE).permute(0, 3, 1, 2)


def known_keys(cls: type, values: Mapping[str, Any], what: str) -> dict[str, Any]:
    known = [field.name for field in fields(cls)]
    for key in values:
        if key not in known:
            raise UserError(f"{what} has no setting {printable(str(key))}; it has {', '.join(known)}")
    return dict(values)


def printable(text: str, limit: int = 200) -> str:
    """``text`` fit for a terminal and a log: no control characters, no half characters, not endless."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return shown + "..." if len(text) > limit else shown
