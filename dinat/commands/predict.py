"""`dinat predict`: the likeliest classes of images."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from torch import nn

from dinat import dense
from dinat.commands.catalogue import PLAIN, find, show_table
from dinat.commands.predict_dense import predict_dense
from dinat.data import ImageError, open_image, resolve_preprocessing
from dinat.data.images import pick_images, walk_data
from dinat.errors import CheckpointError, UserError
from dinat.files import read_json


class Format(str, Enum):
    """What `dinat predict` prints."""

    table = "table"
    json = "json"
    csv = "csv"


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    model: Annotated[str, typer.Option(help="A model of ours, or local-dir:FOLDER, or hf-hub:REPO.")] = "dinat_mini",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to use instead of the published ones.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
    format: Annotated[Format, typer.Option(help="How to print them.")] = Format.table,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Of a dense model: where its results go.")] = None,
    exif_transpose: Annotated[bool, typer.Option("--exif-transpose", help="Turn images upright first.")] = False,
    multi_scale: Annotated[bool, typer.Option("--multi-scale", help="Semantic maps from several scales.")] = False,
) -> None:
    """Show the likeliest classes of images; or find objects and segments, with a model for dense prediction."""
    files = list(find_images(images))
    errors = Console(**PLAIN, stderr=True, soft_wrap=True)
    if dense.is_dense(model):
        if output is None:
            raise UserError(f"--output is not set, and --model {model} is for dense prediction. Give a folder.")
        unread = predict_dense(files, model, checkpoint, output, exif_transpose, multi_scale, errors)
        refuse_unread(unread, len(files))
        return
    if multi_scale:
        raise UserError(f"--multi-scale: not with --model {model}, only with models for semantic segmentation.")
    network = load(model, checkpoint)
    if not network.num_classes:
        raise UserError(f"--model {model}: its weights have no classifier.")
    if getattr(network, "rank", 2) != 2:
        raise UserError(f"--model {model}: takes volumes, and these are images. eval.py evaluates it.")
    names = class_names(network)
    several = has_several_labels(model)
    preprocessing = resolve_preprocessing({}, network)
    transform = create_transform(**preprocessing)
    rows: list[dict[str, Any]] = []
    unreadable = 0
    steps = range(0, len(files), batch_size)
    if errors.is_terminal:  # a disabled bar ends with an empty line before rich 15
        steps = track(steps, "images", console=errors, transient=True)
    for start in steps:
        batch: list[tuple[Path, torch.Tensor]] = []
        for file in files[start : start + batch_size]:
            try:
                image = open_image(file, channels=preprocessing["input_size"][0], exif_transpose=exif_transpose)
                batch.append((file, transform(image)))
            except ImageError as error:
                errors.print(f"{file}: {error}")
                unreadable += 1
        if not batch:
            continue
        with torch.inference_mode():
            logits = network(torch.stack([pixels for _, pixels in batch]))
        best = (logits.sigmoid() if several else logits.softmax(dim=1)).topk(min(top, network.num_classes), dim=1)
        for (file, _), probabilities, indices in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
            for rank, (probability, index) in enumerate(zip(probabilities, indices, strict=True), start=1):
                rows.append(
                    dict(image=str(file), rank=rank, index=index, label=names[index], probability=round(probability, 6))
                )
    if rows:
        show(rows, format)
    refuse_unread(unreadable, len(files))


def refuse_unread(unreadable: int, total: int) -> None:
    """Ends with an error where images could not be read, once the others have their results."""
    if unreadable:
        raise UserError(f"{unreadable} of {total} images cannot be read and have no results.")


def find_images(paths: list[Path]) -> Iterator[Path]:
    """The files among `paths`, and all images below the folders among them, sorted; says what else is there."""
    for path in paths:
        if path.is_dir():
            images, left_out = pick_images(str(folder / name) for folder, _, names in walk_data(path) for name in names)
            if left_out:
                print(f"{path}: {left_out}", file=sys.stderr)
            if not images:
                raise UserError(f"IMAGE {path}: the folder holds no images.")
            yield from sorted(map(Path, images))
        elif path.is_file():
            yield path
        else:
            raise UserError(f"IMAGE {path}: no such file or folder.")


def load(model: str, checkpoint: Path | None) -> nn.Module:
    """The model in evaluation mode, with its published weights or those of a file."""
    if ":" not in model:
        find(model)
    overlay = {"file": str(checkpoint)} if checkpoint else None
    try:
        return timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    except CheckpointError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError) as error:  # timm's, of a model without weights or a bad folder
        raise UserError(f"--model {model}: {' '.join(str(error).split())}") from error


def has_several_labels(model: str) -> bool:
    """Whether a model of a run folder says of each class by itself how likely it is: config.json tells."""
    from dinat.tasks.models import SEVERAL  # takes a second to import

    if not model.startswith("local-dir:"):
        return False
    return bool(read_json(Path(model.partition(":")[2], "config.json")).get(SEVERAL))


def class_names(network: nn.Module) -> list[str]:
    """The names of a model's classes: its own, else ImageNet's, else their numbers."""
    if own := network.pretrained_cfg.get("label_names"):
        return list(own)
    if subset := infer_imagenet_subset(network):
        return ImageNetInfo(subset).label_descriptions()
    return list(map(str, range(network.num_classes)))


def show(rows: list[dict[str, Any]], format: Format) -> None:
    if format is Format.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    elif format is Format.csv:
        writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        table = Table("image", "class", box=None, pad_edge=False)
        table.add_column("probability", justify="right")
        for row in rows:
            label = f"{row['label']} ({row['index']})"
            table.add_row(row["image"] if row["rank"] == 1 else "", label, f"{100 * row['probability']:.1f} %")
        show_table(table)
