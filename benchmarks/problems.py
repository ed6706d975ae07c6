"""What is measured: the attention layers of published models, and large maps; and the floor of their run time."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """One call of the operator on a square map; head_dim is 32, as in every published model."""

    name: str
    side: int  # tokens per side
    heads: int
    kernel_size: int
    dilation: int
    head_dim: int = 32

    @property
    def dense(self) -> bool:
        return self.kernel_size * self.dilation == self.side


def _levels(model: str, side: int, heads: int, kernel_size: int) -> list[Problem]:
    """The distinct layers of a hierarchical model: local, and with the largest dilation, on four levels."""
    problems = []
    for level in range(4):
        n, h = side >> level, heads << level
        for dilation in sorted({1, n // kernel_size}):
            problems.append(Problem(f"{model}.{level}.d{dilation}", n, h, kernel_size, dilation))
    return problems


MODELS = {
    "dinat_tiny": _levels("dinat_tiny", 56, 2, 7),
    "dinat_s_tiny": _levels("dinat_s_tiny", 56, 3, 7),
    "dinat_large_384": _levels("dinat_large_384", 96, 6, 7),
    "dinat_large_384_11x11": _levels("dinat_large_384_11x11", 96, 6, 11),
}
LARGE_MAPS = [Problem(f"map{side}.d{d}", side, 4, 7, d) for side in (128, 512) for d in (1, side // 7)]
# Growing maps of local attention: dense attention becomes infeasible, linear cost stays flat per token.
MAPS = [Problem(f"map{side}.d1", side, 2, 7, 1) for side in (14, 28, 56, 112, 224)]


class Device(NamedTuple):
    """Rates of a GPU, per second: bytes copied, FLOP of bf16 matrix products, bytes from its L2 cache; and its size."""

    bandwidth: float
    matrix: float
    l2: float
    processors: int
    clock: float

    @property
    def exponentials(self) -> float:
        """16 per clock and multiprocessor."""
        return 16 * self.processors * self.clock

    @property
    def instructions(self) -> float:
        """Of warps: one per clock and scheduler, of which a multiprocessor has four."""
        return 4 * self.processors * self.clock


# Dense bf16 rates and memory bandwidth of the vendors' data sheets (bandwidth: 90 % of it, what a copy reaches: 4.26
# TB/s on an H200).  The rates of L2 caches are not published: an H200's read 7.5 TB/s by asynchronous copies (8.9 by
# plain loads; benchmarks/ceilings.py); as many bytes per clock and multiprocessor are assumed for the others.
_L2 = 7.5e12 / (132 * 1.83e9)
DEVICES = {
    "A100": Device(0.9 * 2.0e12, 312e12, _L2 * 108 * 1.41e9, 108, 1.41e9),
    "H100": Device(0.9 * 3.35e12, 989e12, _L2 * 132 * 1.83e9, 132, 1.83e9),
    "H200": Device(0.9 * 4.8e12, 989e12, _L2 * 132 * 1.83e9, 132, 1.83e9),
    "B200": Device(0.9 * 8.0e12, 2250e12, _L2 * 148 * 1.85e9, 148, 1.85e9),
}


# Pass -> tensors of the size of the query that are moved, products of a query and a key vector, exponentials of a pair.
# The backward pass reads q, k, v, out and its gradient and writes three gradients; its products are five.
PASSES = {"forward": (4, 2, 1), "backward": (8, 5, 1), "training": (12, 7, 2)}


def floor(problem: Problem, batch: int, device: Device, element_size: int = 2, *, mode: str = "forward") -> float:
    """Seconds below which no implementation gets: the slowest of memory, products and exponentials of visible keys.

    Args:
        mode: of `PASSES`; "training" is a forward and a backward pass.
    """
    tensors, products, exponentials = PASSES[mode]
    tokens = batch * problem.side**2 * problem.heads
    pairs = tokens * problem.kernel_size**2
    moved = tensors * tokens * problem.head_dim * element_size
    flop = 2 * products * pairs * problem.head_dim
    return max(moved / device.bandwidth, flop / device.matrix, exponentials * pairs / device.exponentials)


def device_named(name: str) -> Device | None:
    """The rates of the GPU that calls itself `name`, if known."""
    return next((rates for key, rates in DEVICES.items() if key in name), None)
