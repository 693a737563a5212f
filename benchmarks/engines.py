"""Other engines with the same network in them: what the benchmarks compare with, where installed.

Each builder takes maskcore's network in evaluation mode and a batch of the size to come, and returns a call: pictures
``[N, 3, S, S]`` float32, contiguous (channels_last for :func:`installed_channels_last`) -> logits ``[N, classes]`` as
numpy, all on the CPU; in float32, or in what an engine makes of bfloat16.
"""

from __future__ import annotations

import functools
import importlib.util
import os
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
#: network, pictures, classes, threads; by name l2, lr, whether to drop out -> a step: it returns its cross-entropy
StepBuilder = Callable[..., Callable[[], float]]


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


def _tensorflow(threads: int) -> Any:
    """TensorFlow on the CPU, without its log. Its threads are set for good by the process' first operation."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import tensorflow

    tensorflow.config.set_visible_devices([], "GPU")
    tensorflow.config.threading.set_intra_op_parallelism_threads(threads)
    tensorflow.config.threading.set_inter_op_parallelism_threads(threads)
    return tensorflow


def _keras_model(network: models.Network, l2: float = 0.0, dropout: bool = True) -> Any:
    """The report's layers as Keras has them, with the network's weights."""
    import keras

    new = keras.layers
    layers = [keras.Input((network.image_size, network.image_size, 3))]
    for _, layer, _, _ in network.layers:
        penalty = keras.regularizers.L2(l2) if l2 and getattr(layer, "l2", False) else None
        match layer:
            case models.Conv():
                padding, activation = "same" if layer.padding else "valid", None if layer.bn else "relu"
                conv = new.Conv2D(
                    layer.channels, 3, padding=padding, activation=activation, kernel_regularizer=penalty
                )
                layers += [conv, new.BatchNormalization(), new.ReLU()] if layer.bn else [conv]
                if layer.pool:
                    layers.append(new.MaxPooling2D())
            case models.Flatten():
                layers.append(new.Flatten())
            case models.Dropout():
                layers.append(new.Dropout(layer.rate if dropout else 0.0))
            case models.Dense():
                activation = "relu" if layer.relu else None
                layers.append(new.Dense(layer.units, activation=activation, kernel_regularizer=penalty))
    model = keras.Sequential(layers)
    model.set_weights(models.to_keras_arrays(network))
    return model


def keras_inference(network: models.Network, x: Tensor, folder: Path, threads: int) -> Call:
    """Without XLA: with jit_compile=True a batch of 8 took 1.15 times as long, one picture 1.2 times."""
    tensorflow = _tensorflow(threads)
    model = _keras_model(network)
    infer = tensorflow.function(functools.partial(model, training=False), jit_compile=False)

    def call(pictures: Tensor) -> Any:
        return infer(tensorflow.convert_to_tensor(pictures.permute(0, 2, 3, 1).numpy())).numpy()

    return call


def keras_step(
    network: models.Network,
    x: Tensor,
    target: Tensor,
    threads: int,
    *,
    l2: float,
    lr: float,
    dropout: bool = True,
) -> Callable[[], float]:
    """Keras' Adam, with the L2 penalty in the loss. Without XLA, with which a step took 1.4 times as long."""
    tensorflow = _tensorflow(threads)
    import keras

    model = _keras_model(network, l2, dropout)
    weights = model.trainable_variables
    optimizer = keras.optimizers.Adam(lr)
    optimizer.build(weights)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    pictures = tensorflow.convert_to_tensor(x.permute(0, 2, 3, 1).contiguous().numpy())
    classes = tensorflow.convert_to_tensor(target.numpy())

    def step(pictures: Any, classes: Any) -> Any:
        with tensorflow.GradientTape() as tape:
            loss = cross_entropy(classes, model(pictures, training=True))
            total = tensorflow.add_n([loss, *model.losses])
        optimizer.apply(tape.gradient(total, weights), weights)
        return loss

    compiled = tensorflow.function(step, jit_compile=False)
    return lambda: float(compiled(pictures, classes))


def _present(engines: dict[str, tuple[str, Builder]]) -> dict[str, Builder]:
    onnx = importlib.util.find_spec("onnxscript") is not None
    return {
        name: builder
        for name, (package, builder) in engines.items()
        if importlib.util.find_spec(package) is not None and (onnx or package in ("ncnn", "tensorflow"))
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


def installed_channels_last() -> dict[str, Builder]:
    """As :func:`installed`: those whose calls take pictures in channels_last, as PyTorch's and maskcore's do."""
    return _present({"Keras": ("tensorflow", keras_inference)})


def installed_steps() -> dict[str, StepBuilder]:
    """Those that train, in float32."""
    return {"Keras": keras_step} if importlib.util.find_spec("tensorflow") is not None else {}


def installed_bfloat16() -> dict[str, Builder]:
    """Those that have a mode with bfloat16, in that mode."""
    return _present(
        {
            "OpenVINO bf16": ("openvino", functools.partial(openvino, precision="bf16")),
            "MNN bf16": ("MNN", functools.partial(mnn, precision="low_bf16")),
            "ncnn bf16": ("ncnn", functools.partial(ncnn, bfloat16=True)),
        }
    )
