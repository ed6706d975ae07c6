"""Datasets, order, augmentation: everything between files and a batch on the device."""

from dinat.data.loaders import IGNORE, TrainLoader, eval_loader
from dinat.data.seeding import reseed
from dinat.data.sources import class_to_idx, open_split
from dinat.data.transforms import Augment, Normalize, eval_transform, resolve_preprocessing, train_transform

__all__ = [
    "IGNORE",
    "Augment",
    "Normalize",
    "TrainLoader",
    "class_to_idx",
    "eval_loader",
    "eval_transform",
    "open_split",
    "reseed",
    "resolve_preprocessing",
    "train_transform",
]
