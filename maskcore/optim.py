"""Adam with an L2 penalty, one fused operator a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch

from maskcore import ops


class Adam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015), in place over all parameters of a group in one operator.

    Args:
        params: parameters, or groups of them; a group may have its own ``lr``, ``betas``, ``eps``, ``l2``
            and ``epsilon``.
        lr: step size.
        betas: decay of the two moments.
        eps: 1e-7 is Keras' default (PyTorch's is 1e-8).
        l2: the Keras penalty ``l2 * sum(w^2)`` in the loss: the gradient gets ``2 * l2 * w``, through both
            moments. ``torch.optim.Adam(weight_decay=2 * l2)`` is the same; AdamW is not.
        epsilon: ``"keras"`` adds eps to the uncorrected ``sqrt(v)``
            (``keras.optimizers.Adam``: ``p -= lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps)``);
            ``"torch"`` adds it after the bias correction, as ``torch.optim.Adam`` does.

    Parameters must be float32 and dense (any memory format). A parameter without a gradient is left as it is.
    """

    # Not as torch decorates them: its decorator imports torch._dynamo when first called, a second and 70 MB that a
    # process which compiles nothing would spend on keeping the compiler out of these two.
    add_param_group = getattr(
        torch.optim.Optimizer.add_param_group, "__wrapped__", torch.optim.Optimizer.add_param_group
    )
    zero_grad = getattr(torch.optim.Optimizer.zero_grad, "__wrapped__", torch.optim.Optimizer.zero_grad)

    #: Of each group, once count_on_device was called: the number of steps done, int64 on the parameters' device.
    counts: list[torch.Tensor] | None = None

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-7,
        l2: float = 0.0,
        epsilon: Literal["keras", "torch"] = "keras",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "l2": l2, "epsilon": epsilon})
        for group in self.param_groups:
            _check(group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for i, group in enumerate(self.param_groups):
            if self.counts is None:
                self._step_group(group)
            else:
                self._step_counted(group, self.counts[i])
        return loss

    def count_on_device(self) -> None:
        """From now on the steps are counted where the parameters are, so that a step can be captured in a CUDA graph.

        Every parameter must have a gradient in every step, and all of a group as many steps behind them.
        """
        self.counts = []
        for group in self.param_groups:
            steps = {self._state_of(p)["step"] for p in group["params"]}
            if len(steps) != 1:
                raise RuntimeError(
                    f"the parameters of a group have done {sorted(steps)} steps: they must be as many"
                )
            device = group["params"][0].device
            self.counts.append(torch.tensor(steps.pop(), dtype=torch.int64, device=device))

    def note_counts(self) -> None:
        """Writes the counts on the device, where they are, into the parameters' state. Waits for the device."""
        for group, count in zip(self.param_groups, self.counts or [], strict=False):
            for p in group["params"]:
                self.state[p]["step"] = int(count)

    def state_dict(self) -> dict[str, Any]:
        self.note_counts()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.counts is not None:
            self.count_on_device()

    def _state_of(self, p: torch.Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        return state

    def _step_counted(self, group: dict[str, Any], count: torch.Tensor) -> None:
        parameters, gradients = group["params"], []
        for p in parameters:
            if p.grad is None:
                raise RuntimeError("a step that is counted on the device needs a gradient of every parameter")
            gradients.append(_laid_out_as(p, p.grad))
        beta1, beta2 = group["betas"]
        ops.adam_counted_(
            parameters,
            gradients,
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
            count,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            l2=group["l2"],
            keras_epsilon=group["epsilon"] == "keras",
        )

    def _step_group(self, group: dict[str, Any]) -> None:
        # Parameters that joined late have a step count of their own: one call for each count.
        by_step: dict[int, list[torch.Tensor]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("maskcore.optim.Adam does not take sparse gradients")
            state = self._state_of(p)
            state["step"] += 1
            by_step.setdefault(state["step"], []).append(p)
        beta1, beta2 = group["betas"]
        for step, parameters in by_step.items():
            ops.adam_(
                parameters,
                [_laid_out_as(p, p.grad) for p in parameters if p.grad is not None],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                l2=group["l2"],
                step=step,
                keras_epsilon=group["epsilon"] == "keras",
            )


def _laid_out_as(p: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient in p's memory layout: the kernel walks all four arrays in the order they lie in."""
    return grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)


def _check(group: dict[str, Any]) -> None:
    if not group["lr"] >= 0:
        raise ValueError(f"lr must not be negative, is {group['lr']}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must lie in [0, 1), are {group['betas']}")
    if not group["eps"] >= 0:
        raise ValueError(f"eps must not be negative, is {group['eps']}")
    if not group["l2"] >= 0:
        raise ValueError(f"l2 must not be negative, is {group['l2']}")
    if group["epsilon"] not in ("keras", "torch"):
        raise ValueError(f"epsilon must be 'keras' or 'torch', is {group['epsilon']!r}")
