"""Pictures for people: training curves, confusion matrix, sheet of mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maskcore.checkpoint import best_of, replacing

TRAIN, VALIDATION, PENALTY, QUIET = "#3b6ea8", "#c8553d", "#8a8a8a", "#555555"


def available() -> bool:
    """Whether matplotlib is there."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def curves(history: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws loss and accuracy over the epochs into a PNG.

    ``history``: records with the columns of log.csv.
    """
    figure = _figure(11, 4.4)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in history]
    marker = "o" if len(epochs) < 30 else None

    def line(axes: Any, column: str, label: str, **style: Any) -> None:
        values = [record[column] for record in history]
        axes.plot(epochs, values, label=label, marker=marker, markersize=3, **style)

    line(loss_axes, "train_cross_entropy", "training", color=TRAIN)
    line(loss_axes, "val_cross_entropy", "validation", color=VALIDATION)
    line(loss_axes, "val_loss", "validation + L2 penalty", color=VALIDATION, linestyle=":", alpha=0.7)
    loss_axes.set_ylabel("cross-entropy (nats)")
    loss_axes.set_ylim(bottom=0)
    line(accuracy_axes, "train_accuracy", "training", color=TRAIN)
    line(accuracy_axes, "val_accuracy", "validation", color=VALIDATION)
    best = best_of(list(history), 10)
    mean = sum(record["val_accuracy"] for record in best) / len(best)
    accuracy_axes.axhline(
        mean,
        color=QUIET,
        linestyle="--",
        linewidth=1,
        label=f"mean of the best {len(best)}: {mean:.3f}",
    )
    accuracy_axes.plot(
        best[0]["epoch"],
        best[0]["val_accuracy"],
        marker="*",
        markersize=12,
        color=VALIDATION,
        linestyle="none",
        label=f"best: {best[0]['val_accuracy']:.3f} (epoch {best[0]['epoch']})",
    )
    accuracy_axes.set_ylabel("accuracy")
    accuracy_axes.set_ylim(0, 1)
    for axes in (loss_axes, accuracy_axes):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def confusion(
    matrix: Sequence[Sequence[int]] | np.ndarray, classes: Sequence[str], path: Path, title: str
) -> None:
    """Draws a confusion matrix (rows true, columns predicted) with counts and row shares."""
    counts = np.asarray(matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(4.8, 1.1 * len(classes) + 2.2)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 20:  # beyond that the numbers would overlap; the CSV has them
        for row, column in np.ndindex(counts.shape):
            axes.text(
                column,
                row,
                f"{counts[row, column]}\n{shares[row, column]:.0%}",
                ha="center",
                va="center",
                fontsize=11,
                color="white" if shares[row, column] > 0.55 else "black",
            )
    labels = [f"{name}" for name in classes]
    axes.set_xticks(range(len(classes)), labels, rotation=25, ha="right")
    axes.set_yticks(range(len(classes)), labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=11)
    bar = figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.04)
    bar.set_label("share of the true class")
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    # The object interface: pyplot would choose a window system and keep every figure alive.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


@dataclass(frozen=True)
class Mistake:
    """One wrongly classified picture, with the square pixels that the network saw."""

    pixels: np.ndarray  # uint8 [S,S,3]
    name: str
    true: str
    predicted: str
    probability: float  # of the predicted class


def contact_sheet(mistakes: Sequence[Mistake], path: Path, title: str, columns: int = 5) -> None:
    """Writes the pictures in a grid, under each its file name, true and predicted class."""
    tile, margin, caption = 220, 14, 62
    head = 46
    rows = max(1, -(-len(mistakes) // columns))
    sheet = Image.new(
        "RGB",
        (margin + columns * (tile + margin), head + rows * (tile + caption + margin)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    large, small = _font(20), _font(14)
    draw.text((margin, 12), title, fill="black", font=large)
    for number, mistake in enumerate(mistakes):
        x = margin + number % columns * (tile + margin)
        y = head + number // columns * (tile + caption + margin)
        picture = Image.fromarray(mistake.pixels).resize((tile, tile), Image.Resampling.BICUBIC)
        sheet.paste(picture, (x, y))
        lines = (
            (mistake.name, QUIET),
            (f"is: {mistake.true}", "#1d6b3a"),
            (f"said: {mistake.predicted} ({mistake.probability:.0%})", "#a32a18"),
        )
        for line, (text, colour) in enumerate(lines):
            fitted = _fitted(draw, text, small, tile)
            draw.text((x, y + tile + 4 + 18 * line), fitted, fill=colour, font=small)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """``text`` with its middle left out until it is at most ``width`` pixels wide."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    if draw.textlength(text, font=font) <= width:
        return text
    for keep in range(min(len(text), 200) // 2, 1, -1):
        shorter = f"{text[:keep]}...{text[-keep:]}"
        if draw.textlength(shorter, font=font) <= width:
            return shorter
    return "..."
