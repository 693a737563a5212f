"""Batches: the warp, the random draws, the order, the cache, the threads, and files that turn bad."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from maskcore import _native, data, ops
from maskcore.augment import Augment, Warp
from maskcore.errors import UserError

SIZE = 16


def warp_reference(source: NDArray[np.uint8], matrix: tuple[float, ...], fill: float) -> NDArray[np.float64]:
    """scipy's affine_transform(order=1, mode="constant"), pixel by pixel in float64."""
    height, width = source.shape[:2]
    out = np.full(source.shape, float(fill))
    for row, column in itertools.product(range(height), range(width)):
        x = matrix[0] * column + matrix[1] * row + matrix[2]
        y = matrix[3] * column + matrix[4] * row + matrix[5]
        if 0 <= x <= width - 1 and 0 <= y <= height - 1:
            left, top = min(int(x), max(width - 2, 0)), min(int(y), max(height - 2, 0))
            right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
            upper = source[top, left] * (1 - (x - left)) + source[top, right] * (x - left)
            lower = source[bottom, left] * (1 - (x - left)) + source[bottom, right] * (x - left)
            out[row, column] = upper * (1 - (y - top)) + lower * (y - top)
    return out


def warped(source: NDArray[np.uint8], matrix: tuple[float, ...], fill: float) -> NDArray[np.float32]:
    out = np.full(source.shape, np.nan, np.float32)
    _native.warp(source, matrix, fill, out, 1.0)
    return out


def random_picture(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- the warp


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 2), (2, 3), (3, 2), (7, 13), (20, 20)])
def test_warp_is_the_reference(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        source = random_picture(rng, *shape)
        matrix = tuple(rng.normal([1, 0, 0, 0, 1, 0], [0.3, 0.3, 3, 0.3, 0.3, 3]))
        # Weights are float32: each of three interpolations rounds values of up to 255.
        limit = 6 * 255 * 2**-24
        assert np.abs(warped(source, matrix, 7) - warp_reference(source, matrix, 7)).max() <= limit


def test_warp_is_scipys() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    rng = np.random.default_rng(2)
    source = random_picture(rng, 31, 31)
    for index in range(20):
        m = data.Augment(shift=3).draw(31, 0, 0, index).matrix(31)
        wanted = np.stack(
            [
                ndimage.affine_transform(
                    source[..., c].astype(float), [[m[4], m[3]], [m[1], m[0]]], [m[5], m[2]], order=1, cval=9
                )
                for c in range(3)
            ],
            -1,
        )
        assert np.abs(warped(source, m, 9) - wanted).max() <= 6 * 255 * 2**-24


def test_warp_by_whole_pixels_and_flips_is_exact() -> None:
    source = random_picture(np.random.default_rng(3), 9, 9)
    still = Warp(0, 0, 0, 1, 1, False, False)
    assert np.array_equal(warped(source, still.matrix(9), 0), source)
    for flip_x, flip_y in itertools.product([False, True], repeat=2):
        flipped = source[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
        matrix = Warp(0, 0, 0, 1, 1, flip_x, flip_y).matrix(9)
        assert np.array_equal(warped(source, matrix, 0), flipped)
    moved = warped(source, Warp(0, 2, -3, 1, 1, False, False).matrix(9), 5)
    assert np.array_equal(moved[:7, 3:], source[2:, :6])
    assert (moved[7:] == 5).all()
    assert (moved[:, :3] == 5).all()


def test_warp_scales_picture_and_fill() -> None:
    source = np.full((4, 4, 3), 100, np.uint8)
    out = np.empty((4, 4, 3), np.float32)
    _native.warp(source, (1, 0, 2, 0, 1, 0), 50, out, 0.5)
    assert (out[:, :2] == 50).all()
    assert (out[:, 2:] == 25).all()


def test_warp_writes_nothing_beyond_the_picture() -> None:
    batch = np.full((3, 8, 8, 3), -1, np.float32)
    _native.warp(random_picture(np.random.default_rng(0), 8, 8), (1, 0, 0, 0, 1, 0), 0, batch[1], 1)
    assert (batch[0] == -1).all()
    assert (batch[2] == -1).all()
    assert (batch[1] >= 0).all()


@pytest.mark.parametrize(
    "matrix", [(0, 0, 3, 0, 0, 4), (1e9, 0, 0, 0, 1e9, 0), (1, 0, -1e9, 0, 1, 0), (1e-300,) * 6]
)
def test_warp_of_degenerate_matrices(matrix: tuple[float, ...]) -> None:
    source = random_picture(np.random.default_rng(4), 9, 9)
    assert np.abs(warped(source, matrix, 7) - warp_reference(source, matrix, 7)).max() <= 1e-4


def test_native_refuses() -> None:
    source, out = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.float32)
    eye = (1, 0, 0, 0, 1, 0)
    read_only = out.copy()
    read_only.flags.writeable = False
    cases = [
        (source.astype(np.float32), eye, out, "source must be a C-contiguous uint8"),
        (source[..., 0], eye, out, "source must be"),
        (source[:, ::2], eye, out, "not contiguous"),
        (source[:0], eye, out, "source must be"),
        (source, eye, out.astype(np.float64), "out must be a C-contiguous float32"),
        (source, eye, out[:, ::2], "out must be"),
        (source, eye, read_only, "writeable"),
        (source, eye[:5], out, "6 numbers"),
        (source, (float("nan"), *eye[1:]), out, "finite"),
        (source, (1e10, *eye[1:]), out, "finite"),
    ]
    for bad_source, matrix, bad_out, message in cases:
        with pytest.raises(ValueError, match=message):
            _native.warp(bad_source, matrix, 0, bad_out, 1)
    with pytest.raises(ValueError, match="shape of source"):
        _native.to_float(source, np.zeros((5, 4, 3), np.float32), 1)
    with pytest.raises(ValueError, match="source must be"):
        _native.to_float(out, out, 1)


def test_native_knows_the_processor() -> None:
    order = ["avx512bf16", "avx512", "avx2", "baseline"]
    isa = _native.supported_isa()
    assert isa == [name for name in order if name in isa]
    assert isa[-1] == "baseline"
    caches = _native.cache_sizes()
    assert set(caches) == {"L1d", "L2", "L3"}
    assert all(0 <= size < 2**40 for size in caches.values())


# ---- what is drawn


def keras_matrix(warp: Warp, size: int) -> NDArray[np.float64]:
    """Keras' apply_affine_transform with its later centre, over (x, y, 1), and the flips behind it."""

    def move(x: float, y: float) -> NDArray[np.float64]:
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])

    angle, centre = np.deg2rad(warp.degrees), size / 2 - 0.5
    rotate = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = rotate @ move(warp.right, warp.down) @ np.diag([warp.zoom_x, warp.zoom_y, 1])
    matrix = move(centre, centre) @ affine @ move(-centre, -centre)
    if warp.flip_x:
        matrix = matrix @ np.array([[-1, 0, size - 1], [0, 1, 0], [0, 0, 1]])
    if warp.flip_y:
        matrix = matrix @ np.array([[1, 0, 0], [0, -1, size - 1], [0, 0, 1]])
    return matrix[:2].ravel()


