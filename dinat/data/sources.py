"""Opening a dataset through timm's readers, checked so that what is wrong is said before training starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset

from dinat.data import imagenet
from dinat.data.digits import Digits
from dinat.errors import UserError

READERS = "digits, folder (also of .tar files), torch/NAME, hfds/NAME, hfids/NAME, wds/NAME, tfds/NAME"
STREAMS = ("wds/", "hfids/", "tfds/")  # read in order, no access by index
SYNONYMS = {"train": ("training",), "validation": ("val", "valid", "eval", "test")}


def open_split(
    data: Mapping[str, Any], split: str, *, class_map: dict[str, int] | None = None, seed: int = 0, batch_size: int = 1
) -> Dataset | IterableDataset:
    """Opens one split of a dataset of `(PIL image, class index)`; no transform is set.

    Args:
        data: the `data` section of the configuration.
        split: "train" or "validation"; `data.train_split` and `data.val_split` hold their names in the dataset.
        class_map: class name -> index, so that a validation folder is labelled as the training folder was.
        seed: of a training stream's shuffling.
        batch_size: images per batch and process, by which a training stream rounds its length.

    Raises:
        UserError: for an unknown reader, a missing path, a class folder without images, or whatever else the reader
            refuses.
    """
    training = split == "train"
    name, part = data["name"], data["train_split" if training else "val_split"]
    if name == "digits":
        return Digits(split)
    if name == "folder":
        root = _locate(data, split)
        known = data["class_map"] or imagenet.class_map(data.get("benchmark"))
        options = {"class_map": known or class_map, "input_key": data["input_key"], "search_split": False}
    elif "/" in name:
        root = data["root"]
        options = {"split": part, "download": data["download"]}
        if not name.startswith("torch/"):
            options |= {key: data[key] for key in ("class_map", "input_key", "target_key")}
        if name.startswith(STREAMS):
            samples = data["train_samples" if training else "val_samples"]
            options |= {"is_training": training, "num_samples": samples, "seed": seed, "batch_size": batch_size}
    else:
        raise UserError(f"data.name={name}: no such dataset reader. Known: {READERS}.")
    if name.startswith("wds/") and not (":" in str(root) or Path(str(root)).is_dir()):
        raise UserError(f"data.root={root}: no such directory of webdataset shards.")
    try:
        dataset = create_dataset("" if name == "folder" else name, root=root, **options)
    except Exception as error:  # readers raise what they please: assertions, IndexErrors, errors of their libraries
        reason = str(error) or type(error).__name__
        raise UserError(f"data.name={name}, data.root={root}: split '{part}' cannot be opened: {reason}") from error
    if data.get("benchmark") == "imagenet_real" and not training:
        dataset.reader.samples = imagenet.number_images(dataset.reader.samples)
    if name == "folder" and Path(root).is_dir() and not known:
        _refuse_classes_without_images(Path(root), dataset.reader, class_map)
    return dataset


def class_to_idx(dataset: Dataset) -> dict[str, int]:
    """Class name -> index as the dataset tells it; empty for one that does not (webdataset shards, some streams)."""
    reader = getattr(dataset, "reader", dataset)
    return dict(getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {})


def _locate(data: Mapping[str, Any], split: str) -> str:
    """The folder or .tar file of a split below `data.root`, by its name or a usual synonym."""
    key = "train_split" if split == "train" else "val_split"
    if data["root"] is None:
        raise UserError(f"data.root is not set. Set it to the folder that holds '{data[key]}'.")
    root = Path(data["root"])
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder.")
    names = (data[key], *SYNONYMS.get(data[key], ()))
    for path in (root / candidate for name in names for candidate in (name, f"{name}.tar")):
        if path.exists():
            return str(path)
    found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
    raise UserError(
        f"data.{key}={data[key]}: {root} holds no folder or .tar file of that name; it holds {found}. "
        f"Use data.{key}=. if the class folders are directly in data.root."
    )


def _refuse_classes_without_images(root: Path, reader: Any, class_map: dict[str, int] | None) -> None:
    """timm passes over an empty class folder in silence, which would renumber the classes after it."""
    used = {Path(path).relative_to(root).parts[0] for path, _ in reader.samples}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name not in used):
        if class_map and folder.name not in class_map:
            raise UserError(f"data.root: class folder {folder} is not among the {len(class_map)} training classes.")
        raise UserError(f"data.root: class folder {folder} holds no images. Remove it or fill it.")
