"""Time each Triton kernel alone, on the layers of DiNAT-Tiny; append rows to benchmarks/results/kernels.csv.

    PYTHONPATH=.:kernels python benchmarks/kernel_speed.py --batch 128

`us` is the median of 30 replays of a CUDA graph, the L2 cache cleared before each; `floor_ratio` the floor of the pass
that the kernel belongs to over the time of this pass.  The other columns are what benchmarks/aot.py says of the kernel
that ran: bytes, the time that each resource would need, and which binds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from aot import ARCHITECTURES, case_of, describe
from dinat_kernels.impl.fused.launch import Launch, gpu_of
from dinat_kernels.tune import Layer
from harness import RESULTS, add_device, alone, append, facts, rounded
from problems import MODELS, Problem, device_named, floor

ESTIMATES = ("programs", "waves", "in_flight", "dram_bytes", "l2_bytes", "dram_us", "l2_us", "issue_us", "exp2_us")
ESTIMATES += ("time_us", "binds", "paper_ratio")
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def launches(p: Problem, batch: int, device: str) -> list[Launch]:
    """The kernels of a layer, each once run, so that all read what they should."""
    found = Layer(p.side, p.kernel_size, p.dilation, p.heads, p.head_dim, DTYPES[device]).launches(batch, device)
    for launch in found:
        launch()
    return found


def estimates(p: Problem, batch: int, found: list[Launch]) -> list[dict]:
    """What aot.py says of kernels that ran; empty where it does not know the GPU."""
    arch = gpu_of(found[0].tensors[0].device).arch
    if arch not in ARCHITECTURES:
        return [{} for _ in found]
    compiled = [(launch, next(iter(launch.plan.compiled.values()))) for launch in found]
    return describe(arch, case_of(p, batch=batch), compiled)


def measure(p: Problem, batch: int, device: str, output: Path, samples: int = 30) -> list[dict]:
    """Time the kernels of a layer; append a row for each."""
    found = launches(p, batch, device)
    started = facts(device)
    rates = device_named(started["device"])
    micros = [1e6 * alone(launch, device, samples) for launch in found]
    rows = []
    for launch, us, estimate in zip(found, micros, estimates(p, batch, found), strict=True):
        mode = "forward" if launch.plan.name == "forward" else "backward"
        of_pass = sum(
            t for x, t in zip(found, micros, strict=True) if (x.plan.name == "forward") == (mode == "forward")
        )
        ratio = rounded(1e6 * floor(p, batch, rates, mode=mode) / of_pass) if rates else ""
        problem = p._asdict() | dict(batch=batch, dtype=str(DTYPES[device])[6:], kernel=launch.plan.name)
        columns = dict(us=rounded(us), floor_ratio=ratio) | {name: estimate.get(name, "") for name in ESTIMATES}
        rows.append(started | problem | columns)
        append(output, rows[-1])
        print(f"{p.name:16} {launch.plan.name:8} {us:9.1f} us, floor ratio of the pass {ratio}", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["dinat_tiny"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels.csv")
    add_device(parser)
    args = parser.parse_args(arguments)
    for name in args.models:
        for p in MODELS[name]:
            measure(p, args.batch, args.device, args.output)


if __name__ == "__main__":
    main()
