"""Datasets, order, augmentation: everything between files and a batch on the device."""

from dinat.data.imagenet import accepted_labels, competing_classes
from dinat.data.images import ImageError, open_image
from dinat.data.labels import Labels, OneLabel, SeveralLabels, check_kind
from dinat.data.loaders import IGNORE, TrainLoader, blank, count_images, eval_loader
from dinat.data.seeding import reseed
from dinat.data.sources import class_to_idx, open_split
from dinat.data.transforms import (
    Augment,
    Normalize,
    eval_transform,
    resolve_preprocessing,
    train_transform,
)

__all__ = [
    "IGNORE",
    "Augment",
    "ImageError",
    "Labels",
    "Normalize",
    "OneLabel",
    "SeveralLabels",
    "TrainLoader",
    "accepted_labels",
    "blank",
    "check_kind",
    "class_to_idx",
    "competing_classes",
    "count_images",
    "eval_loader",
    "eval_transform",
    "open_image",
    "open_split",
    "reseed",
    "resolve_preprocessing",
    "train_transform",
]
