"""One class per image: a timm classifier, cross-entropy, top-1 and top-5."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dinat.data import (
    Augment,
    Normalize,
    TrainLoader,
    accepted_labels,
    class_to_idx,
    competing_classes,
    eval_loader,
    eval_transform,
    open_image,
    open_split,
    resolve_preprocessing,
    train_transform,
)
from dinat.distributed import World
from dinat.errors import UserError
from dinat.metrics.classification import ClassificationMetric, check_labels
from dinat.published import TOP1
from dinat.tasks.models import build_model, check_model_name, export, load_weights, refusal, to_dict
from dinat.tasks.task import Origin, Step, Task

log = logging.getLogger("dinat")


class Classification(Task):
    """Images with one label each. The `augment` section is timm's training augmentation; see configs/augment."""

    name = "classification"
    headline = "top1"
    hub_task = "image-classification"
    labels = {"loss": "loss", "top1": "top-1", "top5": "top-5"}  # noqa: RUF012 - never written

    def __init__(
        self, data: Mapping[str, Any], model: Mapping[str, Any], runtime: Mapping[str, Any], world: World
    ) -> None:
        super().__init__(data, model, runtime, world)
        check_model_name(model["name"])
        self.benchmark = data.get("benchmark")

    def open(self, *, seed: int, batch_size: int) -> None:
        self.train_set = open_split(self.data, "train", seed=seed, batch_size=batch_size)
        class_map = class_to_idx(self.train_set)
        self.val_set = open_split(self.data, "validation", class_map=class_map)
        self.num_classes = self.agree_on_classes(max(class_map.values()) + 1 if class_map else None)
        self.classes = sorted(class_map, key=class_map.get)

    def build_model(self) -> nn.Module:
        return self.build(self.num_classes)

    def open_validation(self, origin: Origin) -> None:
        class_map = {name: index for index, name in enumerate(origin.classes)} or None
        self.val_set = open_split(self.data, "validation", class_map=class_map)

    def load_model(self, origin: Origin, use_ema: bool) -> nn.Module:
        found = class_to_idx(self.val_set)
        in_data = max(found.values()) + 1 if found else self.data["num_classes"]
        model = self.build(origin.num_classes or (in_data if origin.weights else None))
        if in_data is not None and in_data != model.num_classes:
            raise UserError(
                f"class counts differ: the model has {model.num_classes}, the data {in_data}. "
                "Evaluate on the data that the model was trained for, or map its classes with data.class_map."
            )
        if origin.weights:
            load_weights(model, origin.weights, use_ema=use_ema)
        self.num_classes = model.num_classes
        self.classes = origin.classes or list(found)
        return model

    def build(self, num_classes: int | None) -> nn.Module:
        """The model on its device, tried out on one blank image; settles how images are prepared for it.

        Where the model refuses the image size, it is built for that size, or without `model.kwargs.img_size`.
        """
        given = to_dict(self.model["kwargs"])
        attempts = [given]
        if size := self.data["img_size"] or given.get("img_size"):
            attempts += [{**given, "img_size": size}, {key: given[key] for key in given if key != "img_size"}]
        refused = None
        for arguments in attempts:
            try:
                model = self.attempt(arguments, given, num_classes)
            except UserError as error:
                refused = refused or error
                continue
            if arguments != given:
                log.info("%s: built with model.kwargs=%s for this image size", self.model["name"], arguments)
                self.model = {**self.model, "kwargs": arguments}
            return model
        raise refused

    def attempt(self, arguments: dict[str, Any], given: dict[str, Any], num_classes: int | None) -> nn.Module:
        model = build_model({**self.model, "kwargs": arguments}, num_classes).to(self.world.device)
        self.preprocessing = resolve_preprocessing(self.data, model, given.get("img_size"), given.get("in_chans"))
        channels, height, width = self.preprocessing["input_size"]
        self.opener = partial(open_image, channels=channels, exif_transpose=bool(self.data.get("exif_transpose")))
        self.normalize = Normalize(self.preprocessing, self.world.device, self.runtime["channels_last"])
        with self.autocast():
            reason = refusal(model, torch.zeros(1, channels, height, width, device=self.world.device))
        if reason:
            size, beside = height if height == width else [height, width], f", here with model.kwargs={arguments}"
            raise UserError(
                f"data.img_size={size}: {self.model['name']} cannot take it: {reason}. "
                f"It was made for {model.pretrained_cfg['input_size'][-1]} pixels{beside if arguments else ''}."
            )
        return model

    def train_loader(self, augment: Mapping[str, Any], *, batch_size: int, parts: int, seed: int) -> TrainLoader:
        if batch_size % 2 and (augment["mixup"]["mixup_alpha"] or augment["mixup"]["cutmix_alpha"]):
            raise UserError(
                f"batch_size={batch_size * parts * self.world.size}: {batch_size} images per forward pass; "
                "mixup needs an even number."
            )
        self.augment = Augment(augment, self.num_classes, self.world.device)
        transform = train_transform(self.preprocessing, to_dict(augment["transform"]))
        return TrainLoader(
            self.train_set, transform, self.preprocessing["input_size"], batch_size=batch_size, parts=parts, seed=seed,
            opener=self.opener, **self.share,
        )  # fmt: skip

    def eval_loader(self, batch_size: int) -> DataLoader:
        size, transform = self.preprocessing["input_size"], eval_transform(self.preprocessing)
        return eval_loader(self.val_set, transform, size, batch_size=batch_size, opener=self.opener, **self.share)

    def step(self, model: nn.Module, images: Tensor, targets: Tensor) -> Step:
        check_labels(targets, self.num_classes)
        images, targets = self.augment(self.normalize(images), targets.to(self.world.device, non_blocking=True))
        with self.autocast():
            logits = model(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=self.augment.smoothing)
        labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
        return Step(loss, len(images), {"top1": 100 * (logits.argmax(dim=1) == labels).sum()})

    def score(self, metric: ClassificationMetric, model: nn.Module, images: Tensor, targets: Tensor) -> None:
        with self.autocast():
            logits = model(self.normalize(images))
        metric.update(logits, targets)

    def metric(self, confusion: bool = False) -> ClassificationMetric:
        names = self.classes + [str(index) for index in range(len(self.classes), self.num_classes)]
        return ClassificationMetric(
            names, self.world.device, confusion=confusion, competing=competing_classes(self.benchmark),
            accepted=accepted_labels(self.benchmark),
        )  # fmt: skip

    def describe_input(self) -> str:
        return str(self.preprocessing["input_size"])

    def results_row(self, model: nn.Module, figures: Mapping[str, float]) -> dict[str, Any]:
        """A row of timm's results tables, and the loss."""
        return {
            "model": model.pretrained_cfg["architecture"],
            "top1": round(figures["top1"], 4),
            "top1_err": round(100 - figures["top1"], 4),
            "top5": round(figures["top5"], 4),
            "top5_err": round(100 - figures["top5"], 4),
            "param_count": round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2),
            "img_size": self.preprocessing["input_size"][-1],
            "crop_pct": self.preprocessing["crop_pct"],
            "interpolation": self.preprocessing["interpolation"],
            "loss": round(figures["loss"], 6),
        }

    def published(self, model: nn.Module) -> float | None:
        cfg = model.pretrained_cfg
        full_name = ".".join(filter(None, (cfg["architecture"], cfg.get("tag"))))
        return TOP1.get(full_name) if self.model["pretrained"] and self.benchmark == "imagenet" else None

    def check_details(self, *, per_class: bool, confusion: bool) -> None:
        if self.benchmark == "imagenet_real" and (per_class or confusion):
            raise UserError(
                "per_class and confusion need one label per image, data.benchmark=imagenet_real has any number."
            )

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        arguments = to_dict(self.model["kwargs"])
        plain = timm.create_model(self.model["name"], num_classes=self.num_classes, **arguments)
        plain.load_state_dict(weights)
        export(plain, folder, self.preprocessing, arguments, self.classes)
