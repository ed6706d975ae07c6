"""What detection and segmentation have in common: images of any size, rich targets, models of `dinat.dense`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinat import dense
from dinat.data import IGNORE, TrainLoader, eval_loader
from dinat.data.dense_transforms import (
    PER_OBJECT,
    dense_train_transform,
    dense_views_transform,
    views_of,
)
from dinat.data.scenes import DigitScenes
from dinat.data.sources import SPLIT_KEYS
from dinat.distributed import World
from dinat.errors import UserError, nearest
from dinat.tasks.models import load_dense_weights, to_dict
from dinat.tasks.task import Origin, Step, Task
from dinat.visualize import write_pictures

PICTURES = 8  # validation images in predictions.png
WINDOW = "[side, step] in pixels, such as [512, 341]"


class DenseTask(Task):
    """A task whose predictions have the size of the image.

    The `augment` section has one part of use here, `transform`: a list of steps, see `dinat.data.dense_transforms`.
    `data.eval_transform` is such a list of resizes for evaluation, by default the model's own; scores are always of the
    original images.

    Attributes:
        readers: data.name -> the data set.
    """

    eval_batch_size = 1
    readers: ClassVar[dict[str, type[Dataset]]]

    def __init__(
        self, data: Mapping[str, Any], model: Mapping[str, Any], runtime: Mapping[str, Any], world: World,
        test: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(data, model, runtime, world, test)
        if data["name"] not in self.readers:
            raise UserError(
                f"data.name={data['name']}: not for task={self.name}, which reads {', '.join(self.readers)}."
                f"{nearest(str(data['name']), self.readers)}"
            )

        if (window := self.test["window"]) and (len(to_list(window, "test.window", WINDOW)) != 2 or min(window) < 1):
            raise UserError(f"test.window={list(window)}: must be a list {WINDOW}.")
        if data["exif_transpose"]:
            raise UserError(
                "data.exif_transpose=true: not for dense prediction, whose boxes and masks would stay behind."
            )

    def open(self, *, seed: int, batch_size: int) -> None:
        self.train_set = self.read("train", seed=seed)
        self.val_set = self.read("validation", classes=self.train_set.classes)
        if self.data.get("test_split"):
            self.test_set = self.read("test", classes=self.train_set.classes)
        self.classes = list(self.train_set.classes)
        self.num_classes = self.agree_on_classes(len(self.classes))

    def open_validation(self, origin: Origin) -> None:
        self.val_set = self.read("validation", classes=origin.classes or None)
        self.classes = origin.classes or list(self.val_set.classes)
        self.num_classes = origin.num_classes or len(self.classes)

    def read(self, split: str, *, seed: int = 0, classes: Sequence[str] | None = None) -> Dataset:
        """One split of the data, labelled by `classes` where they are known."""
        reader, options = self.readers[self.data["name"]], to_dict(self.data["kwargs"])
        if issubclass(reader, DigitScenes):
            if split == "test":
                raise UserError(f"data.test_split={self.data['test_split']}: digit_scenes has none. Leave it at null.")
            options = {"size": self.data["img_size"], "seed": seed, **options}
            arguments = (split,)
        else:
            arguments = (self.data["root"], self.data[SPLIT_KEYS[split]])
            options["classes"] = classes or options.get("classes")
            if split != "train":  # every image is evaluated
                options.pop("keep_empty", None)
        options = {key: value for key, value in options.items() if value is not None}
        try:
            return reader(*arguments, **options)
        except TypeError as error:
            raise UserError(f"data.kwargs={options}: data.name={self.data['name']} refuses them: {error}") from error

    def build_model(self) -> nn.Module:
        model = self.create(self.model["pretrained"])
        if self.model["checkpoint"]:
            load_dense_weights(model, self.model["checkpoint"], reset_head=self.model["reset_head"])
        return self.prepare_for(model)

    def load_model(self, origin: Origin, use_ema: bool) -> nn.Module:
        published = dense.PUBLISHED.get(self.model["name"])
        if published and not origin.classes and self.num_classes != len(published.classes):
            raise UserError(
                f"class counts differ: {published.name} has {len(published.classes)}, the data {self.num_classes}. "
                "Evaluate on the data that the model was trained for."
            )
        model = self.create(self.model["pretrained"] if origin.weights is None else False)
        if self.name not in model.tasks:
            raise UserError(f"test.task={self.name}: {self.model['name']} is for {', '.join(model.tasks)}.")
        model.task = self.name
        if origin.weights:
            load_dense_weights(model, origin.weights, use_ema=use_ema, key="checkpoint")
        return self.prepare_for(model)

    def create(self, pretrained: bool | str = False) -> nn.Module:
        """The model as its section describes it, with the initial weights that `model.pretrained` asks for."""
        name = self.model["name"]
        of_backbone = pretrained == "backbone" or (pretrained is True and name not in dense.PUBLISHED)
        return dense.create_model(
            name, pretrained=not of_backbone and pretrained, num_classes=self.num_classes,
            backbone=self.model["backbone"], pretrained_backbone=of_backbone, task=self.name, **self.arguments(),
        )  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        """The model's arguments, stochastic depth among those of the backbone, names of the classes for texts."""
        arguments = to_dict(self.model["kwargs"])
        if arguments.get("tokenizer"):
            arguments = {"class_names": self.classes, **arguments}
        if self.model["drop_path_rate"] is not None:
            inner = {**arguments.get("backbone_kwargs", {}), "drop_path_rate": self.model["drop_path_rate"]}
            arguments["backbone_kwargs"] = inner
        return arguments

    def prepare_for(self, model: nn.Module) -> nn.Module:
        """Settles how images are normalised for the model, and returns it."""
        self.preprocessing = {"transform": [], "views": [], **model.preprocessing}
        self.preprocessing |= {key: self.data[key] for key in ("mean", "std") if self.data[key] is not None}
        if self.data["eval_transform"] is not None:
            own = to_list(self.data["eval_transform"], "data.eval_transform")
            self.preprocessing |= {"transform": own, "views": []}
        self.mean, self.std = (
            torch.tensor(self.preprocessing[key], device=self.world.device).mul(255).view(-1, 1, 1)
            for key in ("mean", "std")
        )
        return model

    def train_loader(self, augment: Mapping[str, Any], *, batch_size: int, parts: int, seed: int) -> TrainLoader:
        transform = dense_train_transform(to_list(augment["transform"], "augment.transform"))
        return TrainLoader(self.train_set, transform, None, batch_size=batch_size, parts=parts, seed=seed, **self.share)

    def eval_loader(self, batch_size: int, source: Dataset | None = None) -> DataLoader:
        transform = dense_views_transform(self.views())
        source = self.val_set if source is None else source
        return eval_loader(source, transform, None, batch_size=batch_size, **self.share)

    def views(self) -> list[list[dict[str, Any]]]:
        """The steps for each view of an image in evaluation, of which there is one unless `test.multi_scale` is set."""
        if not self.test["multi_scale"]:
            return [self.preprocessing["transform"]]
        return views_of(self.preprocessing, self.test["scales"])

    def normalize(self, images: Sequence[Tensor]) -> list[Tensor]:
        """uint8 images (3, h, w) of any sizes -> float32 on the device, normalised."""
        moved = (torch.as_tensor(image).to(self.world.device, non_blocking=True) for image in images)
        return [(image.float() - self.mean) / self.std for image in moved]

    def step(self, model: nn.Module, images: Sequence[Tensor], targets: Sequence[dict[str, Any]]) -> Step:
        targets = [to_device(without_crowds(target), self.world.device) for target in targets]
        with self.autocast():
            losses = model(self.normalize(images), targets)
        count = len(images)
        parts = {name: loss.detach() * count for name, loss in losses.items()} if len(losses) > 1 else {}
        return Step(sum(losses.values()), count, parts)

    def score(self, metric: Any, model: nn.Module, images: Sequence[Tensor], targets: Sequence[Any]) -> None:
        real = [index for index, target in enumerate(targets) if target != IGNORE]
        views = [image if index in real else [image] for index, image in enumerate(images)]
        sizes = [targets[i]["size"] if i in real else seen.shape[-2:] for i, (seen, *_) in enumerate(views)]
        predictions = self.predict(model, views, sizes)
        metric.update([predictions[index] for index in real], [targets[index] for index in real])

    def predict(
        self, model: nn.Module, views: Sequence[Sequence[Tensor]], sizes: Sequence[tuple[int, int]]
    ) -> list[dict]:
        """Predictions for images, in `sizes` (height, width), from the views of each (uint8)."""
        prepared, sizes = [self.normalize(seen) for seen in views], [tuple(size) for size in sizes]
        with self.autocast():
            if self.averaged:
                flip, window = self.test["multi_scale"] and self.test["flip"], self.test["window"]
                pairs = zip(prepared, sizes, strict=True)
                return [model.predict_views(seen, size, flip, window) for seen, size in pairs]
            return model.predict([image for (image,) in prepared], sizes)

    @torch.no_grad()
    def draw(self, model: nn.Module, folder: Path) -> None:
        transform = dense_views_transform(self.views())
        training = model.training
        model.eval()
        rows = []
        for index in range(min(PICTURES, len(self.val_set))):
            image, target = self.val_set[index]
            views, target = transform(image, target)
            rows.append((image, without_crowds(target), self.predict(model, [views], [target["size"]])[0]))
        model.train(training)
        write_pictures(folder / "predictions.png", rows, self.classes)

    def describe_input(self) -> str:
        return f"({self.data['img_size']} px)" if self.data["img_size"] else "of any size"

    def results_row(self, model: nn.Module, figures: Mapping[str, float]) -> dict[str, Any]:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rounded = {name: None if math.isnan(value) else round(value, 4) for name, value in figures.items()}
        tested = f"{self.full_name()} at several scales" if self.test["multi_scale"] else self.full_name()
        return {"model": tested, **rounded, "param_count": round(parameters / 1e6, 2)}

    def published(self, model: nn.Module) -> float | None:
        row = dense.PUBLISHED.get(self.model["name"])
        if row is None or self.data["name"].partition("_")[0] != row.data.partition("_")[0]:
            return None
        return row.figures.get(f"{self.headline}_multi_scale" if self.test["multi_scale"] else self.headline)

    def full_name(self) -> str:
        """METHOD_BACKBONE."""
        return "_".join(filter(None, (self.model["name"], self.model["backbone"])))

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        model = self.create()
        model.load_state_dict(weights)
        section = {"name": self.model["name"], "backbone": self.model["backbone"], "kwargs": self.arguments()}
        described = {
            "task": self.name,
            "model": section,
            "num_classes": self.num_classes,
            "label_names": self.classes,
            "category_ids": list(getattr(self.train_set, "category_ids", range(self.num_classes))),
            "preprocessing": self.preprocessing,
        }
        dense.save(model, described, folder)


def to_list(values: Any, key: str, such_as: str = "of steps, such as [{flip: {p: 0.5}}]") -> list[Any]:
    """A plain list; [] for null."""
    values = OmegaConf.to_container(values, resolve=True) if OmegaConf.is_config(values) else values
    if values is not None and not isinstance(values, list):
        raise UserError(f"{key}={values}: must be a list {such_as}.")
    return values or []


def without_crowds(target: dict[str, Any]) -> dict[str, Any]:
    """The target without regions of many objects, which are for evaluation only."""
    if "iscrowd" not in target or not target["iscrowd"].any():
        return target
    keep = ~target["iscrowd"]
    return target | {key: target[key][keep] for key in PER_OBJECT if key in target}


def to_device(target: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The target's tensors on `device`."""
    return {key: part.to(device) if isinstance(part, Tensor) else part for key, part in target.items()}
