"""Time the operator and its peers on a GPU; append rows to benchmarks/results/operator.csv.

    PYTHONPATH=.:kernels python benchmarks/operator_speed.py --models dinat_tiny --batch 128

Peers run in the same process on the same tensors: FlexAttention (compiled; same mask and bias), dense scaled
dot-product attention with the bias as its mask, a gather of every query's keys, and NATTEN where it is installed
(without bias, which it does not have).  A peer that cannot run a problem leaves a line on the screen and no row.

Times are medians with 20th and 80th percentiles, in microseconds, of a forward pass ("forward") or of a forward and
backward pass with the gradients of q, k, v and the bias ("training"), with the L2 cache cleared before each.
`floor_ratio` is the floor of problems.py over the median.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import triton
from dinat_kernels import na2d
from dinat_kernels.geometry import make_neighborhood, visible_range
from problems import LARGE_MAPS, MODELS, Problem, device_named, floor
from torch import Tensor
from torch.nn import functional as F

RESULTS = Path(__file__).parent / "results" / "operator.csv"
# Dense masks beyond this many entries are not built.
LARGEST_MASK = 1 << 28


@cache
def axis_tables(p: Problem) -> tuple[Tensor, Tensor]:
    """Start of the window in group positions (side,), and the tokens that every query sees (side, kernel_size)."""
    index = torch.arange(p.side)
    start = torch.empty_like(index)
    for group in range(p.dilation):
        n = len(index[group :: p.dilation])
        window = make_neighborhood(1, p.kernel_size, p.dilation)
        first, _ = visible_range(torch.arange(n).numpy(), n, p.kernel_size, window.stride[0], False)
        start[group :: p.dilation] = torch.from_numpy(first)
    tokens = (start[:, None] + torch.arange(p.kernel_size)) * p.dilation + (index % p.dilation)[:, None]
    return start.cuda(), tokens.cuda()


def visible_and_entry(p: Problem, start: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Of one axis: is the key in the query's window, and its entry in the bias table (clamped where it is not)."""
    k, d = p.kernel_size, p.dilation
    position = key // d
    visible = (key % d == query % d) & (position >= start[query]) & (position < start[query] + k)
    return visible, (position - query // d + k - 1).clamp(0, 2 * k - 2)


def fused(p: Problem, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Callable[[], Tensor]:
    return lambda: na2d(q, k, v, p.kernel_size, dilation=p.dilation, rpb=rpb, backend="triton")


def tiled(p: Problem, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Callable[[], Tensor]:
    return lambda: na2d(q, k, v, p.kernel_size, dilation=p.dilation, rpb=rpb, backend="torch")


def flex(p: Problem, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    start, _ = axis_tables(p)
    side = p.side

    def mask(batch, head, query, key):
        rows, _ = visible_and_entry(p, start, query // side, key // side)
        columns, _ = visible_and_entry(p, start, query % side, key % side)
        return rows & columns

    def add_bias(score, batch, head, query, key):
        _, row = visible_and_entry(p, start, query // side, key // side)
        _, column = visible_and_entry(p, start, query % side, key % side)
        return score + rpb[head, row, column]

    blocks = torch.compile(create_block_mask)(mask, None, None, side**2, side**2, device="cuda")
    attend = torch.compile(flex_attention, dynamic=False)
    score_mod = None if rpb is None else add_bias
    return lambda: heads_last(attend(*heads_first(q, k, v), block_mask=blocks, score_mod=score_mod), side)


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """(batch, side, side, heads, dim) to (batch, heads, tokens, dim), as attention functions of PyTorch take it."""
    return [x.flatten(1, 2).transpose(1, 2) for x in tensors]


def heads_last(out: Tensor, side: int) -> Tensor:
    return out.transpose(1, 2).unflatten(1, (side, side))


def dense(p: Problem, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Callable[[], Tensor]:
    if p.side**4 * p.heads > LARGEST_MASK:
        raise MemoryError("the dense mask is too large")
    start, _ = axis_tables(p)
    index = torch.arange(p.side, device="cuda")
    visible, entry = visible_and_entry(p, start, index[:, None], index[None, :])
    mask = (visible[:, None, :, None] & visible[None, :, None, :])[None]

    def bias() -> Tensor:
        bias = 0.0 if rpb is None else rpb[:, entry[:, None, :, None], entry[None, :, None, :]]
        return torch.where(mask, bias, float("-inf")).to(q.dtype).flatten(3, 4).flatten(1, 2)[None]

    ready = None if rpb is not None and rpb.requires_grad else bias()  # training makes it anew for its gradient

    def run() -> Tensor:
        attn_mask = bias() if ready is None else ready
        return heads_last(F.scaled_dot_product_attention(*heads_first(q, k, v), attn_mask=attn_mask), p.side)

    return run


def gather(p: Problem, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Callable[[], Tensor]:
    if q.numel() * p.kernel_size**2 > 1 << 32:
        raise MemoryError("the gathered keys are too large")
    _, tokens = axis_tables(p)
    index = (tokens[:, None, :, None] * p.side + tokens[None, :, None, :]).flatten(0, 1).flatten(1)  # (queries, keys)
    position = torch.arange(p.side, device="cuda") // p.dilation
    entry = tokens // p.dilation - position[:, None] + p.kernel_size - 1  # (side, kernel_size)

    def run() -> Tensor:
        bias = (
            None if rpb is None else rpb[:, entry[:, None, :, None], entry[None, :, None, :]].flatten(1, 2).flatten(2)
        )
        queries, keys, values = (x.flatten(1, 2) for x in (q, k, v))  # (batch, tokens, heads, dim)
        logits = torch.einsum("bqhd,bqkhd->bhqk", queries, keys[:, index]) * p.head_dim**-0.5
        weights = (logits if bias is None else logits + bias).softmax(-1).to(q.dtype)
        return torch.einsum("bhqk,bqkhd->bqhd", weights, values[:, index]).unflatten(1, (p.side, p.side))

    return run


def natten(p: Problem, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Callable[[], Tensor]:
    from natten.functional import na2d as natten_na2d

    return lambda: natten_na2d(q, k, v, kernel_size=p.kernel_size, dilation=p.dilation)


PEERS = dict(triton=fused, torch=tiled, flex=flex, dense_sdpa=dense, gather=gather, natten=natten)


def measure(run: Callable[[], Tensor], seconds: float) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the run time in seconds, after warm-up."""
    times = triton.testing.do_bench(run, warmup=25, rep=int(1000 * seconds), quantiles=[0.5, 0.2, 0.8])
    return tuple(t / 1000 for t in times)


def training(run: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A forward and a backward pass."""
    d_out = torch.randn_like(run())
    return lambda: torch.autograd.grad(run(), inputs, d_out)


def environment() -> dict[str, str]:
    def output(*command: str) -> str:
        result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        return result.stdout.strip() if result.returncode == 0 else ""

    return dict(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        gpu=torch.cuda.get_device_name(),
        driver=output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        torch=torch.__version__,
        triton=triton.__version__,
        git=output("git", "describe", "--always", "--dirty"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[*MODELS, "maps"], choices=[*MODELS, "maps"])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 16, 128])
    parser.add_argument("--passes", nargs="*", default=["forward", "training"], choices=["forward", "training"])
    parser.add_argument("--kernels", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--seconds", type=float, default=0.1, help="of measuring, per row")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA or ROCm device, and PyTorch finds none here.")

    problems = [p for name in args.models for p in (LARGE_MAPS if name == "maps" else MODELS[name])]
    facts, rates = environment(), device_named(torch.cuda.get_device_name())
    done = set()
    for batch in args.batch:
        for p in problems:
            if (batch, p[1:]) in done or (p in LARGE_MAPS and batch > 1):
                continue  # another model has the same layer; large maps run one at a time
            done.add((batch, p[1:]))
            torch.manual_seed(0)
            torch.compiler.reset()
            shape = (batch, p.side, p.side, 3, p.heads, p.head_dim)
            q, k, v = torch.randn(shape, device="cuda", dtype=torch.bfloat16).unbind(3)
            table = torch.randn(p.heads, *[2 * p.kernel_size - 1] * 2, device="cuda", dtype=torch.bfloat16)
            for kernel, mode in itertools.product(args.kernels, args.passes):
                for rpb in (None,) if kernel == "natten" else (table,) if kernel != "triton" else (table, None):
                    name = f"{kernel}{'' if rpb is None else '+rpb'}"
                    inputs = [x.detach().requires_grad_(mode == "training") for x in (q, k, v, rpb) if x is not None]
                    try:
                        run = PEERS[kernel](p, *inputs[:3], inputs[3] if rpb is not None else None)
                        run = training(run, inputs) if mode == "training" else run
                        median, low, high = measure(run, args.seconds)
                    except Exception as error:  # a peer that is missing or fails must not stop the others
                        reason = f"{type(error).__name__}: {str(error)[:100]}"
                        print(f"{p.name} batch {batch} {mode} {name}: {reason}", flush=True)
                        continue
                    ratio = round(floor(p, batch, rates, training=mode == "training") / median, 3) if rates else ""
                    times = {key: round(1e6 * t, 1) for key, t in dict(median=median, p20=low, p80=high).items()}
                    problem = {"problem": f"{p.name} batch {batch}", "pass": mode}
                    row = facts | dict(kernel=name) | problem | times | dict(floor_ratio=ratio)
                    write_header = not args.output.exists()
                    with open(args.output, "a", newline="") as file:
                        writer = csv.DictWriter(file, row, lineterminator="\n")
                        if write_header:
                            writer.writeheader()
                        writer.writerow(row)
                    print(*problem.values(), name, *times.values(), ratio, flush=True)


if __name__ == "__main__":
    main()
