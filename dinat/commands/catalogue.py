"""`dinat list` and `dinat info`: the models there are, and one of them in detail."""

from __future__ import annotations

from typing import Annotated

import timm
import torch
import typer
from rich.console import Console
from rich.table import Table
from timm.models import PretrainedCfg, get_arch_name, get_pretrained_cfg
from torch.utils.flop_counter import FlopCounterMode

from dinat.checkpoints import Shape, sources
from dinat.errors import UserError, nearest
from dinat.published import TOP1

console = Console(highlight=False)
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Name of a model, with or without a tag.")]
MODULES = ("nat", "dinat_s", "isotropic", "volumes")


def ours(pattern: str = "*") -> list[str]:
    """Our models by name and tag, the default tag of each architecture first; `pattern` as in a shell."""
    return [
        name
        for module in MODULES
        for name in timm.list_models(pattern, module=module, pretrained=False, include_tags=True)
    ]


def find(name: str) -> PretrainedCfg:
    """The pretrained_cfg of one of our models. Raises UserError for another name, with the nearest ones."""
    known = ours()
    if name not in known and name not in map(get_arch_name, known):
        raise UserError(f"MODEL {name}: no such model.{nearest(name, known)} `dinat list` shows them.")
    return get_pretrained_cfg(name)


def full_name(cfg: PretrainedCfg) -> str:
    return f"{cfg.architecture}.{cfg.tag}"


def list_models(
    pattern: Annotated[str, typer.Argument(help="Names to show, with wildcards as in a shell.")] = "*",
) -> None:
    """List the models and their published ImageNet-1k top-1."""
    names = ours(pattern if set(pattern) & set("*?[") else f"*{pattern}*")
    if not names:
        raise UserError(f"PATTERN {pattern}: no model has such a name.{nearest(pattern, ours())}")
    table = Table("model", box=None, pad_edge=False)
    for column in ("pixels", "classes", "top-1"):
        table.add_column(column, justify="right")
    table.add_column("weights")
    for name in names:
        cfg = find(name)
        places = ", ".join(word for word, place in (("hub", cfg.hf_hub_id), ("publisher", cfg.url)) if place)
        table.add_row(name, str(cfg.input_size[-1]), str(cfg.num_classes), str(TOP1.get(name, "")), places)
    console.print(table)


def info(model: Model) -> None:
    """Show one model in detail."""
    cfg = find(model)
    name = full_name(cfg)
    network = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, network.in_chans, *network.img_size, device="meta"))
    unit = "pixels" if network.rank == 2 else "voxels"
    shape = Shape.of(network.state_dict())
    rows = {
        "model": name,
        "parameters": f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M",
        "multiply-adds": f"{counter.get_total_flops() / 2e9:.1f} G at {' x '.join(map(str, network.img_size))} {unit}",
        "feature maps": ", ".join(f"{f['num_chs']} / {f['reduction']}" for f in network.feature_info)
        + " (channels / stride)",
        "blocks": ", ".join(map(str, shape.depths)),
        "heads": ", ".join(map(str, shape.num_heads)),
        "windows": ", ".join(map(by_axis, shape.kernel_size)),
        "dilations": " | ".join(" ".join(map(by_axis, level)) for level in network.dilations),
        "layer scale": "yes" if shape.layer_scale else "no",
        "classes": cfg.num_classes,
        "published top-1": f"{TOP1[name]} %" if name in TOP1 else "none",
        "preprocessing": f"{cfg.interpolation}, crop {cfg.crop_pct}",
        "licence": cfg.license,
        "weights": "\n                 ".join(map(str, sources(cfg))) or "none: to be trained",
    }
    for key, value in rows.items():
        console.print(f"{key:<17}{value}", soft_wrap=True)


def by_axis(sizes: int | tuple[int, ...]) -> str:
    """A number, or numbers along the axes, as 3x7x7."""
    return "x".join(map(str, sizes)) if isinstance(sizes, tuple) else str(sizes)
