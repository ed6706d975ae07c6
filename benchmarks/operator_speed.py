"""Time the operator on the layers of published models, and its peers in turn; append rows to results/operator.csv.

    PYTHONPATH=.:kernels python benchmarks/operator_speed.py --models dinat_tiny --batch 128
    PYTHONPATH=.:kernels python benchmarks/operator_speed.py --device cpu --models dinat_tiny maps --batch 1 8

Peers, in the same process: dense scaled dot-product attention ("dense_sdpa": every token sees every token; "+rpb":
with bias and mask as one additive tensor, so it computes what the operator does), the same as models call it, from and
to the operator's layout ("dense_views"), a gather of every query's keys, NATTEN where it is installed (without bias,
which it does not have), and FlexAttention (compiled; same mask and bias; not by default on the CPU).  A peer that
cannot run a problem leaves a line on the screen and no row.

What is timed: the call alone.  The operator, "dense_views" and NATTEN take views of one packed projection, (batch,
height, width, heads, dim), and return that layout; "dense_sdpa" and FlexAttention get and return the one they like
best, contiguous (batch, heads, tokens, dim), which no projection writes.  Masks and indices are made beforehand; so is
the additive tensor, except in training, where the bias table wants a gradient.  bf16 on a GPU, float32 on the CPU.

A "forward" pass is in inference mode; "training" is a forward and a backward pass with the gradients of q, k, v and the
bias.  Times are medians with 20th and 80th percentiles, in microseconds; on a GPU the L2 cache is cleared before each.
`ratio` is the time over that of the first kernel, ours with bias, sampled in turn: above 1, ours is faster.
`floor_ratio` is the floor of problems.py over the median, for GPUs whose rates are known.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import cache, partial

import torch
from dinat_kernels import na2d
from dinat_kernels.geometry import make_neighborhood, visible_range
from harness import add_arguments, add_device, append, facts, interleaved, rounded
from problems import LARGE_MAPS, MAPS, MODELS, Problem, device_named, floor
from torch import Tensor
from torch.nn import functional as F

# Dense masks beyond this many entries are not built, nor logits, nor gathered keys.
LARGEST_MASK = 1 << 28
LARGEST = {"cpu": 1 << 28, "cuda": 1 << 32}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
GROUPS = MODELS | {"large_maps": LARGE_MAPS, "maps": MAPS}


@cache
def axis_tables(p: Problem, device: str) -> tuple[Tensor, Tensor]:
    """Start of the window in group positions (side,), and the tokens that every query sees (side, kernel_size)."""
    index = torch.arange(p.side)
    start = torch.empty_like(index)
    for group in range(p.dilation):
        n = len(index[group :: p.dilation])
        window = make_neighborhood(1, p.kernel_size, p.dilation)
        first, _ = visible_range(torch.arange(n).numpy(), n, p.kernel_size, window.stride[0], False)
        start[group :: p.dilation] = torch.from_numpy(first)
    tokens = (start[:, None] + torch.arange(p.kernel_size)) * p.dilation + (index % p.dilation)[:, None]
    return start.to(device), tokens.to(device)


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

    start, _ = axis_tables(p, q.device.type)
    side = p.side

    def mask(batch, head, query, key):
        rows, _ = visible_and_entry(p, start, query // side, key // side)
        columns, _ = visible_and_entry(p, start, query % side, key % side)
        return rows & columns

    def add_bias(score, batch, head, query, key):
        _, row = visible_and_entry(p, start, query // side, key // side)
        _, column = visible_and_entry(p, start, query % side, key % side)
        return score + rpb[head, row, column]

    blocks = torch.compile(create_block_mask)(mask, None, None, side**2, side**2, device=q.device.type)
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda: attend(q, k, v, block_mask=blocks, score_mod=add_bias)


def dense(p: Problem, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Callable[[], Tensor]:
    if rpb is None:
        return lambda: F.scaled_dot_product_attention(q, k, v)
    bias = dense_bias(p, q, rpb)
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias())


def dense_views(p: Problem, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Callable[[], Tensor]:
    bias = dense_bias(p, q, rpb)

    def run() -> Tensor:
        heads_first = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=bias())
        return out.transpose(1, 2).unflatten(1, (p.side, p.side))

    return run


def dense_bias(p: Problem, q: Tensor, rpb: Tensor) -> Callable[[], Tensor]:
    """Bias and mask of all pairs as one tensor, made beforehand unless the table wants a gradient."""
    device = q.device.type
    logits = p.side**4 * p.heads * (len(q) if rpb.requires_grad else 1)  # in training, PyTorch keeps them
    if p.side**4 * p.heads > LARGEST_MASK or logits > LARGEST[device]:
        raise MemoryError("the dense mask is too large")
    start, _ = axis_tables(p, device)
    index = torch.arange(p.side, device=device)
    visible, entry = visible_and_entry(p, start, index[:, None], index[None, :])
    mask = (visible[:, None, :, None] & visible[None, :, None, :])[None]

    def bias() -> Tensor:
        bias = rpb[:, entry[:, None, :, None], entry[None, :, None, :]]
        return torch.where(mask, bias, float("-inf")).flatten(3, 4).flatten(1, 2)[None].to(q.dtype)

    if rpb.requires_grad:
        return bias
    ready = bias()
    return lambda: ready


def gather(p: Problem, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Callable[[], Tensor]:
    device = q.device.type
    if q.numel() * p.kernel_size**2 > LARGEST[device]:
        raise MemoryError("the gathered keys are too large")
    _, tokens = axis_tables(p, device)
    index = (tokens[:, None, :, None] * p.side + tokens[None, :, None, :]).flatten(0, 1).flatten(1)  # (queries, keys)
    position = torch.arange(p.side, device=device) // p.dilation
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


# name -> (function, takes and returns (batch, heads, tokens, dim), with bias and without)
KERNELS = {
    "triton": (fused, False, (True, False)),
    "torch": (tiled, False, (True, False)),
    "dense_sdpa": (dense, True, (False, True)),
    "dense_views": (dense_views, False, (True,)),
    "gather": (gather, False, (True,)),
    "natten": (natten, False, (False,)),
    "flex": (flex, True, (True,)),
}
DEFAULTS = {
    "cpu": dict(
        models=["dinat_tiny", "maps"], batch=[1, 8], kernels=["torch", "dense_sdpa", "dense_views", "gather", "natten"]
    ),
    "cuda": dict(models=list(GROUPS), batch=[1, 16, 128], kernels=list(KERNELS)),
}


def build(kernel: str, with_rpb: bool, p: Problem, batch: int, mode: str, device: str) -> Callable[[], object]:
    """What is timed: a call of `kernel`, with new inputs."""
    torch.manual_seed(0)
    function, transposed, _ = KERNELS[kernel]
    options = dict(device=device, dtype=DTYPES[device])
    inputs = list(torch.randn(batch, p.side, p.side, 3, p.heads, p.head_dim, **options).unbind(3))
    if transposed:
        inputs = [x.flatten(1, 2).transpose(1, 2).contiguous() for x in inputs]
    if with_rpb:  # float32 in training, as under autocast; in inference as the model, cast
        table = torch.randn(p.heads, *[2 * p.kernel_size - 1] * 2, device=device)
        inputs.append(table if mode == "training" else table.to(DTYPES[device]))
    inputs = [x.detach().requires_grad_(mode == "training") for x in inputs]
    run = function(p, *inputs[:3], inputs[3] if with_rpb else None)
    if mode == "forward":
        return torch.inference_mode()(run)
    d_out = torch.randn_like(run())
    return lambda: torch.autograd.grad(run(), inputs, d_out)


def measure(p: Problem, batch: int, mode: str, args: argparse.Namespace) -> None:
    """Time all kernels on one problem, in turn; append a row for each."""
    builders = {
        kernel + "+rpb" * with_rpb: partial(build, kernel, with_rpb, p, batch, mode, args.device)
        for kernel in args.kernels
        for with_rpb in KERNELS[kernel][2]
    }
    print(f"{p.name}, {p.side}x{p.side}, k {p.kernel_size}, d {p.dilation}, {p.heads} heads, batch {batch}, {mode}")
    started = facts(args.device)
    rates = device_named(started["device"])
    problem = p._asdict() | {"batch": batch, "dtype": str(DTYPES[args.device])[6:], "pass": mode}
    timings = interleaved(builders, args.device, args.seconds, args.rounds)
    compared = next(iter(builders)) in timings
    for name, timing in timings.items():
        bound = rounded(floor(p, batch, rates, mode=mode) / timing.median) if rates else ""
        ratio = rounded(timing.ratio) if compared else ""
        columns = dict(kernel=name, ratio=ratio, **timing.columns(1e-6), floor_ratio=bound)
        append(args.output, started | problem | columns)
        print(f"{ratio:>9}x  {columns['median']:11.1f} us  {name}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=GROUPS, help="whose layers; or growing maps")
    parser.add_argument("--batch", nargs="*", type=int)
    parser.add_argument("--passes", nargs="*", default=["forward", "training"], choices=["forward", "training"])
    parser.add_argument("--kernels", nargs="*", choices=KERNELS, help="the first one is what others are compared with")
    add_device(parser)
    add_arguments(parser, "operator.csv", seconds=2.0)
    args = parser.parse_args(arguments)
    for name, value in DEFAULTS[args.device].items():
        setattr(args, name, getattr(args, name) or value)
    problems = {p[1:]: p for name in reversed(args.models) for p in reversed(GROUPS[name])}  # models share layers
    for batch, p, mode in itertools.product(args.batch, reversed(problems.values()), args.passes):
        if batch > 1 and p in LARGE_MAPS + MAPS:
            continue  # they run one at a time
        torch.compiler.reset()
        measure(p, batch, mode, args)


if __name__ == "__main__":
    main()
