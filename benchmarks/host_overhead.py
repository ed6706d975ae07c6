"""Time the Python of a call with the backend "triton", without a GPU: everything but the launch itself.

    PYTHONPATH=.:kernels python benchmarks/host_overhead.py

Prints microseconds per call, medians: with a bias, in inference mode and under autograd (forward pass), and beside them
the cheapest call there is in the same process, an addition of two numbers in PyTorch.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import lru_cache

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


def microseconds(run: Callable[[], object]) -> float:
    """Median of 50 samples of 100 calls."""
    samples = []
    for _ in range(50):
        start = time.perf_counter()
        for _ in range(100):
            run()
        samples.append((time.perf_counter() - start) / 100)
    return 1e6 * statistics.median(samples)


def main() -> None:
    launch._plan = lru_cache(lambda *problem: launch.make_plan(*problem)._replace(compiled=Launched()))
    q, k, v = torch.randn(1, 56, 56, 3, 2, 32).unbind(3)
    rpb = torch.nn.Parameter(torch.randn(2, 13, 13))

    def call() -> torch.Tensor:
        return na2d(q, k, v, 7, rpb=rpb, backend="triton")

    one = torch.ones(())
    print(f"addition   {microseconds(lambda: one + one):6.1f} us")
    with torch.inference_mode():
        print(f"inference  {microseconds(call):6.1f} us")
    print(f"autograd   {microseconds(call):6.1f} us")


if __name__ == "__main__":
    main()