def draws(augment: Augment, count: int = 4000) -> list[Warp]:
    return [augment.draw(256, 5, epoch, index) for epoch in range(4) for index in range(count // 4)]


def test_matrix_is_keras() -> None:
    for warp in draws(Augment(), 200):
        assert np.allclose(warp.matrix(256), keras_matrix(warp, 256), rtol=0, atol=1e-10)


def test_draws_have_keras_ranges() -> None:
    warps = draws(Augment())
    degrees = np.array([w.degrees for w in warps])
    assert -10 <= degrees.min() < -9.9
    assert 9.9 < degrees.max() <= 10
    zooms = np.array([[w.zoom_x, w.zoom_y] for w in warps])
    assert 0.7 <= zooms.min() < 0.71
    assert 1.29 < zooms.max() <= 1.3
    assert abs(np.corrcoef(zooms.T)[0, 1]) < 0.06  # independent: four standard errors
    for flips in ([w.flip_x for w in warps], [w.flip_y for w in warps]):
        assert abs(np.mean(flips) - 0.5) < 4 * 0.5 / len(warps) ** 0.5


def test_whole_shifts_are_drawn_as_keras_does() -> None:
    for shift in (10, 10.0):
        for name in ("down", "right"):
            counts = Counter(getattr(w, name) for w in draws(Augment(shift=shift)))
            assert set(counts) == set(range(-9, 10))
            assert 300 < counts[0] < 500  # 400 expected, 200 of any other
            assert all(120 < counts[n] < 280 for n in range(1, 10))
    assert {w.down for w in draws(Augment(shift=1))} == {0}


def test_other_shifts_are_uniform() -> None:
    fractions = np.array([w.down for w in draws(Augment(shift=0.1))])
    assert -25.6 <= fractions.min() < -25
    assert 25 < fractions.max() <= 25.6
    pixels = np.array([w.right for w in draws(Augment(shift=2.5))])
    assert 2.4 < pixels.max() <= 2.5
    assert len(set(pixels)) == len(pixels)


def test_draws_belong_to_seed_epoch_and_picture() -> None:
    augment = Augment()
    keys = list(itertools.product(range(3), repeat=3))
    warps = [augment.draw(256, *key) for key in keys]
    assert len(set(warps)) == len(keys)
    assert warps == [augment.draw(256, *key) for key in keys]
    still = Augment(rotation=0, zoom=0).draw(256, 1, 2, 3)
    assert (still.down, still.flip_x) == (augment.draw(256, 1, 2, 3).down, augment.draw(256, 1, 2, 3).flip_x)
    assert Augment.none().draw(256, 1, 2, 3) == Warp(0, 0, 0, 1, 1, False, False)


PERMUTATION = [5, 4, 2, 6, 3, 1, 0, 7]
UNIFORM = [0.10758245671678712, 0.9201637680707887]


def test_the_stream_never_changes() -> None:
    """A run resumed under another numpy must go on with the same pictures."""
    from maskcore import philox

    assert philox.permutation(philox.ORDER, 7, 2, 0, 8).tolist() == PERMUTATION
    assert philox.uniform(philox.AUGMENT, 7, 2, 5, 2) == pytest.approx(UNIFORM, abs=1e-15)
    assert philox.uniform(philox.AUGMENT, -1, 2, 5, 1) == philox.uniform(philox.AUGMENT, 2**64 - 1, 2, 5, 1)


def test_augment_survives_json_and_refuses() -> None:
    augment = Augment(rotation=3, shift=0.05, vertical_flip=False, fill=128)
    assert Augment.from_dict(augment.to_dict()) == augment
    for bad in (
        {"rotate": 1},
        {"zoom": 1},
        {"rotation": -1},
        {"fill": 256},
        {"shift": float("nan")},
        {"zoom": "0.3"},
    ):
        with pytest.raises(UserError):
            Augment.from_dict(bad)
    with pytest.raises(UserError):
        Augment.from_dict({"horizontal_flip": 1})


# ---- batches


@pytest.fixture
def pictures(tmp_path: Path) -> list[data.Picture]:
    """23 pictures of their own colours and of several sizes."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(23):
        path = tmp_path / f"{index:02d}.png"
        Image.fromarray(random_picture(rng, 10 + index, 30)).save(path)
        made.append(data.Picture(path, index % 3))
    return made


def loader(pictures: list[data.Picture], **options: object) -> data.Loader:
    settings: dict[str, object] = {"augment": Augment(shift=2), "shuffle": True, "seed": 3, "workers": 0}
    return data.Loader(pictures, data.Preprocess(SIZE), 4, **(settings | options))  # type: ignore[arg-type]


def same(left: list[data.Batch], right: list[data.Batch]) -> bool:
    return len(left) == len(right) and all(
        a.number == b.number
        and torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.indices, b.indices)
        for a, b in zip(left, right, strict=True)
    )


def test_batches_have_the_promised_form(pictures: list[data.Picture]) -> None:
    ours = loader(pictures)
    batches = list(ours.epoch(0))
    assert [len(b.labels) for b in batches] == [4, 4, 4, 4, 4, 3]
    assert ours.batches == len(batches) == 6
    for number, batch in enumerate(batches):
        assert batch.number == number
        assert batch.images.shape[1:] == (3, SIZE, SIZE)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.images.min() >= 0
        assert batch.images.max() <= 1
        assert batch.labels.dtype == batch.indices.dtype == torch.int64
        assert batch.labels.tolist() == [pictures[i].label for i in batch.indices]
    assert sorted(torch.cat([b.indices for b in batches]).tolist()) == list(range(23))


def test_unaugmented_pictures_are_the_ones_that_prediction_sees(pictures: list[data.Picture]) -> None:
    for batch in loader(pictures, augment=None, shuffle=False).epoch(0):
        pixels = np.stack([data.load(pictures[i].path, data.Preprocess(SIZE)) for i in batch.indices])
        assert torch.equal(batch.images, data.network_input(pixels))


def test_augmented_pictures_are_the_warped_ones(pictures: list[data.Picture]) -> None:
    ours = loader(pictures, augment=Augment(shift=2, fill=200))
    for batch in ours.epoch(4):
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            source = data.load(pictures[index].path, data.Preprocess(SIZE))
            matrix = Augment(shift=2, fill=200).draw(SIZE, 3, 4, index).matrix(SIZE)
            wanted = warp_reference(source, matrix, 200) / 255
            assert np.abs(image.permute(1, 2, 0).numpy() - wanted).max() <= 1e-6


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("cache_bytes", [0, 5 * SIZE * SIZE * 3, None])
def test_workers_and_cache_change_nothing(
    workers: int, cache_bytes: int | None, pictures: list[data.Picture]
) -> None:
    plain = loader(pictures, cache_bytes=0)
    ours = loader(pictures, workers=workers, cache_bytes=cache_bytes)
    for epoch in range(3):
        assert same(list(plain.epoch(epoch)), list(ours.epoch(epoch)))


@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_at_any_batch(workers: int, pictures: list[data.Picture]) -> None:
    whole = list(loader(pictures).epoch(2))
    for start in range(len(whole) + 1):
        assert same(list(loader(pictures, workers=workers).epoch(2, start=start)), whole[start:])
    with pytest.raises(UserError, match="6 batches"):
        loader(pictures).epoch(2, start=7)


def test_stored_batches_become_the_batches(pictures: list[data.Picture]) -> None:
    """What a GPU makes of them, here by the same operator on the CPU, to the bit."""
    for augmented in (True, False):
        ours = loader(pictures)
        batches = zip(ours.stored(2, 1, augmented), ours.epoch(2, 1, augmented), strict=True)
        for stored, batch in batches:
            assert stored.pictures.dtype == torch.uint8
            assert stored.number == batch.number
            assert torch.equal(stored.labels, batch.labels)
            assert torch.equal(stored.indices, batch.indices)
            fill = ours.augment.fill if ours.augment is not None else 0
            assert torch.equal(ops.warp(stored.pictures, stored.matrices, fill), batch.images)


def test_epochs_differ_and_can_be_unaugmented(pictures: list[data.Picture]) -> None:
    ours = loader(pictures)
    orders = [torch.cat([b.indices for b in ours.epoch(e)]).tolist() for e in range(3)]
    assert len(set(map(tuple, orders))) == 3
    plain = list(ours.epoch(1, augmented=False))
    assert torch.cat([b.indices for b in plain]).tolist() == orders[1]
    assert same(plain, list(loader(pictures, augment=None).epoch(1)))
    assert not same(plain, list(ours.epoch(1)))
    in_order = loader(pictures, shuffle=False)
    assert torch.cat([b.indices for b in in_order.epoch(5)]).tolist() == list(range(23))


def test_the_same_picture_is_varied_anew_each_epoch(pictures: list[data.Picture]) -> None:
    ours = loader(pictures[:1], augment=Augment())
    assert not torch.equal(next(ours.epoch(0)).images, next(ours.epoch(1)).images)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_dropped_and_told(workers: int, pictures: list[data.Picture]) -> None:
    pictures[3].path.write_bytes(b"")
    pictures[11].path.write_bytes(pictures[11].path.read_bytes()[:100])
    pictures[20].path.unlink()
    ours = loader(pictures, workers=workers)
    skipped = ours.scan()
    assert [s.path for s in skipped] == [pictures[i].path for i in (3, 11, 20)]
    assert skipped[0].reason == "is empty (zero bytes)"
    assert skipped[2].reason == "is missing"
    assert ours.skipped == skipped
    assert len(ours.pictures) == 20
    assert ours.batches == 5
    order = torch.cat([b.indices for b in ours.epoch(0)]).tolist()
    assert sorted(order) == sorted(set(range(23)) - {3, 11, 20})
    assert ours.scan() == skipped


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_turns_bad_in_a_run(workers: int, pictures: list[data.Picture]) -> None:
    whole = list(loader(pictures).epoch(0))
    ours = loader(pictures, workers=workers, cache_bytes=0)
    ours.scan()
    lost = whole[5].indices[1].item()
    pictures[int(lost)].path.unlink()
    batches = list(ours.epoch(0))
    assert same(batches[:5], whole[:5])
    assert batches[5].indices.tolist() == [i for i in whole[5].indices.tolist() if i != lost]
    assert torch.equal(batches[5].images, whole[5].images[[i != lost for i in whole[5].indices.tolist()]])
    assert [s.reason for s in ours.skipped] == ["is missing"]
    assert lost not in torch.cat([b.indices for b in ours.epoch(1)]).tolist()
    assert len(ours.pictures) == 22


def test_a_batch_without_any_picture_left_is_left_out(pictures: list[data.Picture]) -> None:
    ours = loader(pictures, shuffle=False, cache_bytes=0)
    for picture in pictures[4:8]:
        picture.path.unlink()
    assert [b.number for b in ours.epoch(0)] == [0, 2, 3, 4, 5]
    assert ours.batches == 6
    assert [b.number for b in ours.epoch(1)] == [0, 1, 2, 3, 4]


def test_scanned_pictures_are_not_read_again(pictures: list[data.Picture]) -> None:
    room = 10 * SIZE * SIZE * 3 + 5  # ten and a bit
    ours = loader(pictures, cache_bytes=room, shuffle=False)
    ours.scan()
    for picture in pictures:
        picture.path.unlink()
    assert torch.cat([b.indices for b in ours.epoch(0)]).tolist() == list(range(10))
    assert len(ours.skipped) == 13


def test_loader_refuses(pictures: list[data.Picture]) -> None:
    for options in ({"workers": -1}, {"cache_bytes": -1}):
        with pytest.raises(UserError):
            loader(pictures, **options)
    with pytest.raises(UserError):
        data.Loader(pictures, data.Preprocess(SIZE), 0)
    with pytest.raises(UserError, match="cache"):
        data.Loader([data.Picture(Path("x"), 0)] * 10**7, data.Preprocess(8192), 1, cache_bytes=2**60)
    assert list(loader([]).epoch(0)) == []


# ---- threads


def threads_left() -> list[str]:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        names = [t.name for t in threading.enumerate() if t.name.startswith("maskcore")]
        if not names:
            return []
        time.sleep(0.01)
    return names


def interrupted_consumer(batches: Iterator[data.Batch]) -> None:
    for _ in batches:
        raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["finished", "closed", "forgotten", "never begun", "interrupted"])
def test_no_thread_outlives_its_epoch(how: str, pictures: list[data.Picture]) -> None:
    ours = loader(pictures * 20, workers=3, cache_bytes=0)
    batches = ours.epoch(0)
    if how == "finished":
        list(batches)
    elif how == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            interrupted_consumer(batches)
    elif how != "never begun":
        next(batches)
        # A pool begins a thread for a job that finds none idle: on a busy machine that may never be the last one.
        assert 1 <= len([t for t in threading.enumerate() if t.name.startswith("maskcore")]) <= 3
        if how == "closed":
            batches.close()  # type: ignore[attr-defined]
    del batches
    assert threads_left() == []


def test_interrupt_while_waiting(pictures: list[data.Picture], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C arrives in the consumer's thread, which is mostly waiting for a batch."""
    import _thread

    def slow(path: Path, preprocess: data.Preprocess) -> NDArray[np.uint8]:
        time.sleep(0.2)
        return np.zeros((SIZE, SIZE, 3), np.uint8)

    monkeypatch.setattr(data, "load", slow)
    # In the background of a script Ctrl-C is ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.1, _thread.interrupt_main)
    timer.start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(loader(pictures * 20, workers=2).epoch(0))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 3
    assert threads_left() == []


def test_an_error_in_a_thread_reaches_the_consumer(
    pictures: list[data.Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, preprocess: data.Preprocess) -> NDArray[np.uint8]:
        raise ZeroDivisionError

    monkeypatch.setattr(data, "load", broken)
    with pytest.raises(ZeroDivisionError):
        list(loader(pictures, workers=2).epoch(0))
    assert threads_left() == []


def test_batches_are_prepared_ahead_but_not_without_bound(
    pictures: list[data.Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = loader(pictures * 20, workers=2)
    prepared: list[int] = []
    prepare = ours._prepare

    def counted(stop: threading.Event, number: int, **rest: object) -> data.Batch | None:
        prepared.append(number)
        return prepare(stop, number, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ours, "_prepare", counted)
    batches = ours.epoch(0)
    next(batches)
    time.sleep(0.3)
    assert 2 <= len(prepared) <= 5
    batches.close()  # type: ignore[attr-defined]


def test_waiting_is_measured(pictures: list[data.Picture], monkeypatch: pytest.MonkeyPatch) -> None:
    load = data.load

    def slow(path: Path, preprocess: data.Preprocess) -> NDArray[np.uint8]:
        time.sleep(0.02)
        return load(path, preprocess)

    monkeypatch.setattr(data, "load", slow)
    ours = loader(pictures)
    list(ours.epoch(0))
    assert ours.waited >= 23 * 0.02
    for _ in ours.epoch(1):  # all in the cache now
        time.sleep(0.02)  # the consumer's own time does not count
    assert ours.waited < 0.1
