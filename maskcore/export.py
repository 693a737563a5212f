"""Export for use without maskcore: ``maskcore export`` or ``python -m maskcore.export``.

Every file takes ``images`` float32 [N,3,S,S], RGB from 0 to 1, for any N, and carries a JSON text
``maskcore`` that says how a picture becomes that (preprocess), what the outputs mean (classes) and
where the weights are from. ONNX and torch files return probabilities [N,classes]; safetensors has
weights only, under the names of the torch.nn twin.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from maskcore import commandline, models
from maskcore.checkpoint import Meta, load_model, locate, replacing, write_tensors
from maskcore.errors import UserError

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch": ".pt2"}
AGREEMENT = 1e-4  # largest difference of a probability between export and maskcore


class Disagreement(Exception):
    """The exported program computes something else; the message says by how much."""


def description(meta: Meta) -> str:
    """The JSON text that goes with every export."""
    history = meta.state.history
    return json.dumps(
        {
            "network": meta.network,
            "classes": list(meta.classes),
            "preprocess": meta.preprocess.to_dict(),
            "input": "images float32 [N,3,S,S], RGB, pixel values divided by 255",
            "output": "probabilities float32 [N,classes]",
            "trained_on_drawn_pictures": bool(meta.data.get("drawn", False)),
            "epoch": history[-1]["epoch"] if history else None,
            "versions": meta.versions,
        },
        allow_nan=False,
    )


def export_safetensors(network: models.Network, meta: Meta, path: Path) -> None:
    """Writes the weights under the names, and in the layout, of the torch.nn twin."""
    write_tensors(path, models.to_torch_state_dict(network), description(meta))


def export_torch(network: models.Network, meta: Meta, path: Path) -> float:
    """Writes a torch.export program (``torch.export.load(path).module()(images)``).

    Returns the largest difference of a probability from maskcore's. Raises Disagreement.
    """
    batch = torch.export.Dim("batch", min=1)
    with _quiet():
        program = torch.export.export(
            _Classifier(network), (_samples(network, 2),), dynamic_shapes=({0: batch},)
        )
        with replacing(path) as temporary:
            # torch looks at the suffix.
            with temporary.open("wb") as file:
                torch.export.save(program, file, extra_files={"maskcore": description(meta)})
            with temporary.open("rb") as file:
                loaded = torch.export.load(file).module()
            return _agree(network, lambda images: loaded(images))


def export_onnx(network: models.Network, meta: Meta, path: Path) -> float | None:
    """Writes an ONNX file of plain operators, the description in its metadata.

    Returns the largest difference of a probability between ONNX Runtime and maskcore, None where
    onnxruntime is not installed. Raises Disagreement, and UserError if a package is missing.
    """
    _need("onnx", "onnxscript")
    import onnx

    with _quiet():
        program = torch.onnx.export(
            _Classifier(network),
            (_samples(network, 2),),
            dynamo=True,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {"maskcore": description(meta)})
    onnx.checker.check_model(proto)
    content = proto.SerializeToString()
    difference = None
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        difference = _agree(
            network,
            lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]),
        )
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return difference


class _Classifier(torch.nn.Module):
    """The torch.nn twin with softmax behind it."""

    def __init__(self, network: models.Network):
        super().__init__()
        self.network = models.torch_twin(network)
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.network(images), dim=1)


def _samples(network: models.Network, count: int) -> torch.Tensor:
    """Random pictures, always the same ones, as contiguous NCHW."""
    generator = torch.Generator().manual_seed(0)
    size = network.image_size
    return torch.rand((count, 3, size, size), generator=generator)


def _agree(network: models.Network, other: Any) -> float:
    """The largest difference over batches of one and of three pictures. Raises Disagreement."""
    worst = 0.0
    for count in (1, 3):
        images = _samples(network, count)
        with torch.no_grad():
            ours = network(images.contiguous(memory_format=torch.channels_last)).softmax(dim=1)
            difference = float((other(images) - ours).abs().max())
        # Written so that NaN is a disagreement too.
        if not difference <= AGREEMENT:
            raise Disagreement(
                f"the exported program's probabilities differ from maskcore's by {difference:.2g}, "
                f"more than {AGREEMENT:g}; nothing was written"
            )
        worst = max(worst, difference)
    return worst


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"this format needs {' and '.join(missing)}: pip install {' '.join(missing)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters report progress and deprecations of their own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _parser() -> commandline.Parser:
    parser = commandline.Parser(
        "export",
        "Writes a trained network for use without maskcore, and compares what it computes.",
        "formats:\n"
        "  safetensors  weights only, named as in a torch.nn.Sequential of the same layers\n"
        "  onnx         pictures to probabilities, any batch size; needs onnx and onnxscript\n"
        "  torch        the same for torch.export.load\n"
        'All carry classes and preprocessing in a metadata entry "maskcore" (JSON).\n\n'
        "examples:\n"
        "  maskcore export runs/final --format onnx\n"
        "  maskcore export runs/final --format torch --out masks.pt2",
    )
    parser.add_argument("checkpoint", help="a run's folder (its best epoch) or a checkpoint file")
    parser.add_argument("--format", choices=tuple(SUFFIXES), required=True)
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="where to write (default: NETWORK.SUFFIX in the run's folder or beside the checkpoint; a "
        "file that is there is replaced)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The verb ``export``; returns the exit status."""
    return commandline.run(_parser(), _export, argv)


def _export(namespace: argparse.Namespace) -> int:
    network, meta = load_model(namespace.checkpoint)
    path = _target(namespace, network.name)
    difference = None
    try:
        if namespace.format == "safetensors":
            export_safetensors(network, meta, path)
        elif namespace.format == "onnx":
            difference = export_onnx(network, meta, path)
        else:
            difference = export_torch(network, meta, path)
    except Disagreement as error:
        print(f"maskcore export: error: {error}", file=sys.stderr)
        return 1
    print(f"written to {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    if difference is not None:
        print(f"its probabilities agree with maskcore's to {difference:.1g}")
    elif namespace.format == "onnx":
        print("not compared with maskcore: that needs onnxruntime (pip install onnxruntime)")
    return 0


def _target(namespace: argparse.Namespace, name: str) -> Path:
    if namespace.out is None:
        given = Path(namespace.checkpoint)
        parent = given if given.is_dir() else given.parent
        return parent / (name + SUFFIXES[namespace.format])
    path = Path(namespace.out)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give --out a file's name")
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder to write {path} into")
    if path.exists() and path.samefile(locate(namespace.checkpoint)):
        raise UserError(f"{path} is the checkpoint itself: choose another --out")
    return path


if __name__ == "__main__":
    sys.exit(main())
