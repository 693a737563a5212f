"""The drawn picture set: deterministic, balanced, varied, and not to be solved by a linear model."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from maskcore import scene
from maskcore.layouts import CLASSES


def test_classes_are_the_competitions() -> None:
    assert scene.CLASSES == ("nobody", "everybody", "not all")
    assert len(scene.CLASSES) == len(CLASSES)


def test_a_picture_is_a_function_of_seed_and_index() -> None:
    forward = [scene.draw(7, i, 64) for i in range(6)]
    backward = [scene.draw(7, i, 64) for i in reversed(range(6))][::-1]
    for (one, label), (other, again) in zip(forward, backward, strict=True):
        assert label == again
        assert one.tobytes() == other.tobytes()


def test_pictures_and_seeds_differ() -> None:
    seen = {scene.draw(seed, index, 48)[0].tobytes() for seed in (0, 1) for index in range(12)}
    assert len(seen) == 24


@pytest.mark.parametrize("count", [3, 10, 31])
def test_classes_are_balanced(count: int) -> None:
    labels = [scene.draw(3, index, 24)[1] for index in range(count)]
    counts = np.bincount(labels, minlength=3)
    assert counts.max() - counts.min() <= 1


def test_sizes_vary_like_the_competitions() -> None:
    sizes = np.array([scene.draw(0, index)[0].size for index in range(24)])
    assert sizes.min() >= 300
    assert sizes.max() <= 612
    assert len({tuple(size) for size in sizes}) > 12
    assert (sizes[:, 0] > sizes[:, 1]).any()
    assert (sizes[:, 0] < sizes[:, 1]).any()


def test_jpeg_holds_the_drawn_picture() -> None:
    encoded, label = scene.jpeg(5, 2, 96)
    picture, same = scene.draw(5, 2, 96)
    assert label == same
    with Image.open(io.BytesIO(encoded)) as decoded:
        assert (decoded.format, decoded.mode, decoded.size) == ("JPEG", "RGB", (96, 96))
        difference = np.asarray(decoded, dtype=float) - np.asarray(picture, dtype=float)
    assert np.abs(difference).mean() < 12, "JPEG of quality 60 and up moves a pixel by a few levels"


def _linear_accuracies(train: int, test: int, sides: tuple[int, ...]) -> dict[str, float]:
    """Test accuracy of multinomial logistic regression on pixels and on colour histograms."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    pipeline = pytest.importorskip("sklearn.pipeline")
    drawn = [scene.draw(11, index, 64) for index in range(train + test)]
    pixels = np.stack([np.asarray(picture) for picture, _ in drawn])
    labels = np.array([label for _, label in drawn])
    bins = pixels.astype(int) // 32
    codes = (bins[..., 0] * 64 + bins[..., 1] * 8 + bins[..., 2]).reshape(len(drawn), -1)
    histograms = np.stack([np.bincount(code, minlength=512) for code in codes])
    views = {"8x8x8 colour histogram": histograms}
    for side in sides:
        views[f"{side}x{side} pixels"] = pixels.reshape(-1, side, 64 // side, side, 64 // side, 3).mean(
            (2, 4)
        )
    accuracies = {}
    for name, features in views.items():
        flat = features.reshape(len(drawn), -1).astype(float)
        best = 0.0
        for C in (1e-4, 1e-2):
            model = pipeline.make_pipeline(
                preprocessing.StandardScaler(), linear_model.LogisticRegression(C=C, max_iter=100)
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a fit cut off at 100 iterations is a fit
                model.fit(flat[:train], labels[:train])
            best = max(best, model.score(flat[train:], labels[train:]))
        accuracies[name] = best
    return accuracies


def test_a_linear_model_fails() -> None:
    for name, accuracy in _linear_accuracies(train=600, test=300, sides=(16,)).items():
        assert accuracy < 0.60, f"logistic regression on {name} reaches {accuracy:.3f}"


@pytest.mark.slow
def test_a_linear_model_fails_with_more_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    accuracies = _linear_accuracies(train=3000, test=750, sides=(32, 64))
    with capsys.disabled():
        for name, accuracy in accuracies.items():
            print(f"\nlogistic regression on {name}: {accuracy:.3f}", end="")
    for name, accuracy in accuracies.items():
        assert accuracy < 0.60, f"logistic regression on {name} reaches {accuracy:.3f}"
