"""Other inference engines with the same network in them: what the benchmarks compare with, where installed.

Each builder takes maskcore's network in evaluation mode and a batch of the size to come, and returns a call: pictures
``[N, 3, S, S]`` float32, contiguous -> logits ``[N, classes]`` as numpy, all on the CPU; in float32, or in what an
engine makes of bfloat16.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskcore import models
from maskcore.ops import fold_batch_norm

Call = Callable[[Tensor], Any]
#: network, pictures, scratch folder, threads
Builder = Callable[[models.Network, Tensor, Path, int], Call]


def _onnx(network: models.Network, x: Tensor, folder: Path) -> Path:
    path = folder / f"network-{len(x)}.onnx"
    if not path.exists():
        torch.onnx.export(
            models.torch_twin(network),
            (x,),
            path,
            input_names=["pictures"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
            external_data=False,
        )
    return path


def onnx_runtime(network: models.Network, x: Tensor, folder: Path, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    path = _onnx(network, x, folder)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pictures: session.run(None, {"pictures": pictures.numpy()})[0]


def openvino(network: models.Network, x: Tensor, folder: Path, threads: int, precision: str = "f32") -> Call:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    compiled = openvino.Core().compile_model(str(_onnx(network, x, folder)), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda pictures: request.infer({0: pictures.numpy()})[0]


def mnn(network: models.Network, x: Tensor, folder: Path, threads: int, precision: str = "high") -> Call:
    import MNN

    path = folder / f"network-{len(x)}.mnn"
    # What MNN.tools.mnnconvert calls, without its import: that installs a logging service's client by pip, and with it
    # a protobuf too old for onnx and TensorFlow.
    convert = [sys.executable, "-c", "import sys, _tools; _tools.mnnconvert(sys.argv)"]
    convert += ["-f", "ONNX", "--bizCode", "maskcore"]
    model = ["--modelFile", str(_onnx(network, x, folder)), "--MNNModel", str(path)]
    subprocess.run([*convert, *model], check=True, capture_output=True)
    settings = ({"backend": "CPU", "numThread": threads, "precision": precision},)
    manager = MNN.nn.create_runtime_manager(settings)
    module = MNN.nn.load_module_from_file(str(path), ["pictures"], ["logits"], runtime_manager=manager)
    expr = MNN.expr

    def call(pictures: Tensor) -> Any:
        placed = expr.placeholder(list(pictures.shape), expr.NCHW)
        placed.write(pictures.numpy())
        return module.forward([placed])[0].read()

    return call


def ncnn(network: models.Network, x: Tensor, folder: Path, threads: int, bfloat16: bool = False) -> Call:
    """ncnn has no batches: pictures go one by one."""
    import ncnn

    param, weights = folder / "network.param", folder / "network.bin"
    _write_ncnn(models.torch_twin(network), param, weights)
    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = bfloat16
    net.load_param(str(param))
    net.load_model(str(weights))

    def call(pictures: Tensor) -> Any:
        logits = []
        for picture in pictures.numpy():
            extractor = net.create_extractor()
            extractor.input("0", ncnn.Mat(picture))
            logits.append(np.array(extractor.extract(str(last))[1]))
        return np.stack(logits)

    last = int(param.read_text().splitlines()[-1].split()[5])
    return call


def _write_ncnn(twin: Any, param: Path, weights: Path) -> None:
    """ncnn's own two files; batch normalisation is folded and ReLU fused, as its optimiser does."""
    lines = ["Input input 0 1 0"]
    blobs: list[np.ndarray] = []
    modules = [m for m in twin.modules() if not list(m.children())]
    for i, module in enumerate(modules):
        if isinstance(module, torch.nn.Conv2d):
            weight, bias = module.weight.detach(), module.bias.detach() if module.bias is not None else None
            assert bias is not None
            following = modules[i + 1]
            if isinstance(following, torch.nn.BatchNorm2d):
                mean: Any = following.running_mean
                var: Any = following.running_var
                gamma, beta = following.weight.detach(), following.bias.detach()
                weight, bias = fold_batch_norm(weight, bias, gamma, beta, mean, var, following.eps)
            settings = f"0={len(weight)} 1=3 4={module.padding[0]} 5=1 6={weight.numel()} 9=1"
            lines.append(f"Convolution conv{i} 1 1 {len(lines) - 1} {len(lines)} {settings}")
            blobs += [np.zeros(1, np.float32), weight.numpy(), bias.numpy()]
        elif isinstance(module, torch.nn.MaxPool2d):
            lines.append(f"Pooling pool{i} 1 1 {len(lines) - 1} {len(lines)} 0=0 1=2 2=2 5=1")
        elif isinstance(module, torch.nn.Linear):
            weight = module.weight.detach()
            relu = i + 1 < len(modules) and isinstance(modules[i + 1], torch.nn.ReLU)
            settings = f"0={len(weight)} 1=1 2={weight.numel()} 9={int(relu)}"
            lines.append(f"InnerProduct dense{i} 1 1 {len(lines) - 1} {len(lines)} {settings}")
            blobs += [np.zeros(1, np.float32), weight.numpy(), module.bias.detach().numpy()]
    param.write_text("\n".join(["7767517", f"{len(lines)} {len(lines)}", *lines]) + "\n")
    weights.write_bytes(b"".join(np.ascontiguousarray(blob, np.float32).tobytes() for blob in blobs))


def _present(engines: dict[str, tuple[str, Builder]]) -> dict[str, Builder]:
    onnx = importlib.util.find_spec("onnxscript") is not None
    return {
        name: builder
        for name, (package, builder) in engines.items()
        if importlib.util.find_spec(package) is not None and (onnx or package == "ncnn")
    }


def installed() -> dict[str, Builder]:
    """The float32 engines that can be imported, by the name that the table gives them."""
    return _present(
        {
            "ONNX Runtime": ("onnxruntime", onnx_runtime),
            "OpenVINO": ("openvino", openvino),
            "MNN": ("MNN", mnn),
            "ncnn": ("ncnn", ncnn),
        }
    )


def installed_bfloat16() -> dict[str, Builder]:
    """Those that have a mode with bfloat16, in that mode."""
    return _present(
        {
            "OpenVINO bf16": ("openvino", functools.partial(openvino, precision="bf16")),
            "MNN bf16": ("MNN", functools.partial(mnn, precision="low_bf16")),
            "ncnn bf16": ("ncnn", functools.partial(ncnn, bfloat16=True)),
        }
    )
