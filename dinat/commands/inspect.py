"""`dinat inspect`: what models see. A report per command; each writes its files into a folder."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import typer
from PIL import Image
from rich.table import Table
from torch import Tensor, nn
from torchvision import tv_tensors

from dinat import dense
from dinat.commands.catalogue import by_axis, console, find, show_table
from dinat.commands.predict import class_names, find_images, load
from dinat.commands.predict_dense import load_dense
from dinat.data import ImageError, open_image, resolve_preprocessing
from dinat.data.transforms import Normalize, eval_transform
from dinat.errors import UserError, nearest
from dinat.files import write_csv

app = typer.Typer(help="Look into models: attention, heads, receptive fields, class activation.", no_args_is_help=True)

Images = Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")]
OneImage = Annotated[Path, typer.Argument(metavar="IMAGE")]
Model = Annotated[str, typer.Option(help="A model of ours, or local-dir:FOLDER, or hf-hub:REPO.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights to use instead of the published ones.")]
Output = Annotated[Path, typer.Option(metavar="DIR", help="Where the results go; made if need be.")]
Size = Annotated[int | None, typer.Option(min=1, help="Pixels per side, instead of the model's own.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]


class Importance(str, Enum):
    """How `dinat inspect heads` measures it."""

    gradient = "gradient"
    ablation = "ablation"
    none = "none"


class Subject:
    """A model, and images as it takes them."""

    def __init__(self, model: str, checkpoint: Path | None, size: int | None, whole: bool = False) -> None:
        self.dense = dense.is_dense(model)
        if self.dense:
            if size:
                raise UserError(f"--size {size}: --model {model} resizes images as it was trained to. Leave it out.")
            self.network, self.resize = load_dense(model, checkpoint)
            preprocessing: dict[str, Any] = dict(self.network.preprocessing, input_size=(3, 0, 0))
        else:
            self.network = load(model, checkpoint)
            preprocessing = resolve_preprocessing({"img_size": size}, self.network)
            if whole:
                preprocessing |= dict(crop_pct=1.0, crop_mode="squash")
            if getattr(self.network, "full_attention", False):
                self.network.set_input_size(preprocessing["input_size"][1:])
            self.resize = eval_transform(preprocessing)
        self.channels = preprocessing["input_size"][0]
        self.normalize = Normalize(preprocessing, torch.device("cpu"))

    def open(self, file: Path) -> tuple[Image.Image, Tensor]:
        """An image as the model sees it, as a picture and as a batch of one."""
        try:
            image = open_image(file, channels=self.channels)
        except ImageError as error:
            raise UserError(f"IMAGE {file}: {error}.") from error
        if self.dense:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
            (view,), _ = self.resize(tv_tensors.Image(pixels), {})
            pixels = torch.as_tensor(view)
            batch = self.network.pad([self.normalize(pixels[None])[0]])
            pixels = self.network.pad([pixels])[0]
        else:
            pixels = torch.as_tensor(self.resize(image))
            batch = self.normalize(pixels[None])
        return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy()).convert("RGB"), batch

    def batches(self, files: list[Path], batch_size: int) -> Iterator[Tensor]:
        """Images that have one size."""
        for start in range(0, len(files), batch_size):
            tensors = [self.open(file)[1] for file in files[start : start + batch_size]]
            if len({tensor.shape for tensor in tensors}) > 1:
                raise UserError(
                    "IMAGE: this model sees images in their own shapes; give images of one, or --batch-size 1."
                )
            yield torch.cat(tensors)


def point(text: str) -> tuple[int, int]:
    """A pixel "x,y"."""
    try:
        x, y = map(int, text.split(","))
    except ValueError:
        raise UserError(f"--at {text}: give two whole numbers, x,y.") from None
    return x, y


def wrote(*paths: Path) -> None:
    for path in paths:
        console.print(str(path), soft_wrap=True)


@app.command()
def attention(
    image: OneImage,
    model: Model = "dinat_mini",
    checkpoint: Checkpoint = None,
    size: Size = None,
    at: Annotated[str | None, typer.Option(metavar="X,Y", help="A pixel: where the page begins; with a sheet.")] = None,
    block: Annotated[str | None, typer.Option(metavar="LEVEL.BLOCK", help="That the page begins with.")] = None,
    head: Annotated[int | None, typer.Option(help="That the page begins with; the mean of all by default.")] = None,
    npz: Annotated[bool, typer.Option("--npz", help="All weights and the keys they belong to, for numpy.")] = False,
    output: Output = Path("inspect"),
) -> None:
    """One HTML file that shows the attention of every pixel, in every block and head."""
    from dinat import inspect

    pixel = None if at is None else point(at)
    subject = Subject(model, checkpoint, size)
    picture, batch = subject.open(image)
    layers = inspect.attention(subject.network, batch)
    output.mkdir(parents=True, exist_ok=True)
    written = [output / "attention.html"]
    title = f"{model}: {image.name}"
    inspect.write_page(written[0], picture, layers, title=title, block=block, head=head, at=pixel)
    if pixel:
        from dinat.inspect import pictures

        written.append(output / "attention_{}_{}.png".format(*pixel))
        pictures.save(pictures.draw_contact_sheet(picture, layers, *pixel), written[-1])
    if npz:
        written.append(output / "attention.npz")
        inspect.write_npz(written[-1], layers)
    wrote(*written)


@app.command()
def heads(
    images: Images,
    model: Model = "dinat_mini",
    checkpoint: Checkpoint = None,
    size: Size = None,
    importance: Annotated[
        Importance, typer.Option(help="By gates' gradients, or without one head after the other.")
    ] = Importance.gradient,
    batch_size: BatchSize = 1,
    output: Output = Path("inspect"),
) -> None:
    """What every head does: distance, entropy, content or position, importance; a table and two pictures."""
    from dinat import inspect
    from dinat.inspect import pictures

    files = list(find_images(images))
    subject = Subject(model, checkpoint, size)
    found = inspect.describe_heads(subject.network, subject.batches(files, batch_size), importance.value)
    rows = [head.row() for head in found]
    columns = dict.fromkeys(itertools.chain.from_iterable(rows))
    output.mkdir(parents=True, exist_ok=True)
    written = [output / name for name in ("heads.csv", "heads.png", "patterns.png")]
    write_csv(written[0], [{column: row.get(column, "") for column in columns} for row in rows])
    pictures.save(pictures.draw_heads(found), written[1])
    pictures.save(pictures.draw_patterns(found), written[2])
    table = Table("block", box=None, pad_edge=False)
    for column in ("heads", "distance px", "entropy", "divergence", "most important"):
        table.add_column(column, justify="right")
    for name, group in itertools.groupby(found, lambda head: head.block):
        group = list(group)
        means = (np.mean([getattr(head, key) for head in group]) for key in ("distance", "entropy", "divergence"))
        best = "" if group[0].importance is None else str(max(group, key=lambda head: head.importance).head)
        table.add_row(name, str(len(group)), *(f"{mean:.2f}" for mean in means), best)
    show_table(table)
    wrote(*written)


@app.command()
def field(
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="Names, without weights.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Pixels per side, instead of the models' own.")] = None,
    dilations: Annotated[
        str | None, typer.Option(help='"max", "gradual", a number, or a schedule as `dinat info` shows it.')
    ] = None,
    output: Output = Path("inspect"),
) -> None:
    """The exact theoretical receptive field after every block; a table and a picture. No weights are needed."""
    from dinat import inspect
    from dinat.inspect import pictures

    fields, rows = {}, []
    for name in models or ["nat_mini", "dinat_mini"]:
        find(name)
        if name in dense.PUBLISHED:
            raise UserError(f"MODEL {name}: is for dense prediction. Name its backbone.")
        network = build(name, size, dilations)
        side = network.img_size if size is None else (size, size)
        fields[name] = inspect.receptive_fields(network, side)
        for one in fields[name]:
            rows.append(
                {
                    "model": name,
                    "block": one.block,
                    "map": by_axis(one.size),
                    "window": by_axis(one.kernel_size),
                    "dilation": by_axis(one.dilation),
                    "extent": by_axis(one.extent()),
                    "touched": by_axis(one.touched()),
                    "area": round(one.area(), 6),
                    "least_area": round(one.least_area(), 6),
                }
            )
    output.mkdir(parents=True, exist_ok=True)
    written = [output / "field.csv", output / "field.png"]
    write_csv(written[0], rows)
    pictures.save(pictures.draw_fields(fields), written[1])
    table = Table("model", "block", box=None, pad_edge=False)
    for column in ("map", "dilation", "extent px", "touched px", "area", "least area"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, found in fields.items():
        everything = next((i for i, one in enumerate(found) if one.least_area() == 1), len(found) - 1)
        for i, row in enumerate([row for row in rows if row["model"] == name][: everything + 1]):
            shares = (f"{100 * row[key]:.1f} %" for key in ("area", "least_area"))
            first = "" if i else name
            table.add_row(first, *(row[key] for key in ("block", "map", "dilation", "extent", "touched")), *shares)
    show_table(table)
    for name, found in fields.items():
        holes = [one.block for one in found if one.extent() != one.touched()]
        if holes:
            console.print(f"{name}: holes (gridding) after {', '.join(holes)}", soft_wrap=True)
        beyond = [one.block for one in found if one.exceeds]
        if beyond:
            console.print(f"{name}: windows larger than the map, which is padded: {', '.join(beyond)}", soft_wrap=True)
    wrote(*written)


def build(name: str, size: int | None, dilations: str | None) -> nn.Module:
    """A model without weights; a schedule is for this size, its own for the size that the model was made for."""
    options: dict[str, Any] = {}
    if dilations is not None:
        options["dilations"] = schedule(dilations)
    if size is not None and (dilations is not None or name.startswith("vitrpb")):
        options["img_size"] = size
    try:
        return timm.create_model(name, device="meta", **options)
    except ValueError as error:
        raise UserError(f"--dilations {dilations}: {error}.") from error


def schedule(text: str) -> Any:
    """A policy, a number, or "1 8 1 | 1 4": one list per level."""
    if text in ("max", "gradual"):
        return text
    try:
        levels = [[int(word) for word in level.split()] for level in text.split("|")]
    except ValueError:
        raise UserError(
            f'--dilations {text}: give max, gradual, a number, or a schedule such as "1 8 1 | 1 4 1 4".'
        ) from None
    return levels[0][0] if "|" not in text and len(levels[0]) == 1 else levels


@app.command()
def erf(
    images: Images,
    model: Model = "dinat_mini",
    checkpoint: Checkpoint = None,
    size: Annotated[int, typer.Option(min=1, help="Pixels per side; figures are compared at 1024.")] = 1024,
    limit: Annotated[int, typer.Option(min=1, help="Of the images, the first ones; figures are compared of 50.")] = 50,
    output: Output = Path("inspect"),
) -> None:
    """The effective receptive field of every level, by gradients: the convention's figures, and shares of the sums."""
    from dinat import inspect
    from dinat.inspect import pictures

    files = list(find_images(images))[:limit]
    subject = Subject(model, checkpoint, None if dense.is_dense(model) else size, whole=True)
    fields = inspect.effective_fields(subject.network, subject.batches(files, 1))
    rows = [
        dict(level=level, measure=measure, share=square.share, side=square.side, area=round(square.area, 6))
        for level, field in enumerate(fields)
        for measure, values in (("convention", inspect.logarithm(field)), ("sums", field))
        for square in inspect.squares(values)
    ]
    output.mkdir(parents=True, exist_ok=True)
    written = [output / "erf.csv", output / "erf.png"]
    write_csv(written[0], rows)
    pictures.save(pictures.draw_effective_fields(fields), written[1])
    shares = list(dict.fromkeys(row["share"] for row in rows))
    table = Table("level", "area that holds", box=None, pad_edge=False)
    for share in shares:
        table.add_column(f"{100 * share:g} %", justify="right")
    for (level, measure), group in itertools.groupby(rows, lambda row: (row["level"], row["measure"])):
        table.add_row(str(level), measure, *(f"{100 * row['area']:.1f} %" for row in group))
    show_table(table)
    wrote(*written)


