"""Draw docs/images/*.png from the rows of benchmarks/results/ alone: the last one of each kind, of one machine.

    PYTHONPATH=.:kernels python benchmarks/plot.py                        # the CPU and the GPU that have the last rows
    PYTHONPATH=.:kernels python benchmarks/plot.py --gpu "NVIDIA H100"    # or another: any part of its name

The pictures carry a digest of their rows.

paper.png: what aot.csv estimates of the kernels, for the layers of DiNAT-Tiny; no measurement.
kernels.png: what a GPU took for them, and their floor.
scale.png: time per token against the size of the map, of the operator and of a whole model, on the CPU.
layers.png, layers_gpu.png: speed-up of the operator over its peers, for each layer of DiNAT-Tiny.
throughput.png: throughput, on the CPU, against the accuracy that each model's authors published.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
from harness import RESULTS, ROOT, read
from matplotlib.figure import Figure
from problems import MODELS, Problem

# ImageNet-1k top-1 in percent, 224 px, as published: Swin (arXiv 2103.14030), ConvNeXt (2201.03545), DeiT (2012.12877),
# MaxViT (2204.01697), Hiera (2306.00989, after pre-training as a masked autoencoder).
PEER_ACCURACY = {
    "swin_tiny_patch4_window7_224": 81.3,
    "convnext_tiny": 82.1,
    "deit_small_patch16_224": 79.8,
    "maxvit_tiny_tf_224": 83.6,
    "hiera_tiny_224": 82.8,
}
PEERS = {  # kernel -> label, color
    "dense_sdpa": ("dense attention, no bias or mask", "#e69f00"),
    "dense_sdpa+rpb": ("dense attention, same bias and mask", "#d55e00"),
    "dense_views+rpb": ("the same, as models call it", "#8b3a00"),
    "gather+rpb": ("gather", "#999999"),
    "natten": ("NATTEN, no bias", "#009e73"),
    "flex+rpb": ("FlexAttention, same bias and mask", "#cc79a7"),
}
BLUE = "#0072b2"
OURS = {"triton+rpb": ("ours (triton)", BLUE), "torch+rpb": ("ours (torch)", "#56b4e9")}
Row = dict[str, str]


def last(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], Row]:
    """The last row for each combination of values in `columns`."""
    return {tuple(row[column] for column in columns): row for row in rows}


def machine(row: Row) -> str:
    """Where a row was measured, for a title."""
    threads = "" if row["driver"] else f", {row['threads']} threads"
    return f"{row['device']}{threads}, {row['dtype']}, PyTorch {row['torch'].split('+')[0]}, {row['date'][:10]}"


def is_problem(row: Row, p: Problem) -> bool:
    return all(row[key] == str(value) for key, value in p._asdict().items() if key != "name")


def draw_scale(operator: list[Row], scale: list[Row]) -> Figure:
    """Time per token of local attention and its peers; time and memory per token of a whole model."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    local = dict(heads="2", kernel_size="7", dilation="1", batch="1") | {"pass": "forward"}
    found = last((row for row in operator if row.items() >= local.items()), "kernel", "side")
    for kernel, (label, color) in (OURS | PEERS).items():
        points = sorted((int(side), float(row["median"])) for (name, side), row in found.items() if name == kernel)
        if points:
            per_token = [1e3 * time / side**2 for side, time in points]
            style = dict(color=color, label=label, linewidth=3 if kernel in OURS else 1.5)
            axes[0].plot([side for side, _ in points], per_token, "o-", **style)
    sides = sorted({int(side) for _, side in found})
    axes[0].set(xscale="log", yscale="log", xlabel="tokens per side of the map", ylabel="ns per token")
    axes[0].set_xticks(sides, sides)
    axes[0].minorticks_off()
    axes[0].set_title("attention, 7 x 7 window, 2 heads, forward", fontsize=10)
    axes[0].legend(fontsize=7)

    points = sorted(last(scale, "model", "pixels").values(), key=lambda row: int(row["pixels"]))
    pixels = [int(row["pixels"]) for row in points]
    for axis, column, unit, what in ((axes[1], "ns_per_token", 1e-3, "µs"), (axes[2], "bytes_per_token", 1e-3, "kB")):
        per_token = [unit * float(row[column]) for row in points]
        axis.plot(pixels, per_token, "o-", color=BLUE)
        axis.set(
            xscale="log",
            ylim=(0, 1.1 * max(per_token)),
            xlabel="pixels per side of the image",
            ylabel=f"{what} per token (4 x 4 px)",
        )
        axis.set_xticks(pixels, pixels)
        axis.minorticks_off()
        axis.set_title(f"{points[0]['model']}, inference, {'time' if what == 'µs' else 'peak memory'}", fontsize=10)
    for axis in axes:
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(machine(operator[-1]), fontsize=10)
    return figure


