"""What only GPUs have: TF32 and bfloat16, graphs, streams, the CPU's results beside theirs.

Where there is none, the emulated device is in its place; graphs and streams, which it has not, are skipped. In float32
the operators are tested as on the CPU, in test_ops.py and test_conv_bn_relu_conv_relu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from maskcore import models, ops, optim
from maskcore.cuda_graph import Cuda, GraphStep
from maskcore.data import StoredBatch


@pytest.fixture
def device(gpu: str) -> str:
    return gpu


# Largest error over the result's norm: a sum of n products whose operands are rounded by r is off by about r.
TOLERANCE = {"ieee": 2e-6, "tf32": 1e-3, "bf16": 1e-2}
# N, H, W, C, K: the first layer, halo tiles, whole tiles, tails in everything.
CONVOLUTIONS = [
    (2, 20, 22, 3, 32),
    (2, 18, 34, 32, 32),
    (1, 30, 14, 64, 128),
    (3, 11, 9, 128, 256),
    (2, 9, 7, 5, 11),
]
#: precision, dtype of the activations
KINDS = [
    ("tf32", torch.float32),
    ("bf16", torch.float32),
    ("bf16", torch.bfloat16),
]


def image(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


def assert_close(ours: Tensor, exact: Tensor, tolerance: float, name: str) -> None:
    assert ours.shape == exact.shape, name
    error = (ours.double().cpu() - exact.double().cpu()).norm() / exact.double().norm().cpu().clamp_min(1e-30)
    assert float(error) <= tolerance, f"{name}: {float(error):.2e} > {tolerance:.0e}"


def clear_winners(image: Tensor) -> Tensor:
    """Of each 2x2 window whether its largest value leads so far that rounding does not choose another one."""
    P, Q = image.shape[2] // 2 * 2, image.shape[3] // 2 * 2
    windows = image[:, :, :P, :Q].unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4)
    first, second = windows.topk(2, dim=4).values.unbind(4)
    return first - second > 0.1 * image.max()


def check_gradients(
    ours: Callable[..., Any],
    exact: Callable[..., Any],
    operands: list[Tensor],
    device: str,
    kind: Any,
    pooled: Callable[..., Tensor] | None = None,
) -> None:
    """Both passes against float64 on the CPU; the activation is operand 0. ``pooled`` gives what a pool gets."""
    precision, dtype = kind
    given = [t.to(dtype if i == 0 else t.dtype).to(device).requires_grad_() for i, t in enumerate(operands)]
    reference = [t.detach().double().cpu().requires_grad_() for t in given]
    y, expected = ours(*given), exact(*reference)
    # Where the ReLU's or the pool's choice may hang on rounding, gradients cannot be compared: none goes there.
    dy = torch.randn(expected.shape, dtype=torch.float64)
    dy[expected.detach().abs() < 0.1 * expected.detach().abs().max()] = 0
    if pooled is not None:
        dy *= clear_winners(pooled(*reference).detach())
    dy = dy.to(dtype).double()
    y.backward(dy.to(dtype).to(device).to(memory_format=torch.channels_last))
    expected.backward(dy)
    assert y.dtype == dtype
    assert_close(y.detach(), expected.detach(), TOLERANCE[precision], "y")
    for i, (mine, theirs) in enumerate(zip(given, reference, strict=True)):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.dtype == mine.dtype
        assert_close(mine.grad, theirs.grad, 4 * TOLERANCE[precision], f"gradient {i}")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("op", ["conv_relu", "conv_relu_max_pool"])
def test_convolutions(device: str, op: str, shape: tuple[int, ...], padding: int, kind: Any) -> None:
    N, H, W, C, K = shape
    operands = [image(N, C, H, W), torch.randn(K, C, 3, 3) / (3 * C**0.5), torch.randn(K)]
    check_gradients(
        lambda x, w, b: getattr(ops, op)(x, w, b, padding, precision=kind[0]),
        lambda x, w, b: getattr(ops, f"{op}_reference")(x, w, b, padding),
        operands,
        device,
        kind,
        (lambda x, w, b: ops.conv_relu_reference(x, w, b, padding)) if op == "conv_relu_max_pool" else None,
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_conv_bn_relu_train(device: str, shape: tuple[int, ...], kind: Any) -> None:
    N, H, W, C, K = shape
    operands = [
        image(N, C, H, W),
        torch.randn(K, C, 3, 3) / (3 * C**0.5),
        torch.rand(K) + 0.5,
        torch.randn(K),
    ]
    check_gradients(
        lambda x, w, gamma, beta: ops.conv_bn_relu_train(
            x, w, torch.zeros(K, device=device), gamma, beta, precision=kind[0]
        )[0],
        lambda x, w, gamma, beta: ops.conv_bn_relu_train_reference(
            x, w, torch.zeros(K, dtype=torch.float64), gamma, beta
        )[0],
        operands,
        device,
        kind,
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("pool", [False, True], ids=["whole", "pooled"])
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_conv_bn_relu_conv_relu_train(device: str, shape: tuple[int, ...], pool: bool, kind: Any) -> None:
    """Beside the two operators that it replaces: they decide alike at the ReLU in the middle, where float64 would
    not, and a gradient that goes the other way there is no rounding error."""
    N, H, W, C, K = shape
    precision, dtype = kind
    first = [torch.randn(K, C, 3, 3) / (3 * C**0.5), torch.randn(K), torch.rand(K) + 0.5, torch.randn(K)]
    second = [torch.randn(40, K, 3, 3) / (3 * K**0.5), torch.randn(40)]
    operands = [image(N, C, H, W).to(dtype), *first, *second]

    def apart(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y1, mean, var = ops.conv_bn_relu_train(*given[:5], padding=1, precision=precision)
        convolve = ops.conv_relu_max_pool if pool else ops.conv_relu
        return convolve(y1, *given[5:], precision=precision), mean, var

    def head(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.conv_bn_relu_conv_relu_train(*given, padding1=1, pool=pool, precision=precision)

    found, dy = [], None
    for operator in (apart, head):
        given = [operand.detach().clone().to(device).requires_grad_() for operand in operands]
        y, mean, var = operator(*given)
        if dy is None:
            dy = torch.randn(y.shape).to(y)
            dy[y.detach().abs() < 0.1 * y.detach().abs().max()] = 0
        y.backward(dy)
        assert y.dtype == dtype
        found.append([y.detach(), mean, var, *(operand.grad for operand in given)])
    for i, (mine, theirs) in enumerate(zip(found[1], found[0], strict=True)):
        assert mine is not None
        assert theirs is not None
        assert mine.dtype == theirs.dtype
        assert_close(mine, theirs, TOLERANCE[precision], f"result {i}")


@pytest.mark.parametrize("shape", [(2, 32, 9, 12), (1, 5, 4, 4)], ids=str)
def test_max_pool_of_bfloat16(device: str, shape: tuple[int, ...]) -> None:
    x = image(*shape).bfloat16()
    ours, cpu = x.to(device).requires_grad_(), x.float().requires_grad_()
    y, expected = ops.max_pool(ours), ops.max_pool(cpu)
    dy = torch.randn(expected.shape).bfloat16()
    y.backward(dy.to(device))
    expected.backward(dy.float())
    assert torch.equal(y.cpu().float(), expected)
    assert ours.grad is not None
    assert torch.equal(ours.grad.cpu().float(), cpu.grad)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_conv_bn_relu(device: str, shape: tuple[int, ...], kind: Any) -> None:
    """Inference: statistics that are given."""
    (N, H, W, C, K), (precision, dtype) = shape, kind
    x, weight = image(N, C, H, W).to(dtype), torch.randn(K, C, 3, 3) / (3 * C**0.5)
    vectors = [torch.randn(K), torch.rand(K) + 0.5, torch.randn(K), torch.randn(K), torch.rand(K) + 0.5]
    ours = ops.conv_bn_relu(*(t.to(device) for t in (x, weight, *vectors)), padding=1, precision=precision)
    exact = ops.conv_bn_relu_reference(*(t.double() for t in (x, weight, *vectors)), padding=1)
    assert ours.dtype == dtype
    assert_close(ours, exact, TOLERANCE[precision], "y")


@pytest.mark.parametrize("relu", [False, True])
def test_dense_of_bfloat16(device: str, relu: bool) -> None:
    """PyTorch's product, here: that it gets there, and both passes' types."""
    operands = [torch.randn(37, 300).bfloat16(), torch.randn(50, 300) / 300**0.5, torch.randn(50)]
    given = [operand.to(device).requires_grad_() for operand in operands]
    exact = [operand.detach().double().requires_grad_() for operand in operands]
    y, expected = ops.dense(*given, relu), ops.dense_reference(*exact, relu)
    dy = torch.randn(37, 50).double()
    dy[expected.detach().abs() < 0.1 * expected.detach().abs().max()] = 0
    y.backward(dy.bfloat16().to(device))
    expected.backward(dy.bfloat16().double())
    assert_close(y.detach(), expected.detach(), TOLERANCE["bf16"], "y")
    for i, (mine, theirs) in enumerate(zip(given, exact, strict=True)):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.dtype == mine.dtype
        assert_close(mine.grad, theirs.grad, 4 * TOLERANCE["bf16"], f"gradient {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_what_the_cpu_drops(device: str, dtype: torch.dtype) -> None:
    x, seed, dy = torch.rand(3, 1001) + 0.5, torch.tensor([-17]), torch.rand(3, 1001) + 0.5
    ours, cpu = x.to(dtype).to(device).requires_grad_(), x.to(dtype).float().requires_grad_()
    y, expected = ops.dropout(ours, seed.to(device), 0.3), ops.dropout(cpu, seed, 0.3)
    y.backward(dy.to(dtype).to(device))
    expected.backward(dy.to(dtype).float())
    assert ours.grad is not None
    assert cpu.grad is not None
    for mine, theirs in ((y.detach(), expected.detach()), (ours.grad, cpu.grad)):
        assert torch.equal(mine.cpu(), theirs.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_warp_is_the_cpu_to_the_bit(device: str, dtype: torch.dtype) -> None:
    pictures = torch.randint(0, 256, (4, 33, 47, 3), dtype=torch.uint8)
    matrices = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]).double() + 0.1 * torch.randn(4, 6).double()
    ours = ops.warp(pictures.to(device), matrices.to(device), 3.0, dtype=dtype)
    assert torch.equal(ours.cpu(), ops.warp(pictures, matrices, 3.0).to(dtype))


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_a_network_predicts_as_the_cpu_does(device: str, precision: ops.Precision) -> None:
    network = models.create("final", image_size=140, precision=precision, seed=1).eval()
    x = torch.rand(3, 3, 140, 140).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        exact = models.torch_twin(network).double()(x.double())
        fast = models.for_inference(network.to(device))
        given = x.to(device)
        ours = fast(given.bfloat16() if precision == "bf16" else given)
    assert_close(ours, exact, 10 * TOLERANCE[precision], "logits")


def test_adam_that_counts_on_the_device(device: str) -> None:
    shapes = [(512, 300), (7,), (32, 3, 3, 3)]
    cpu = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    ours = [torch.nn.Parameter(p.detach().to(device)) for p in cpu]
    both = optim.Adam(cpu, lr=1e-2, l2=1e-3), optim.Adam(ours, lr=1e-2, l2=1e-3)
    both[1].count_on_device()
    for _ in range(3):
        for p, q in zip(cpu, ours, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.to(device)
        for optimizer in both:
            optimizer.step()
    for p, q in zip(cpu, ours, strict=True):
        torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=1e-6, atol=1e-7)


def small_run(device: str, precision: ops.Precision) -> tuple[models.Network, optim.Adam]:
    network = models.create("final", image_size=140, precision=precision, seed=1).to(device).train()
    return network, optim.Adam(network.parameter_groups(1e-4), lr=1e-4)


def batches(counts: list[int]) -> list[StoredBatch]:
    found = []
    for number, n in enumerate(counts):
        matrices = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]).double() + 0.01 * torch.randn(n, 6).double()
        pictures = torch.randint(0, 256, (n, 140, 140, 3), dtype=torch.uint8)
        found.append(StoredBatch(pictures, matrices, torch.randint(0, 3, (n,)), torch.arange(n), number))
    return found


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_a_graph_replays_the_steps_that_it_captured(cuda: str, precision: ops.Precision) -> None:
    """Captured twice, the same bits; not captured, the same but for cuBLAS' choices."""
    given = batches([4, 4, 3, 4, 4])
    results = []
    for whole in (4, 4, 5):  # a step for 5 pictures captures nothing here
        torch.manual_seed(3)
        network, optimizer = small_run(cuda, precision)
        with torch.cuda.device(cuda):
            step = GraphStep(network, optimizer, Cuda(torch.device(cuda)), whole, fill=0)
            torch.manual_seed(4)
            for batch in given:
                step(batch)
            results.append((step.take_sums(), [p.detach().cpu() for p in network.parameters()]))
    (sums, parameters), (again, same), (eager, close) = results
    assert again == sums
    assert all(map(torch.equal, same, parameters))
    assert eager[0] == pytest.approx(sums[0], rel=1e-3)
    for ours, theirs in zip(close, parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


@pytest.mark.usefixtures("direct")
def test_steps_follow_the_cpu(device: str) -> None:
    """Adam divides a small gradient by its size, and so makes rounding larger from step to step."""
    given = batches([2] * (3 if device.startswith("emulated") else 10))
    losses = []
    for where in ("cpu", device):
        network, optimizer = small_run(where, "ieee")
        torch.manual_seed(4)
        found = []
        for batch in given:
            images = ops.warp(batch.pictures.to(where), batch.matrices.to(where))
            loss = ops.softmax_cross_entropy(network(images), batch.labels.to(where))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss))
        losses.append(found)
    assert losses[1][:3] == pytest.approx(losses[0][:3], rel=1e-3)
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_errors_of_the_kernels_name_the_argument(device: str) -> None:
    """What maskcore.ops would have refused or changed before."""
    x, weight, bias = torch.randn(1, 3, 8, 8).to(device), torch.randn(4, 3, 3, 3).to(device), torch.randn(4)
    raw = torch.ops.maskcore.conv_relu
    nhwc = x.permute(0, 2, 3, 1).contiguous()
    with pytest.raises(RuntimeError, match=r"bias must be on the device of x"):
        raw(nhwc, weight, bias, 0)
    with pytest.raises(RuntimeError, match=r"x must be float32 or bfloat16"):
        raw(nhwc.double(), weight, bias.to(device), 0)
    with pytest.raises(RuntimeError, match=r"x must be contiguous"):
        raw(x.permute(0, 2, 3, 1), weight, bias.to(device), 0)
    with pytest.raises(RuntimeError, match=r"transformed must be None on a CUDA device"):
        raw(nhwc, weight, bias.to(device), 0, weight)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(2, 30, 26, 64, 64), (1, 33, 35, 128, 64), (3, 25, 25, 128, 256)], ids=str)
