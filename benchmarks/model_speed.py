"""Time whole models and timm peers of matching size in turn; append rows to benchmarks/results/models.csv.

    PYTHONPATH=.:kernels python benchmarks/model_speed.py --batch 1 8
    PYTHONPATH=.:kernels python benchmarks/model_speed.py --modes compiled --passes inference --no-memory
    PYTHONPATH=.:kernels python benchmarks/model_speed.py --scale

"inference" is a forward pass in inference mode; "training" a forward pass, a cross entropy and a backward pass, without
optimizer, stochastic depth off.  Images and models are in channels_last.  A GPU takes bf16 (training: autocast of
float32 weights), the CPU float32; "compiled" is `torch.compile`, by inductor.  Times are medians with 20th and 80th
percentiles, in milliseconds a batch.

`speed` is the throughput over that of the first model, sampled in turn: above 1, the model is faster.
`work_speed` compares images/s x GMACs in the same way; GMACs are counted here by one rule for all models.
`memory_mb` is the peak of one eager step beyond weights and images, by PyTorch's allocator (MB = 10^6 bytes).

`--scale` times one model on growing images and appends to results/scale.csv; a token is a patch of 4 x 4 pixels.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import cache, partial

import timm
import torch
from harness import add_arguments, add_device, append, facts, interleaved, peak_memory, rounded
from timm.layers import set_fused_attn, use_fused_attn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import dinat  # noqa: F401  registers our models

MODELS = [
    *("swin_tiny_patch4_window7_224", "dinat_s_tiny", "dinat_tiny", "nat_tiny", "dinat_mini"),
    *("convnext_tiny", "deit_small_patch16_224", "maxvit_tiny_tf_224", "hiera_tiny_224"),
]
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
SIZES = [224, 320, 448, 640, 1024, 1448, 2048]  # pixels


def build(name: str, pixels: int, batch: int, mode: str, device: str, compiled: bool = False) -> Callable[[], object]:
    """What is timed: a step of a new model on new images."""
    torch.manual_seed(0)
    training = mode == "training"
    model = timm.create_model(name, drop_path_rate=0.0).train(training)
    images = torch.randn(batch, 3, pixels, pixels)
    dtype = torch.bfloat16 if device == "cuda" and not training else torch.float32
    model, images = (x.to(device, dtype, memory_format=torch.channels_last) for x in (model, images))
    targets = torch.randint(1000, (batch,), device=device)
    run = torch.compile(model) if compiled else model
    if not training:
        return torch.inference_mode()(lambda: run(images))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = F.cross_entropy(run(images), targets)
        loss.backward()

    return step


@cache
def gmacs(name: str, pixels: int) -> float:
    """Multiply-accumulates of one image, in 10^9, of matrix products, convolutions and attention."""
    fused = use_fused_attn()
    set_fused_attn(False)  # what PyTorch counts by itself
    with torch.device("meta"):
        model, image = timm.create_model(name).eval(), torch.empty(1, 3, pixels, pixels)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    set_fused_attn(bool(fused))
    return counter.get_total_flops() / 2e9


def memory(name: str, pixels: int, batch: int, mode: str, device: str) -> int:
    """Peak of a step in bytes."""
    return peak_memory(build(name, pixels, batch, mode, device), device)


def measure(pixels: int, batch: int, mode: str, compiler: str, args: argparse.Namespace) -> None:
    """Time all models in turn; append a row for each."""
    builders = {
        name: partial(build, name, pixels, batch, mode, args.device, compiler == "compiled") for name in args.models
    }
    print(f"batch {batch}, {pixels} px, {mode}, {compiler}")
    problem = {"pixels": pixels, "batch": batch, "dtype": DTYPES[args.device], "pass": mode, "mode": compiler}
    started = facts(args.device)
    timings = interleaved(builders, args.device, args.seconds, args.rounds)
    first = next(iter(timings))
    for name, timing in timings.items():
        speed, work = 1 / timing.ratio, gmacs(name, pixels)
        peak = memory(name, pixels, batch, mode, args.device) if args.memory and compiler == "eager" else None
        columns = dict(
            model=name,
            speed=rounded(speed),
            work_speed=rounded(speed * work / gmacs(first, pixels)),
            against=first,
            **timing.columns(1e-3),
            images_per_s=rounded(batch / timing.median),
            gmacs=rounded(work),
            memory_mb="" if peak is None else rounded(peak / 1e6),
        )
        append(args.output, started | problem | columns)
        print(
            f"{speed:6.3f}x  work {columns['work_speed']:6.3f}x  {columns['images_per_s']:8.2f} images/s  "
            f"{work:6.2f} GMACs  {columns['memory_mb'] or '?':>6} MB  {name}",
            flush=True,
        )


def scale(args: argparse.Namespace) -> None:
    """Time and memory per token of the first model on images of all sizes, all in turn."""
    name, batch, started = args.models[0], 1, facts(args.device)
    builders = {str(pixels): partial(build, name, pixels, batch, "inference", args.device) for pixels in args.sizes}
    timings = interleaved(builders, args.device, args.seconds, args.rounds)
    for pixels, timing in zip(map(int, timings), timings.values(), strict=True):
        tokens = batch * (pixels // 4) ** 2
        peak = memory(name, pixels, batch, "inference", args.device)
        problem = {"model": name, "pixels": pixels, "batch": batch, "dtype": DTYPES[args.device], "pass": "inference"}
        per_token = dict(ns_per_token=rounded(1e9 * timing.median / tokens), bytes_per_token=rounded(peak / tokens))
        append(args.output, started | problem | per_token | timing.columns(1e-3) | {"memory_mb": rounded(peak / 1e6)})
        print(
            *(f"{key} {value:g} " for key, value in per_token.items()), f"{pixels} px, {peak / 1e6:.0f} MB", flush=True
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", help="the first one is what others are compared with")
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--passes", nargs="*", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument("--modes", nargs="*", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--sizes", nargs="*", type=int, help="pixels per side")
    parser.add_argument("--scale", action="store_true", help="one model (nat_mini), all sizes")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure it")
    add_device(parser)
    add_arguments(parser, "models.csv", seconds=20.0)
    args = parser.parse_args(arguments)
    if args.scale:
        if args.output == parser.get_default("output"):
            args.output = args.output.with_name("scale.csv")
        args.models, args.sizes = args.models or ["nat_mini"], args.sizes or SIZES
        return scale(args)
    args.models = args.models or MODELS
    for case in itertools.product(args.sizes or [224], args.batch, args.passes, args.modes):
        torch.compiler.reset()
        measure(*case, args)


if __name__ == "__main__":
    main()