def draw_layers(operator: list[Row]) -> Figure:
    """Bars: how many times as long peers take, per layer; rows of axes are batch sizes."""
    problems = MODELS["dinat_tiny"]
    rows = [row for row in operator if any(is_problem(row, p) for p in problems)]
    found = last(rows, "kernel", "side", "dilation", "batch", "pass")
    batches = sorted({int(row["batch"]) for row in rows})
    passes = {"forward": "forward", "training": "forward and backward"}
    size = (12, 2.9 * len(batches) + 0.8)
    figure, grid = plt.subplots(
        len(batches), 2, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    kernels = [kernel for kernel in PEERS if any(key[0] == kernel for key in found)]
    for axes, batch in zip(grid, batches, strict=True):
        for axis, (mode, label) in zip(axes, passes.items(), strict=True):
            for i, kernel in enumerate(kernels):
                keys = [(kernel, str(p.side), str(p.dilation), str(batch), mode) for p in problems]
                ratios = [float(found[key]["ratio"] or "nan") if key in found else float("nan") for key in keys]
                places = [x + 0.8 * (i - (len(kernels) - 1) / 2) / len(kernels) for x in range(len(problems))]
                bars = axis.bar(
                    places, [ratio - 1 for ratio in ratios], 0.76 / len(kernels), bottom=1, color=PEERS[kernel][1],
                    label=PEERS[kernel][0],
                )  # fmt: skip
                labels = [f"{ratio:.2g}" if ratio == ratio else "" for ratio in ratios]
                axis.bar_label(bars, labels, fontsize=6.5, padding=1)
            axis.axhline(1, color="black", linewidth=1)
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.margins(y=0.08)
            axis.set_xticks(range(len(problems)), [f"{p.side} x {p.side}\nd = {p.dilation}" for p in problems])
            axis.set_title(f"batch {batch}, {label}", fontsize=10)
            axis.grid(axis="y", alpha=0.3)
        axes[0].set_ylabel("time of the peer / ours")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"Layers of DiNAT-Tiny, 7 x 7 window: {machine(rows[-1])}. Above 1, ours is faster.", fontsize=10)
    return figure


RESOURCES = {  # column -> label, color
    "dram_us": ("bytes of DRAM", "#0072b2"),
    "l2_us": ("bytes of the L2 cache", "#e69f00"),
    "issue_us": ("instructions", "#009e73"),
    "exp2_us": ("exponentials", "#cc79a7"),
}


