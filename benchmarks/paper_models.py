"""What a step of a whole model would take on a GPU, on paper; rewrites benchmarks/results/paper_models.csv.

    PYTHONPATH=.:kernels python benchmarks/paper_models.py

A model runs on the device "meta", and every operation is taken for the slower of its bytes (inputs read, outputs
written) and its products, by the rates of problems.py; attention of ours for what benchmarks/results/aot.csv estimates
of the kernels, scaled by heads; scaled dot-product attention for its bytes and products.  bf16 throughout, eager, so
each operation by itself; no time to launch, no optimizer, no casts of autocast.  An estimate: it says where a step's
time would be, and measures nothing.

Columns: milliseconds of attention, of matrix products and convolutions, and of everything else; `fused_ms` is without
the latter, which perfect fusion would hide; `attention_share` is of the eager step.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from unittest import mock

import timm
import torch
from harness import RESULTS, read, rounded
from problems import DEVICES, Device
from timm.layers import set_fused_attn
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import dinat  # noqa: F401  registers our models

MODELS = ["dinat_tiny", "nat_tiny", "dinat_s_tiny", "swin_tiny_patch4_window7_224"]
BATCH = 128
REACHED = 0.8  # of the data sheet's rate of products: what large ones in bf16 get
OURS = {"dinat_kernels::attention": ("forward",), "dinat_kernels::attention_backward": ("query", "rpb", "key")}


def layer_times(rows: list[dict[str, str]], arch: str = "sm_90") -> dict[tuple[int, int, str], float]:
    """Seconds of a kernel of DiNAT-Tiny for one head, by side of the map, dilation and name."""
    times = {}
    for row in rows:
        if row["arch"] == arch and row["problem"].startswith("dinat_tiny."):
            _, level, dilation = row["problem"].split(".")
            heads = 2 << int(level)
            times[56 >> int(level), int(dilation[1:]), row["kernel"]] = 1e-6 * float(row["time_us"]) / heads
    return times


class Cost(TorchDispatchMode):
    """Adds up the seconds of what is done under it, by kind."""

    def __init__(self, device: Device, layers: dict[tuple[int, int, str], float]):
        super().__init__()
        self.device, self.layers = device, layers
        self.seconds = dict.fromkeys(("attention", "products", "others"), 0.0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in OURS:
            self.seconds["attention"] += self.attention(name, args)
        elif not func.is_view and name not in ("aten::empty", "aten::detach", "aten::_unsafe_view"):
            moved = sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
            count = flop_registry.get(func.overloadpacket)
            flop = count(*args, **(kwargs or {}), out_val=out) if count else 0
            self.seconds["products" if count else "others"] += self.slower(moved, flop)
        return out

    def slower(self, moved: float, flop: float) -> float:
        return max(moved / self.device.bandwidth, flop / (REACHED * self.device.matrix))

    def attention(self, name: str, args: tuple) -> float:
        """Of one of our operators, by the kernels that its layer launches."""
        first = 0 if name == "dinat_kernels::attention" else 2  # behind the gradients of out and lse
        query, window = args[first], next(x for x in args if isinstance(x, (list, tuple)))
        side, heads, dilation = query.shape[2], query.shape[-2], window[2]
        if query.shape[0] != BATCH:
            raise ValueError(f"the layers' times are of batch {BATCH}, got {query.shape[0]}")
        times = [self.layers.get((side, dilation, kernel)) for kernel in OURS[name]]
        if times[0] is None:
            raise ValueError(f"aot.csv has no layer of {side}x{side} tokens and dilation {dilation}")
        return heads * sum(filter(None, times))


class _Attention(torch.autograd.Function):
    """Scaled dot-product attention that computes nothing but what it would cost."""

    @staticmethod
    def forward(ctx, query, key, value, mask, cost):
        ctx.save_for_backward(query, key, value, mask)
        ctx.cost = cost
        pairs = query.shape[:-1].numel() * key.shape[-2]
        tensors = (query, key, value, query, *(() if mask is None else (mask,)))
        cost.seconds["attention"] += cost.slower(sum(x.nbytes for x in tensors), 4 * pairs * query.shape[-1])
        return query.new_empty(query.shape)

    @staticmethod
    def backward(ctx, grad):
        query, key, value, mask = ctx.saved_tensors
        pairs = query.shape[:-1].numel() * key.shape[-2]
        # The mask's gradient is of all images before it is summed: PyTorch writes it out.
        of_mask = 0 if mask is None else mask.nbytes + pairs * query.element_size() * bool(ctx.needs_input_grad[3])
        moved = 8 * query.nbytes + of_mask
        ctx.cost.seconds["attention"] += ctx.cost.slower(moved, 10 * pairs * query.shape[-1])
        return (
            *(torch.empty_like(x) for x in (query, key, value)),
            None if mask is None else torch.empty_like(mask),
            None,
        )


class _Counted(TorchFunctionMode):
    def __init__(self, cost: Cost):
        super().__init__()
        self.cost = cost

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            return _Attention.apply(query, key, value, (kwargs or {}).get("attn_mask"), self.cost)
        return func(*args, **(kwargs or {}))


def step(name: str, training: bool, device: Device, layers: dict[tuple[int, int, str], float]) -> dict[str, float]:
    """Seconds of a step by kind."""
    on_cuda = mock.patch("dinat_kernels.modules._is_split", return_value=False)  # layers leave groups to the kernels
    set_fused_attn(True, experimental=True)  # Swin's too, which timm leaves off by default
    with on_cuda, torch.device("meta"):
        model = timm.create_model(name, drop_path_rate=0.0).to(torch.bfloat16).train(training)
        images = torch.empty(BATCH, 3, 224, 224, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        targets = torch.empty(BATCH, dtype=torch.int64)
        with Cost(device, layers) as cost, _Counted(cost), torch.set_grad_enabled(training):
            out = model(images)
            if training:
                F.cross_entropy(out, targets).backward()
    return cost.seconds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="H200", choices=["H200"])  # whose kernels aot.csv estimates for sm_90
    parser.add_argument("--output", type=Path, default=RESULTS / "paper_models.csv")
    args = parser.parse_args(arguments)
    layers = layer_times(read(RESULTS / "aot.csv"))
    table = []
    for name in MODELS:
        for mode in ("inference", "training"):
            seconds = step(name, mode == "training", DEVICES[args.gpu], layers)
            total = sum(seconds.values())
            table.append(
                {"model": name, "gpu": args.gpu, "batch": BATCH, "pass": mode}
                | {f"{kind}_ms": rounded(1e3 * time) for kind, time in seconds.items()}
                | dict(
                    eager_ms=rounded(1e3 * total),
                    fused_ms=rounded(1e3 * (total - seconds["others"])),
                    images_per_s=rounded(BATCH / total),
                    attention_share=rounded(seconds["attention"] / total, 3),
                )
            )
            print(*table[-1].values())
    with open(args.output, "w", newline="") as file:
        writer = csv.DictWriter(file, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
