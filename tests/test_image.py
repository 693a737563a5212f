"""Every kind of file that calls itself a picture, and what becomes of it."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from maskcore import data, image
from maskcore.errors import UserError

GRADIENT = np.stack(np.meshgrid(np.arange(40) * 6, np.arange(30) * 8), -1)
PIXELS = np.concatenate([GRADIENT, 255 - GRADIENT[..., :1]], -1).astype(np.uint8)  # [30,40,3]


def picture() -> Image.Image:
    return Image.fromarray(PIXELS)


def encoded(source: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    source.save(buffer, format_, **options)
    return buffer.getvalue()


def written(folder: Path, content: bytes, name: str = "p.jpg") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[image.ORIENTATION] = orientation
    return encoded(picture(), "PNG", exif=exif)


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height pixels; decoding it would take that memory."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


JPEG = encoded(picture(), "JPEG", quality=95)
REFUSED = {
    "zero bytes": (b"", "is empty"),
    "text": (b"not a picture at all", "not a picture of a known format"),
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "is truncated"),
    "JPEG header alone": (JPEG[:20], "not a picture|truncated|cannot be decoded"),
    "truncated PNG": (encoded(picture(), "PNG")[:-60], "truncated|cannot be decoded"),
    "bomb of 60 megapixels": (huge_png(10_000, 6_000), "10000x6000 pixels, more than 50 megapixels"),
    "bomb of 100 megapixels": (huge_png(10_000, 10_000), "megapixels"),
    "bomb of 400 megapixels": (huge_png(20_000, 20_000), "more than 50 megapixels"),
    "TIFF": (encoded(picture(), "TIFF"), "not a picture of a known format"),
    "PDF": (encoded(picture(), "PDF"), "not a picture of a known format"),
    "EPS": (encoded(picture(), "EPS"), "not a picture of a known format"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, tmp_path: Path) -> None:
    content, reason = REFUSED[kind]
    with pytest.raises(data.BadPicture, match=reason) as caught:
        data.decode(written(tmp_path, content))
    assert caught.value.reason == str(caught.value)
    assert caught.value.reason.isprintable()


def test_refused_without_reading(tmp_path: Path) -> None:
    with pytest.raises(data.BadPicture, match="is missing"):
        data.decode(tmp_path / "absent.jpg")
    with pytest.raises(data.BadPicture, match="not a regular file"):
        data.decode(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(data.BadPicture, match="not a regular file"):
        data.decode(tmp_path / "pipe")
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(image.MAX_FILE_BYTES + 1)  # a hole: takes no disk
    with pytest.raises(data.BadPicture, match="larger than 64 MB"):
        data.decode(tmp_path / "large.jpg")
    with pytest.raises(data.BadPicture, match="cannot be read"):
        data.decode("nul\0name.jpg")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_refused_for_lack_of_permission(tmp_path: Path) -> None:
    path = written(tmp_path, JPEG)
    path.chmod(0)
    with pytest.raises(data.BadPicture, match="cannot be read"):
        data.decode(path)


def animated() -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def transparent_palette() -> bytes:
    source = Image.new("P", (8, 8), 1)
    source.putpalette([255, 255, 255, 0, 0, 200])
    source.putpixel((0, 0), 0)
    return encoded(source, "PNG", transparency=0)


def sixteen_bits() -> bytes:
    return encoded(Image.fromarray(np.full((8, 8), 0x80FF, np.uint16)), "PNG")


ACCEPTED = {
    # what: (content, pixel wanted at (3, 3), tolerance)
    "PNG called .jpg": (encoded(Image.new("RGB", (8, 8), (9, 80, 200)), "PNG"), (9, 80, 200), 0),
    "grey": (encoded(Image.new("L", (8, 8), 77), "PNG"), (77, 77, 77), 0),
    "bilevel": (encoded(Image.new("1", (8, 8), 1), "PNG"), (255, 255, 255), 0),
    "16 bits": (sixteen_bits(), (128, 128, 128), 0),
    "palette": (encoded(Image.new("RGB", (8, 8), (255, 0, 0)).quantize(4), "PNG"), (255, 0, 0), 0),
    "palette, transparent elsewhere": (transparent_palette(), (0, 0, 200), 0),
    "CMYK": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), (255, 0, 0), 4),
    "transparent": (encoded(Image.new("RGBA", (8, 8), (200, 100, 50, 0)), "PNG"), (0, 0, 0), 0),
    "half transparent": (encoded(Image.new("RGBA", (8, 8), (200, 100, 50, 128)), "PNG"), (100, 50, 25), 1),
    "grey, transparent": (encoded(Image.new("LA", (8, 8), (200, 0)), "PNG"), (0, 0, 0), 0),
    "animated, the first frame": (animated(), (255, 0, 0), 2),
    "WebP": (encoded(Image.new("RGB", (8, 8), (9, 80, 200)), "WEBP", lossless=True), (9, 80, 200), 0),
    "BMP": (encoded(Image.new("RGB", (8, 8), (9, 80, 200)), "BMP"), (9, 80, 200), 0),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_accepted(kind: str, tmp_path: Path) -> None:
    content, wanted, tolerance = ACCEPTED[kind]
    decoded = data.decode(written(tmp_path, content))
    assert decoded.mode == "RGB"
    got = np.array(decoded.getpixel((3, 3)), dtype=int)
    assert np.abs(got - wanted).max() <= tolerance, got


def test_transparent_palette_entry_becomes_black(tmp_path: Path) -> None:
    assert data.decode(written(tmp_path, transparent_palette())).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("resize", ["bilinear", "nearest", "letterbox"])
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_tiny_and_thin_pictures(size: tuple[int, int], resize: str, tmp_path: Path) -> None:
    path = written(tmp_path, encoded(Image.new("RGB", size, (10, 20, 30)), "PNG"))
    pixels = data.load(path, data.Preprocess(16, resize))
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == (10, 20, 30)).all(-1).any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_once_on_every_path(orientation: int, tmp_path: Path) -> None:
    """Stored so that a viewer shows PIXELS turned back: all ways to load agree with Pillow's own."""
    from PIL import ImageOps

    path = written(tmp_path, turned(orientation))
    with Image.open(path) as opened:
        upright = np.asarray(ImageOps.exif_transpose(opened))
    preprocess = data.Preprocess(24)
    assert np.array_equal(np.asarray(data.decode(path)), upright)
    wanted = preprocess(Image.fromarray(upright))
    assert np.array_equal(data.load(path, preprocess), wanted)
    assert np.array_equal(preprocess(data.decode(path)), wanted)
    with Image.open(path) as opened:  # as a caller with a picture of their own would
        assert np.array_equal(preprocess(opened), wanted)
    (batch,) = data.Loader([data.Picture(path, 0)], preprocess, 1, workers=0).epoch(0)
    assert torch.equal(batch.images, data.network_input(wanted[None]))


