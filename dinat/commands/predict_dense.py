"""`dinat predict` with a model for dense prediction: pictures of what was found, and the results as files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import nn
from torchvision import tv_tensors

from dinat import dense
from dinat.data import ImageError, open_image
from dinat.data.dense_transforms import dense_views_transform, views_of
from dinat.data.results import write_detections, write_panoptic
from dinat.errors import UserError
from dinat.files import write_atomically
from dinat.visualize import draw


def predict_dense(
    files: list[Path], model: str, checkpoint: Path | None, output: Path, exif_transpose: bool, multi_scale: bool,
    errors: Console,
) -> int:  # fmt: skip
    """Writes what a model finds in images; returns how many could not be read, once they are named.

    The model is a published one, its weights perhaps in a file, or local-dir:FOLDER.

    For each image there is a picture NAME.png; beside them detections.json (COCO's records, images by their file and
    its number among all, classes by the ids of the training data), panoptic.json with a folder of PNG files, or, of
    semantic maps, NAME_labels.png, whose pixels are labels.

    Raises:
        UserError: for results that would overwrite each other or an image; for a file beside a folder; for several
            scales of what is no semantic map.
    """
    described = dense.describe(model)
    classes, task = described["label_names"], described["task"]
    if multi_scale and task != "semantic":
        raise UserError(f"--multi-scale: not with --model {model}, only with models for semantic segmentation.")
    refuse_overwriting(files, output, ("", "_labels") if task == "semantic" else ("",))
    network, views = load_dense(model, checkpoint, multi_scale)
    found, unreadable = [], 0
    output.mkdir(parents=True, exist_ok=True)
    numbered = list(enumerate(files))
    for number, file in track(numbered, "images", console=errors, transient=True, disable=not errors.is_terminal):
        try:
            pixels = torch.from_numpy(np.array(open_image(file, exif_transpose=exif_transpose))).permute(2, 0, 1)
        except ImageError as error:
            errors.print(f"{file}: {error}")
            unreadable += 1
            continue
        prediction = predict_one(network, views, tv_tensors.Image(pixels.contiguous()))
        write_image(output / f"{file.stem}.png", draw(pixels, prediction, classes))
        if "semantic" in prediction:
            labels = prediction["semantic"].numpy().astype(np.uint8)
            write_image(output / f"{file.stem}_labels.png", Image.fromarray(labels))
        found.append((number, str(file), prediction))
    ids = described.get("category_ids", range(len(classes)))
    if task == "detection":
        write_detections(output / "detections.json", found, ids)
    if task == "panoptic":
        write_panoptic(output / "panoptic.json", found, ids)
    return unreadable


def refuse_overwriting(files: list[Path], output: Path, endings: Iterable[str]) -> None:
    """Raises UserError where a result NAME + ending + .png would be an image itself, or another's result."""
    images = {file.resolve() for file in files}
    owners: dict[Path, Path] = {}
    for file, ending in itertools.product(files, endings):
        result = output / f"{file.stem}{ending}.png"
        if result.resolve() in images:
            raise UserError(f"--output {output}: {result}, a result of {file}, would replace an image. Give another.")
        if (other := owners.setdefault(result, file)) is not file:
            raise UserError(f"IMAGE {file}: its result {result} would be that of {other} too. Rename one of them.")


def load_dense(model: str, checkpoint: Path | None, multi_scale: bool = False) -> tuple[nn.Module, Any]:
    """A model in evaluation mode, and what its images become before it. Raises UserError for a file beside a folder."""
    if checkpoint and model not in dense.PUBLISHED:
        raise UserError(f"--checkpoint {checkpoint}: --model {model} has its weights already. Leave one of them out.")
    overlay = {"file": str(checkpoint)} if checkpoint else None
    network = dense.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    preprocessing = dense.describe(model)["preprocessing"]
    return network, dense_views_transform(views_of(preprocessing) if multi_scale else [preprocessing["transform"]])


def predict_one(network: nn.Module, views: Any, image: tv_tensors.Image) -> dict[str, Any]:
    """The prediction for a uint8 image (3, H, W), in its own size, from what `views` makes of it."""
    seen, target = views(image, {})
    mean, std = (torch.tensor(network.preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    seen = [(torch.as_tensor(view).float() / 255 - mean) / std for view in seen]
    if len(seen) > 1:
        return network.predict_views(seen, target["size"])
    return network.predict(seen, [target["size"]])[0]


def write_image(path: Path, picture: Image.Image) -> None:
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
