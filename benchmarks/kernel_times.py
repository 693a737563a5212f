"""Times of the convolutions' kernels on this GPU, beside the roof that docs/cuda_roofline.md gives them.

    python benchmarks/kernel_times.py          prints them
    python benchmarks/kernel_times.py FILE     and writes them there: docs/cuda_measured.md is such a file

A step is run operator by operator under torch.profiler; of each kernel the median of three steps counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import roofline
import torch

import maskcore
from maskcore import models, ops, optim

STEPS = 3
H100 = next(gpu for gpu in roofline.GPUS if gpu.name == "H100")
#: An H200 is an H100 with more and faster memory.
KNOWN = (*roofline.GPUS, dataclasses.replace(H100, name="H200", bandwidth=4.8e12))
OF_CONVOLUTIONS = re.compile(r"conv_(halo_tile|halo_wgmma|first_layer|weight_gradient)\w*_kernel")


def step_of(precision: ops.Precision, batch: int, training: bool) -> Callable[[], None]:
    network = models.create("final", precision=precision, seed=0).cuda()
    x = torch.rand(batch, 3, network.image_size, network.image_size, device="cuda")
    x = x.to(
        memory_format=torch.channels_last, dtype=torch.bfloat16 if precision == "bf16" else torch.float32
    )
    if not training:
        fast = models.for_inference(network.eval())

        def infer() -> None:
            with torch.inference_mode():
                fast(x)

        return infer
    network.train()
    target = (torch.arange(batch) % 3).cuda()
    optimizer = optim.Adam(network.parameter_groups(1e-4), lr=1e-4)

    def train() -> None:
        ops.softmax_cross_entropy(network(x).float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def kernels_of(step: Callable[[], None]) -> list[tuple[str, float]]:
    """Name and seconds of all that the GPU does in a step, in its order."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events: list[dict[str, Any]] = json.loads(trace.read_text())["traceEvents"]
    of_gpu = [event for event in events if event.get("cat") in ("kernel", "gpu_memset", "gpu_memcpy")]
    of_gpu.sort(key=lambda event: float(event["ts"]))
    if len(of_gpu) % STEPS:
        raise RuntimeError(f"{len(of_gpu)} kernels in {STEPS} steps, each of which should have as many")
    count = len(of_gpu) // STEPS
    repeated = [[of_gpu[i + count * j] for j in range(STEPS)] for i in range(count)]
    return [(same[0]["name"], statistics.median(event["dur"] for event in same) * 1e-6) for same in repeated]


def seconds_of(step: Callable[[], None], steps: int = 10) -> float:
    step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / steps


def beside(roof: float, seconds: float) -> tuple[str, str]:
    """The last cells of a row; empty for a GPU whose roof is not known."""
    return (f"{roof * 1e3:.3f}", f"{roof / seconds:.0%}") if roof else ("", "")


def table(gpu: roofline.Gpu | None, p: roofline.Precision, batch: int, training: bool) -> Iterator[str]:
    precision: Any = p.name
    step = step_of(precision, batch, training)
    found = kernels_of(step)
    measured = [seconds for name, seconds in found if OF_CONVOLUTIONS.search(name)]
    listed = roofline.training(batch, p) if training else roofline.inference(batch, p)
    layers = {conv.name for conv in roofline.convolutions(batch)}
    kernels = [
        kernel
        for kernel in listed
        if kernel.layer in layers and re.match("conv,|backward-", kernel.name)  # the order of their launches
    ]
    of_step, of_convolutions, wall = sum(seconds for _, seconds in found), sum(measured), seconds_of(step)
    what = "a training step" if training else "inference"
    yield f"## {what}, {p.name}, batch {batch}"
    yield ""
    yield (
        f"{batch / wall:,.0f} images a second operator by operator; its {len(found)} kernels take "
        f"{of_step * 1e3:.2f} ms, the {len(measured)} of convolutions {of_convolutions * 1e3:.2f} ms of them."
    )
    yield ""
    yield roofline.row("layer", "kernel", "ms", "TFLOP/s", "TB/s", "roof, ms", "share")
    yield roofline.row("---", "---", *["---:"] * 5)
    roofs = 0.0
    for kernel, seconds in zip(kernels, measured, strict=True):
        roof = kernel.seconds(gpu, p) if gpu else 0.0
        roofs += roof
        rates = f"{kernel.operations / seconds / 1e12:.0f}", f"{kernel.bytes / seconds / 1e12:.2f}"
        yield roofline.row(kernel.layer, kernel.name, f"{seconds * 1e3:.3f}", *rates, *beside(roof, seconds))
    yield roofline.row("all", "", f"{of_convolutions * 1e3:.3f}", "", "", *beside(roofs, of_convolutions))
    yield ""


def page() -> Iterator[str]:
    name = torch.cuda.get_device_name()
    gpu = next((gpu for gpu in KNOWN if gpu.name.split()[-1] in name), None)
    yield "# Measured times of the CUDA engine's convolutions"
    yield ""
    yield "Written by `python benchmarks/kernel_times.py docs/cuda_measured.md`"
    yield f"on an {name} with torch {torch.__version__}."
    yield ""
    yield "Operations are those that the products execute, bytes each tensor once; the roof is the larger of their"
    yield "times at the vendor's peaks, as in [the roofline](cuda_roofline.md)."
    yield ""
    for p in roofline.PRECISIONS:
        for batch in reversed(roofline.BATCHES):
            for training in (True, False):
                yield from table(gpu, p, batch, training)
                torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, help="where to write the page besides")
    file = parser.parse_args().file
    state = str(maskcore.config()["CUDA"])
    if not torch.cuda.is_available() or state != torch.cuda.get_device_name():
        sys.exit(f"kernel_times needs a GPU: maskcore's CUDA kernels are {state}")
    text = "\n".join(page())
    print(text)
    if file is not None:
        file.write_text(text)


if __name__ == "__main__":
    main()