def draw_paper(aot: list[Row]) -> Figure:
    """Bars: what each resource would need for the kernels of a layer; black lines: the floor, and the estimate."""
    problems = MODELS["dinat_tiny"]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for axis, mode in zip(axes, ("forward", "backward"), strict=True):
        for x, p in enumerate(problems):
            rows = [
                row for row in aot if row["problem"] == p.name and (row["kernel"] == "forward") == (mode == "forward")
            ]
            for i, (column, (label, color)) in enumerate(RESOURCES.items()):
                height = sum(float(row[column]) for row in rows)
                axis.bar(x + 0.19 * (i - 1.5), height, 0.18, color=color, label=label if x == 0 else None)
            floor, estimate = float(rows[0]["floor_us"]), sum(float(row["time_us"]) for row in rows)
            axis.hlines(floor, x - 0.42, x + 0.42, color="black", linestyle=":", label=None if x else "floor")
            axis.hlines(estimate, x - 0.42, x + 0.42, color="black", label=None if x else "estimate")
            axis.text(x, estimate, f"{floor / estimate:.2f}", ha="center", va="bottom", fontsize=8)
        axis.set_xticks(range(len(problems)), [f"{p.side} x {p.side}\nd = {p.dilation}" for p in problems])
        axis.set_title(f"{mode} pass", fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("µs, batch 128, bf16")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(
        "An estimate from compiled code for an H200; only the rate of L2 was measured. Numbers: floor / estimate.",
        fontsize=10,
    )
    return figure


KERNELS = {"forward": ["forward"], "backward": ["query", "rpb", "key"]}
COLORS = {"forward": BLUE, "query": BLUE, "rpb": "#56b4e9", "key": "#e69f00"}


def draw_kernels(kernels: list[Row]) -> Figure:
    """Bars: what the kernels of a layer took, each alone; dotted lines: the floor; dashed lines: the estimate."""
    problems = [p for p in MODELS["dinat_tiny"] if any(row["name"] == p.name for row in kernels)]
    found = last(kernels, "name", "kernel")
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for axis, (mode, names) in zip(axes, KERNELS.items(), strict=True):
        for x, p in enumerate(problems):
            total, rows = 0.0, []
            for kernel in names:
                if row := found.get((p.name, kernel)):
                    axis.bar(x, float(row["us"]), 0.6, bottom=total, color=COLORS[kernel])
                    total += float(row["us"])
                    rows.append(row)
            ratio, estimate = float(rows[0]["floor_ratio"]), sum(float(row["time_us"]) for row in rows)
            axis.hlines(ratio * total, x - 0.42, x + 0.42, color="black", linestyle=":")
            axis.hlines(estimate, x - 0.42, x + 0.42, color="black", linestyle="--", linewidth=1)
            axis.text(x, total, f"{ratio:.2f}", ha="center", va="bottom", fontsize=8)
        axis.set_xticks(range(len(problems)), [f"{p.side} x {p.side}\nd = {p.dilation}" for p in problems])
        axis.set_title(f"{mode} pass", fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("µs, batch 128")
    shown = [kernel for kernel in COLORS if any(row["kernel"] == kernel for row in kernels)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[kernel], label=kernel) for kernel in shown]
    handles += [
        plt.Line2D([], [], color="black", linestyle=":", label="floor"),
        plt.Line2D([], [], color="black", linestyle="--", label="estimate"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(f"Kernels of DiNAT-Tiny: {machine(kernels[-1])}. Numbers: floor / measured.", fontsize=10)
    return figure


def draw_throughput(models: list[Row]) -> Figure:
    """Images per second of a whole model against its published accuracy."""
    published = json.loads(gzip.decompress((ROOT / "tests" / "golden" / "published.json.gz").read_bytes()))["models"]
    accuracy = PEER_ACCURACY | {name: model["published"]["imagenet1k_top1"] for name, model in published.items()}
    batch = max(int(row["batch"]) for row in models)
    wanted = dict(batch=str(batch), mode="eager", pixels="224") | {"pass": "inference"}
    found = last((row for row in models if row.items() >= wanted.items()), "model")
    fastest = max(float(row["images_per_s"]) for row in found.values())
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for (name,), row in found.items():
        if name in accuracy:
            point = float(row["images_per_s"]), accuracy[name]
            ours = name in published
            color = BLUE if ours else PEERS["gather+rpb"][1]
            axis.plot(*point, "o", color=color, markersize=3 * float(row["gmacs"]) ** 0.5)
            label = dict(xytext=(-8 if ours else 8, -3), textcoords="offset points", ha="right" if ours else "left")
            axis.annotate(re.sub(r"(_tf|_patch.*|_224)+$", "", name), point, **label, fontsize=8, color=color)
    axis.set_xlim(0, 1.15 * fastest)
    axis.margins(y=0.12)
    axis.set(xlabel=f"images/s, measured (inference, eager, batch {batch}, 224 px)")
    axis.set_ylabel("ImageNet-1k top-1 in %, as published by the authors")
    axis.grid(alpha=0.3)
    axis.set_title(f"{machine(models[-1])}\narea of the dots: GMACs", fontsize=10)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    for kind in ("cpu", "gpu"):
        parser.add_argument(f"--{kind}", help="part of its name; default: that of the last row of operator.csv")
    args = parser.parse_args(arguments)
    tables = {name: read(args.results / f"{name}.csv") for name in ("operator", "models", "scale", "kernels")}

    def of(name: str, device: str | None, gpu: bool) -> list[Row]:
        """Rows of one machine; only a GPU has a driver."""
        device = device or next(row["device"] for row in reversed(tables["operator"]) if bool(row["driver"]) == gpu)
        rows = [row for row in tables[name] if device in row["device"]]
        return rows or parser.error(f"{args.results / f'{name}.csv'} has no row of a machine named {device!r}")

    operator, models, scale = (of(name, args.cpu, gpu=False) for name in ("operator", "models", "scale"))
    operator_gpu, kernels = (of(name, args.gpu, gpu=True) for name in ("operator", "kernels"))
    aot = [row for row in read(args.results / "aot.csv") if row["arch"] == "sm_90" and row["time_us"]]
    args.output.mkdir(parents=True, exist_ok=True)
    for name, draw, *rows in (
        ("scale", draw_scale, operator, scale),
        ("layers", draw_layers, operator),
        ("layers_gpu", draw_layers, operator_gpu),
        ("kernels", draw_kernels, kernels),
        ("throughput", draw_throughput, models),
        ("paper", draw_paper, aot),
    ):
        digest, figure = hashlib.sha256(repr(rows).encode()).hexdigest(), draw(*rows)
        figure.savefig(args.output / f"{name}.png", dpi=110, metadata={"Software": None, "Source": digest})
        plt.close(figure)


if __name__ == "__main__":
    main()