@app.command()
def cam(
    image: OneImage,
    model: Model = "dinat_mini",
    checkpoint: Checkpoint = None,
    size: Size = None,
    label: Annotated[
        str | None, typer.Option("--class", help="A class by number or name; the likeliest by default.")
    ] = None,
    output: Output = Path("inspect"),
) -> None:
    """Grad-CAM: where an image speaks for a class, as a picture."""
    from dinat import inspect
    from dinat.inspect import pictures
    from dinat.inspect.extraction import has_classifier

    subject = Subject(model, checkpoint, size)
    picture, batch = subject.open(image)
    if not has_classifier(subject.network):
        raise UserError(f"--model {model}: has no classifier; Grad-CAM is for classes.")
    names = class_names(subject.network)
    with torch.no_grad():
        probabilities = subject.network(batch).softmax(1)[0]
    index = probabilities.argmax().item() if label is None else class_index(label, names)
    found = inspect.grad_cam(subject.network, batch, torch.tensor([index]))[0]
    output.mkdir(parents=True, exist_ok=True)
    title = f"{names[index]} ({index}), {100 * probabilities[index]:.1f} %"
    pictures.save(pictures.draw_cam(picture, found.numpy(), title), output / "cam.png")
    console.print(title, soft_wrap=True)
    wrote(output / "cam.png")


def class_index(label: str, names: list[str]) -> int:
    """Which class a number or a name is, or the one name that begins with it."""
    if label.isdecimal():
        if int(label) >= len(names):
            raise UserError(f"--class {label}: the model has classes 0 to {len(names) - 1}.")
        return int(label)
    found = [i for i, name in enumerate(names) if name == label] or [
        i for i, name in enumerate(names) if label in (word.strip() for word in name.split(","))
    ]
    if len(found) != 1:
        raise UserError(f"--class {label}: {len(found) or 'no'} classes have this name.{nearest(label, names)}")
    return found[0]