def test_exif_left_alone_as_keras_did(tmp_path: Path) -> None:
    path = written(tmp_path, turned(6))
    preprocess = data.Preprocess(24, "nearest", exif=False)
    plain = preprocess(picture())
    assert np.array_equal(data.load(path, preprocess), plain)
    with Image.open(path) as opened:
        assert np.array_equal(preprocess(opened), plain)
    assert not np.array_equal(data.load(path, data.Preprocess(24, "nearest")), plain)


def test_broken_exif_is_no_reason_to_refuse(tmp_path: Path) -> None:
    content = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert data.decode(written(tmp_path, content)).size == (40, 30)


def test_nearest_and_bilinear_are_pillows_stretch() -> None:
    for name, filter_ in (("nearest", Image.Resampling.NEAREST), ("bilinear", Image.Resampling.BILINEAR)):
        wanted = np.asarray(picture().resize((16, 16), filter_))
        assert np.array_equal(data.Preprocess(16, name)(picture()), wanted)


def test_letterbox_keeps_proportions() -> None:
    pixels = data.Preprocess(20, "letterbox")(Image.new("RGB", (40, 20), "white"))
    assert (pixels[5:15] == 255).all()
    assert (pixels[:5] == 0).all()
    assert (pixels[15:] == 0).all()


def test_network_input_is_pixels_over_255_channels_last() -> None:
    pixels = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)[None, :, None, :]
    tensor = data.network_input(pixels)
    assert tensor.shape == (1, 3, 256, 1)
    assert tensor.dtype == torch.float32
    wanted = torch.arange(256, dtype=torch.float64) / 255
    assert (tensor[0, 0, :, 0].double() - wanted).abs().max() <= 2**-23  # 1/255 is rounded, and the product
    assert tensor.amax() == 1
    square = data.network_input(np.zeros((2, 8, 8, 3), np.uint8))
    assert square.is_contiguous(memory_format=torch.channels_last)


def test_preprocess_survives_json() -> None:
    preprocess = data.Preprocess(96, "letterbox", exif=False)
    assert data.Preprocess.from_dict(preprocess.to_dict()) == preprocess
    with pytest.raises(UserError, match="has no setting colour; it has size, resize, exif"):
        data.Preprocess.from_dict({"size": 96, "colour": "grey"})


@pytest.mark.parametrize(
    "values", [{"size": 0}, {"size": 2.5}, {"size": True}, {"size": 9000}, {"resize": "bicubic"}, {"exif": 1}]
)
def test_preprocess_refuses(values: dict[str, object]) -> None:
    with pytest.raises(UserError):
        data.Preprocess.from_dict(values)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_give_a_picture_or_one_reason(tmp_path: Path, draw: st.DataObject) -> None:
    """Whatever bytes change, decode returns a picture or raises BadPicture, and nothing else."""
    whole = draw.draw(st.sampled_from([JPEG, turned(3), animated(), sixteen_bits(), ACCEPTED["WebP"][0]]))
    content = bytearray(whole)
    for place in draw.draw(st.lists(st.integers(0, len(whole) - 1), max_size=8)):
        content[place] = draw.draw(st.integers(0, 255))
    path = written(tmp_path, bytes(content[: draw.draw(st.integers(0, len(whole)))]))
    try:
        pixels = data.load(path, data.Preprocess(8))
    except data.BadPicture as error:
        reason = error.reason
    else:
        reason = "good"
        assert pixels.shape == (8, 8, 3)
    assert reason.isprintable()
