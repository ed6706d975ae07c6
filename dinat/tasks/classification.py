"""A timm classifier of images or volumes: one class each, or several; see `dinat.tasks.objectives`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinat.data import (
    Augment,
    Normalize,
    TrainLoader,
    check_kind,
    class_to_idx,
    eval_loader,
    eval_transform,
    open_image,
    open_split,
    resolve_preprocessing,
    train_transform,
)
from dinat.distributed import World
from dinat.errors import UserError
from dinat.published import TOP1
from dinat.tasks.models import build_model, check_model_name, export, load_weights, refusal, to_dict
from dinat.tasks.objectives import OneClass, RankedClass, SeveralClasses
from dinat.tasks.task import Metric, Origin, Step, Task

log = logging.getLogger("dinat")


class Classification(Task):
    """Images, or volumes, with labels. The `augment` section is timm's training augmentation; see configs/augment.

    Attributes:
        objective: what is lost and scored, by the labels of the data.
    """

    name = "classification"
    hub_task = "image-classification"

    def __init__(
        self, data: Mapping[str, Any], model: Mapping[str, Any], runtime: Mapping[str, Any], world: World,
        test: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(data, model, runtime, world, test)
        check_model_name(model["name"])
        self.benchmark = data.get("benchmark")
        self.several = check_kind(data.get("labels"))

    def open(self, *, seed: int, batch_size: int) -> None:
        self.train_set = open_split(self.data, "train", seed=seed, batch_size=batch_size)
        class_map = class_to_idx(self.train_set)
        self.val_set = open_split(self.data, "validation", class_map=class_map)
        if self.data.get("test_split"):
            self.test_set = open_split(self.data, "test", class_map=class_map)
        self.num_classes = self.agree_on_classes(max(class_map.values()) + 1 if class_map else None)
        self.classes = sorted(class_map, key=class_map.get)
        self.choose_objective()

    def build_model(self) -> nn.Module:
        return self.build(self.num_classes)

    def open_validation(self, origin: Origin) -> None:
        class_map = {name: index for index, name in enumerate(origin.classes)} or None
        self.val_set = open_split(self.data, "validation", class_map=class_map)
        self.choose_objective()

    def choose_objective(self) -> None:
        """By the kind of labels that the data has."""
        several = getattr(self.val_set, "label_kind", None) or self.several
        if several:
            self.objective = SeveralClasses(several)
        elif getattr(self.val_set, "ranking", False):
            self.objective = RankedClass()
        else:
            self.objective = OneClass(self.benchmark)
        self.headline, self.labels = self.objective.headline, self.objective.labels

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
        built_for = given.get(getattr(model, "size_argument", "img_size"))
        self.preprocessing = resolve_preprocessing(self.data, model, built_for, given.get("in_chans"))
        size = self.preprocessing["input_size"]
        self.check_rank(model)
        self.opener = np.asarray  # what readers of volumes give is open
        if len(size) == 3:
            upright = bool(self.data.get("exif_transpose"))
            self.opener = partial(open_image, channels=size[0], exif_transpose=upright)
        self.normalize = Normalize(self.preprocessing, self.world.device, self.runtime["channels_last"])
        with self.autocast():
            reason = refusal(model, torch.zeros(1, *size, device=self.world.device))
        if reason:
            sides, beside = sorted({*size[1:]}), f", here with model.kwargs={arguments}"
            raise UserError(
                f"data.img_size={sides[0] if len(sides) == 1 else [*size[1:]]}: {self.model['name']} cannot take it: "
                f"{reason}. "
                f"It was made for {model.pretrained_cfg['input_size'][-1]} pixels{beside if arguments else ''}."
            )
        return model

    def check_rank(self, model: nn.Module) -> None:
        """Raises UserError for a model of images where the data has volumes, the reverse, or volumes in colour."""
        takes, has = (
            "volumes" if is_volume else "images"
            for is_volume in (getattr(model, "rank", 2) == 3, getattr(self.val_set, "volumes", False))
        )
        if takes != has:
            other = "dinat_3d_pico" if has == "volumes" else "dinat_pico"
            raise UserError(
                f"model.name={self.model['name']} takes {takes}, data.name={self.data['name']} has {has}. "
                f"Choose a model of {has}, such as {other}."
            )
        if has == "volumes" and self.preprocessing["input_size"][0] != 1:
            raise UserError(
                f"model.kwargs.in_chans={self.preprocessing['input_size'][0]}: volumes have 1 channel here."
            )

    def train_loader(self, augment: Mapping[str, Any], *, batch_size: int, parts: int, seed: int) -> TrainLoader:
        if batch_size % 2 and (augment["mixup"]["mixup_alpha"] or augment["mixup"]["cutmix_alpha"]):
            raise UserError(
                f"batch_size={batch_size * parts * self.world.size}: {batch_size} images per forward pass; "
                "mixup needs an even number."
            )
        self.check_augment(augment)
        self.augment = Augment(augment, self.num_classes, self.world.device)
        transform = train_transform(self.preprocessing, to_dict(augment["transform"]))
        return TrainLoader(
            self.train_set, transform, self.preprocessing["input_size"], batch_size=batch_size, parts=parts, seed=seed,
            opener=self.opener, labels=self.objective.target(self.num_classes), **self.share,
        )  # fmt: skip

    def check_augment(self, augment: Mapping[str, Any]) -> None:
        """Raises UserError for what timm does to images with one label alone."""
        mixup, volumes = augment["mixup"], len(self.preprocessing["input_size"]) == 4
        if self.objective.several and (mixup["mixup_alpha"] or mixup["cutmix_alpha"]):
            raise UserError("augment.mixup: not for several labels per image. Set mixup_alpha and cutmix_alpha to 0.")
        if volumes and (mixup["cutmix_alpha"] or augment["erasing"]["prob"]):
            raise UserError("augment: no cutmix and no erasing of volumes. Choose augment=volumes, or set both to 0.")

    def eval_loader(self, batch_size: int, source: Dataset | None = None) -> DataLoader:
        size, transform = self.preprocessing["input_size"], eval_transform(self.preprocessing)
        return eval_loader(
            self.val_set if source is None else source, transform, size, batch_size=batch_size, opener=self.opener,
            labels=self.objective.target(self.num_classes), **self.share,
        )  # fmt: skip

    def step(self, model: nn.Module, images: Tensor, targets: Tensor) -> Step:
        self.objective.check(targets, self.num_classes)
        images, targets = self.augment(self.normalize(images), targets.to(self.world.device, non_blocking=True))
        with self.autocast():
            logits = model(images)
        loss = self.objective.loss(logits.float(), targets, self.augment.smoothing)
        return Step(loss, len(images), self.objective.sums(logits, targets))

    def score(self, metric: Metric, model: nn.Module, images: Tensor, targets: Tensor) -> None:
        with self.autocast():
            logits = model(self.normalize(images))
        metric.update(logits, targets)

    def metric(self, confusion: bool = False) -> Metric:
        names = self.classes + [str(index) for index in range(len(self.classes), self.num_classes)]
        return self.objective.metric(names, self.world.device, confusion)

    def describe_input(self) -> str:
        return str(self.preprocessing["input_size"])

    def results_row(self, model: nn.Module, figures: Mapping[str, float]) -> dict[str, Any]:
        """A row of timm's results tables, with the objective's figures, and the loss."""
        return {
            "model": model.pretrained_cfg["architecture"],
            **self.objective.columns(figures),
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
        export(plain, folder, self.preprocessing, arguments, self.classes, self.objective.several)
