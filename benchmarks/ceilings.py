"""Measure what a GPU can do at most: bytes copied, bytes read from its L2 cache, exponentials, and an empty launch.

    PYTHONPATH=.:kernels python benchmarks/ceilings.py

The rates that the estimates of paper.py and the floors of problems.py take for granted.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from harness import add_device, alone, rounded


class Sizes(NamedTuple):
    """How much is done; programs and tiles have no common divisor beyond a few, so that programs share the tiles."""

    copied: int = 2 << 30  # bytes that are read, and written elsewhere
    tiles: int = 3072  # of 8 KB: 24 MB, which the L2 cache holds and no L1 cache does
    programs: int = 1056  # eight on each of 132 multiprocessors
    tiles_read: int = 581  # by each: 24 MB 200 times, by all
    exponentials: int = 4096  # of each of 1,024 numbers in a program


TINY = Sizes(1 << 12, 8, 1, 2, 2)  # for the CPU


@triton.jit
def empty_kernel(p):
    pass


@triton.jit
def read_kernel(p, p_sum, tiles, steps, PIPELINED: tl.constexpr):
    """Sums up tiles of (64, 64) in fp16, each program others in turn; pipelined ones come by asynchronous copies."""
    o = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    i, programs = tl.program_id(0), tl.num_programs(0)
    b_sum = tl.zeros([64, 64], tl.float32)
    b_one = tl.full([64, 64], 1.0, tl.float16)
    for step in range(steps):
        p_tile = p + (i + step * programs) % tiles * 4096
        if PIPELINED:  # what a product reads is copied to shared memory ahead of time
            b_sum = tl.dot(b_one, tl.load(p_tile + o), b_sum)
        else:
            b_sum += tl.load(p_tile + o, cache_modifier=".cg").to(tl.float32)
    tl.store(p_sum + i, tl.sum(b_sum))


@triton.jit
def exp2_kernel(p_sum, steps):
    b = tl.arange(0, 1024).to(tl.float32) * -1e-3
    for _ in range(steps):
        b = tl.exp2(b) - 1.0
    tl.store(p_sum + tl.program_id(0), tl.sum(b))


def measure(device: str, sizes: Sizes, samples: int = 5) -> dict[str, float]:
    """Bytes per second of a copy and of both kinds of reads from the L2 cache, exponentials per second, and seconds."""
    source = torch.randint(-128, 127, (sizes.copied // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    tiles = torch.randn(sizes.tiles * 4096, device=device, dtype=torch.float16)
    sums = torch.empty(sizes.programs, device=device)
    read = sizes.programs * sizes.tiles_read * 8192
    grid = (sizes.programs,)

    def reading(pipelined: bool) -> float:
        run = lambda: read_kernel[grid](tiles, sums, sizes.tiles, sizes.tiles_read, pipelined, num_stages=4)  # noqa: E731
        return read / alone(run, device, samples)

    done = 1024 * sizes.programs * sizes.exponentials
    return dict(
        # By a kernel: a copy by the driver, in a graph, reached 2.7 TB/s of an H200's 4.3.
        copy=2 * sizes.copied / alone(lambda: torch.neg(source, out=target), device, samples),
        l2_plain=reading(False),
        l2_async=reading(True),
        exp2=done / alone(lambda: exp2_kernel[grid](sums, sizes.exponentials), device, samples),
        launch=alone(lambda: empty_kernel[(1,)](sums), device, samples),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_device(parser)
    device = parser.parse_args().device
    for name, value in measure(device, Sizes() if device == "cuda" else TINY).items():
        print(f"{name:9} {rounded(value):10g}")


if __name__ == "__main__":
    main()
