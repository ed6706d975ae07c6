"""Time the Python of a call with the backend "triton", without a GPU: everything but the launch itself.

    PYTHONPATH=.:kernels python benchmarks/host_overhead.py

Prints microseconds per call, medians: in inference mode, under autograd, and with the backward pass; and beside them
what PyTorch takes itself in the same process for an addition, and for an autograd function with as many tensors that
computes nothing.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"  # accepts CPU tensors; nothing is interpreted, as nothing is launched

import torch
from dinat_kernels import na2d
from dinat_kernels.impl.fused import launch


def nothing(*arguments) -> None: ...


class Launched(dict):
    """Stands for the compiled kernels of a plan: found as they are, but their launch does nothing."""

    def get(self, variant: tuple) -> dict:
        hash(variant)
        return self

    def __getitem__(self, grid: tuple) -> Callable:
        return nothing


class Nothing(torch.autograd.Function):
    """Saves and returns what attention does, made beforehand."""

    out, lse, zeros = (
        torch.zeros(1, 14, 14, 2, 32, dtype=torch.bfloat16),
        torch.zeros(1, 14, 14, 2),
        torch.zeros(2, 13, 13),
    )

    @staticmethod
    def forward(ctx, query, key, value, rpb):
        out, lse = Nothing.out.detach(), Nothing.lse.detach()
        ctx.save_for_backward(query, key, value, rpb, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        _, _, _, rpb, *_ = ctx.saved_tensors
        return grad_out, grad_out, grad_out, None if rpb is None else Nothing.zeros


def microseconds(run: Callable[[], object]) -> float:
    """Median of 500 samples of 10 calls, each shorter than the slices of time that processes take turns in."""
    samples = []
    for _ in range(500):
        start = time.perf_counter()
        for _ in range(10):
            run()
        samples.append((time.perf_counter() - start) / 10)
    return 1e6 * statistics.median(samples)


def main() -> None:
    make_plan = launch.make_plan
    launch.make_plan = lambda *problem: make_plan(*problem)._replace(compiled=Launched())
    q, k, v = torch.randn(1, 14, 14, 3, 2, 32, dtype=torch.bfloat16).unbind(3)
    inputs = [x.requires_grad_() for x in (q, k, v, torch.randn(2, 13, 13))]
    d_out = torch.randn(1, 14, 14, 2, 32, dtype=torch.bfloat16)

    def call(bias: bool = True) -> torch.Tensor:
        return na2d(q, k, v, 7, rpb=inputs[3] if bias else None, backend="triton")

    def gradients(out: torch.Tensor, bias: bool) -> None:
        torch.autograd.grad(out, inputs if bias else inputs[:3], d_out)

    one = torch.ones(())
    timed = {"addition": lambda: one + one, "forward": call}
    for bias, name in ((False, "both passes without bias"), (True, "both passes")):
        table = inputs[3] if bias else None
        timed[f"PyTorch, {name}"] = lambda b=bias, t=table: gradients(Nothing.apply(q, k, v, t)[0], b)
        timed[name] = lambda b=bias: gradients(call(b), b)
    with torch.inference_mode():
        print(f"{'inference':34} {microseconds(call):6.1f} us")
    for name, run in timed.items():
        print(f"{name:34} {microseconds(run):6.1f} us")


if __name__ == "__main__":
    main()
