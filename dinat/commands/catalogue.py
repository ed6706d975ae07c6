"""`dinat list` and `dinat info`: the models there are, and one of them in detail."""

from __future__ import annotations

from collections.abc import Container
from typing import Annotated, Any

import timm
import torch
import typer
from rich.console import Console
from rich.table import Table
from timm.models import PretrainedCfg, get_arch_name, get_pretrained_cfg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dinat import dense
from dinat.checkpoints import Shape, sources
from dinat.errors import UserError, nearest
from dinat.metrics.detection import DetectionMetric
from dinat.metrics.panoptic import PanopticMetric
from dinat.metrics.semantic import SemanticMetric
from dinat.models import FAMILIES
from dinat.published import TOP1

PLAIN = {"highlight": False, "markup": False, "emoji": False}  # names of files and classes are shown as they are
console = Console(**PLAIN)
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Name of a model, with or without a tag.")]
FIGURES = {  # of models for dense prediction
    **DetectionMetric.labels,
    **PanopticMetric.labels,
    **SemanticMetric.labels,
    "miou_multi_scale": "mIoU of several scales",
}


def show_table(table: Table) -> None:
    """Prints a table; names are for copying, so they are never cut, whatever the terminal."""
    Console(**PLAIN, width=1000).print(table)


def ours(pattern: str = "*") -> list[str]:
    """Our backbones by name and tag, the default tag of each architecture first; `pattern` as in a shell."""
    return [
        name
        for module in FAMILIES
        for name in timm.list_models(pattern, module=module, pretrained=False, include_tags=True)
    ]


def find(name: str) -> PretrainedCfg:
    """The pretrained_cfg of one of our models. Raises UserError for another name, with the nearest ones."""
    if name in dense.PUBLISHED:
        return dense.PUBLISHED[name].pretrained_cfg
    known = ours()
    if name not in known and name not in map(get_arch_name, known):
        near = nearest(name, [*known, *dense.PUBLISHED])
        raise UserError(f"MODEL {name}: no such model.{near} `dinat list` shows them.")
    return get_pretrained_cfg(name)


def full_name(cfg: PretrainedCfg) -> str:
    return f"{cfg.architecture}.{cfg.tag}"


def list_models(
    pattern: Annotated[str, typer.Argument(help="Names to show, with wildcards as in a shell.")] = "*",
) -> None:
    """List the models and their published figures: ImageNet-1k top-1, box and mask AP, PQ, mIoU."""
    chosen = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    names = [*ours(chosen), *dense.list_models(chosen, pretrained=True)]
    if not names:
        known = [*ours(), *dense.PUBLISHED]
        raise UserError(f"PATTERN {pattern}: no model has such a name.{nearest(pattern, known)}")
    table = Table("model", box=None, pad_edge=False)
    for column in ("pixels", "classes"):
        table.add_column(column, justify="right")
    table.add_column("published")
    table.add_column("weights")
    for name in names:
        cfg = find(name)
        places = ", ".join(word for word, place in (("hub", cfg.hf_hub_id), ("publisher", cfg.url)) if place)
        if name in dense.PUBLISHED:
            row = dense.PUBLISHED[name]
            pixels, figures = row.resize["shortest"], dense_figures(row, ("box_ap", "mask_ap", "pq", "miou"))
        else:
            pixels, figures = cfg.input_size[-1], f"top-1 {TOP1[name]}" if name in TOP1 else ""
        table.add_row(name, str(pixels), str(cfg.num_classes), figures, places)
    show_table(table)


def dense_figures(row: dense.Published, names: Container[str] = FIGURES) -> str:
    return ", ".join(f"{FIGURES[name]} {figure}" for name, figure in row.figures.items() if name in names)


def info(model: Model) -> None:
    """Show one model in detail."""
    rows = dense_info(dense.PUBLISHED[model]) if model in dense.PUBLISHED else backbone_info(find(model))
    for key, value in rows.items():
        console.print(f"{key:<17}{value}", soft_wrap=True)


def backbone_info(cfg: PretrainedCfg) -> dict[str, Any]:
    name = full_name(cfg)
    network = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, network.in_chans, *network.img_size, device="meta"))
    unit = "pixels" if network.rank == 2 else "voxels"
    return {
        "model": name,
        "parameters": count_parameters(network),
        "multiply-adds": f"{counter.get_total_flops() / 2e9:.1f} G at {' x '.join(map(str, network.img_size))} {unit}",
        "feature maps": ", ".join(f"{f['num_chs']} / {f['reduction']}" for f in network.feature_info)
        + " (channels / stride)",
        **shape_info(network),
        "classes": cfg.num_classes,
        "published top-1": f"{TOP1[name]} %" if name in TOP1 else "none",
        "preprocessing": f"{cfg.interpolation}, crop {cfg.crop_pct}",
        **origin_info(cfg),
    }


def dense_info(row: dense.Published) -> dict[str, Any]:
    with torch.device("meta"):
        network = dense.create_model(row.name)
    _, backbone = network.timm_model
    scales = ", ".join(f"{shortest} / {longest}" for shortest, longest in row.multi_scale)
    return {
        "model": row.name,
        "method": row.method,
        "task": row.task,
        "parameters": count_parameters(network),
        "backbone": row.backbone,
        **shape_info(backbone),
        "classes": f"{len(row.classes)} of {row.data}",
        "published": dense_figures(row),
        "test image": f"{row.resize['shortest']} / {row.resize['longest']} (shortest / longest side), "
        + ("antialiased, as Pillow does" if row.resize["resample"] == "pil" else "bilinear, as OpenCV does"),
        **({"several scales": f"{scales}, each mirrored too"} if scales else {}),
        **origin_info(row.pretrained_cfg),
    }


def count_parameters(network: nn.Module) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M"


def shape_info(network: nn.Module) -> dict[str, str]:
    shape = Shape.of(network.state_dict())
    return {
        "blocks": ", ".join(map(str, shape.depths)),
        "heads": ", ".join(map(str, shape.num_heads)),
        "windows": ", ".join(map(by_axis, shape.kernel_size)),
        "dilations": " | ".join(" ".join(map(by_axis, level)) for level in network.dilations),
        "layer scale": "yes" if shape.layer_scale else "no",
    }


def origin_info(cfg: PretrainedCfg) -> dict[str, str]:
    return {
        "licence": cfg.license,
        "weights": "\n                 ".join(map(str, sources(cfg))) or "none: to be trained",
    }


def by_axis(sizes: int | tuple[int, ...]) -> str:
    """A number, or numbers along the axes, as 3x7x7."""
    return "x".join(map(str, sizes)) if isinstance(sizes, tuple) else str(sizes)
