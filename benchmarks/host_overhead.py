"""Time the Python of a call with the backend "triton": in inference mode, under autograd, and with the backward pass.

    PYTHONPATH=.:kernels python benchmarks/host_overhead.py                  # where there is a GPU, with real launches
    PYTHONPATH=.:kernels python benchmarks/host_overhead.py --device cpu     # everything but the launch itself

Prints microseconds per call, medians, and beside them what PyTorch takes itself in the same process for an addition,
and for an autograd function with as many tensors that computes nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from harness import add_device


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

    @staticmethod
    def forward(ctx, query, key, value, rpb, out, lse, zeros):
        out, lse = out.detach(), lse.detach()
        ctx.zeros = zeros
        ctx.save_for_backward(query, key, value, rpb, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        _, _, _, rpb, *_ = ctx.saved_tensors
        return grad_out, grad_out, grad_out, None if rpb is None else ctx.zeros, None, None, None


def microseconds(run: Callable[[], object], device: str, samples: int) -> float:
    """Median of samples of 10 calls, each shorter than the slices of time that processes take turns in.

    A GPU is idle before each, and keeps up: its kernels are shorter than their launches.
    """
    times = []
    for _ in range(samples):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            run()
        times.append((time.perf_counter() - start) / 10)
    return 1e6 * statistics.median(times)


def measure(device: str, samples: int = 500) -> dict[str, float]:
    """Microseconds of each kind of call.  On the CPU Triton must be told to interpret, before it is imported."""
    from dinat_kernels import na2d
    from dinat_kernels.impl.fused import launch

    if device == "cpu":  # nothing is interpreted, as nothing is launched
        make_plan = launch.make_plan
        launch.make_plan = lambda *problem: make_plan(*problem)._replace(compiled=Launched())
    options = dict(device=device, dtype=torch.bfloat16)
    q, k, v = torch.randn(1, 14, 14, 3, 2, 32, **options).unbind(3)
    inputs = [x.requires_grad_() for x in (q, k, v, torch.randn(2, 13, 13, device=device))]
    d_out = torch.randn(1, 14, 14, 2, 32, **options)
    made = torch.zeros_like(d_out), torch.zeros(d_out.shape[:-1], device=device), torch.zeros_like(inputs[3])

    def call(bias: bool = True) -> torch.Tensor:
        return na2d(q, k, v, 7, rpb=inputs[3] if bias else None, backend="triton")

    def gradients(out: torch.Tensor, bias: bool) -> None:
        torch.autograd.grad(out, inputs if bias else inputs[:3], d_out)

    one = torch.ones((), device=device)
    timed = {"inference": torch.inference_mode()(call), "addition": lambda: one + one, "forward": call}
    for bias, name in ((False, "both passes without bias"), (True, "both passes")):
        table = inputs[3] if bias else None
        timed[f"PyTorch, {name}"] = lambda b=bias, t=table: gradients(Nothing.apply(q, k, v, t, *made)[0], b)
        timed[name] = lambda b=bias: gradients(call(b), b)
    for run in timed.values():  # compiles
        run()
    return {name: microseconds(run, device, samples) for name, run in timed.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_device(parser)
    device = parser.parse_args().device
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    for name, time_of_call in measure(device).items():
        print(f"{name:34} {time_of_call:6.1f} us")


if __name__ == "__main__":
    main()