def test_wgmma_gives_what_mma_gives(
    device: str, shape: tuple[int, ...], kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same products, whose float32 sums are rounded at other places."""
    if device != "emulated:1" and (
        device == "emulated:0" or torch.cuda.get_device_capability(device) != (9, 0)
    ):
        pytest.skip("wgmma is for compute capability 9.0")
    (N, H, W, C, K), (precision, dtype) = shape, kind
    operands = [image(N, C, H, W).to(dtype), torch.randn(K, C, 3, 3) / (3 * C**0.5), torch.randn(K)]
    found = []
    for wgmma in ("0", "1"):
        monkeypatch.setenv("MASKCORE_WGMMA", wgmma)
        given = [operand.to(device).requires_grad_() for operand in operands]
        y = ops.conv_relu(*given, 1, precision=precision)
        # Where the ReLU may decide otherwise no gradient goes, whose upstream is the same for both.
        decided = y.detach().float() > 0.1 * y.detach().float().max()
        decided = decided if not found else found[0][-1]
        y.backward(decided.to(dtype))
        found.append([y.detach(), *(operand.grad for operand in given), decided])
    for i, (mine, theirs) in enumerate(zip(found[1][:-1], found[0][:-1], strict=True)):
        tolerance = 2.0**-9 if mine.dtype == torch.bfloat16 else 2e-6
        if dtype == torch.bfloat16 and i >= 2:
            # The filter's and the bias' gradients: of sums over pixels a tensor core may cut off the last bit, once in
            # 16 terms. In TF32 they are not by wgmma.
            tolerance = max(tolerance, N * H * W / 16 * 2.0**-24)
        assert_close(mine, theirs, tolerance, f"result {i}")


def test_a_stream_is_followed(cuda: str) -> None:
    x = torch.rand(64, 1024).to(cuda)
    seed = torch.tensor([5], device=cuda)
    stream = torch.cuda.Stream(cuda)
    stream.wait_stream(torch.cuda.current_stream(cuda))
    with torch.cuda.stream(stream):
        y = ops.dropout(x * 2, seed, 0.5)
    stream.synchronize()
    assert torch.equal(y, ops.dropout(x * 2, seed, 0.5))
