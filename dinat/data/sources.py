"""Opening a dataset through timm's readers, checked so that what is wrong is said before training starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data import ImageDataset, IterableImageDataset, create_dataset
from timm.data.readers.reader import Reader
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import DatasetFolder

from dinat.data import imagenet
from dinat.data.class_folders import ClassFolders
from dinat.data.digits import Digits
from dinat.data.medmnist import MedMNIST
from dinat.errors import UserError

READERS = (
    "digits, folder (also of .tar files), medmnist/SET@SIZE, medmnist_c/SET/CORRUPTION, torch/NAME, hfds/NAME, "
    "hfids/NAME, wds/NAME, tfds/NAME"
)
SPLIT_KEYS = {"train": "train_split", "validation": "val_split", "test": "test_split"}
STREAMS = ("wds/", "hfids/", "tfds/")  # read in order, no access by index
ENCODED = ("wds/", "hfids/")  # those that give images as they are stored
SYNONYMS = {"train": ("training",), "validation": ("val", "valid", "eval", "test")}


def open_split(
    data: Mapping[str, Any], split: str, *, class_map: dict[str, int] | None = None, seed: int = 0, batch_size: int = 1
) -> Dataset | IterableDataset:
    """Opens one split of a dataset of `(PIL image, label)`, or of volumes (arrays); no transform is set.

    Args:
        data: the `data` section of the configuration.
        split: "train", "validation" or "test"; `data.train_split`, `val_split` and `test_split` hold their names in the
            dataset.
        class_map: class name -> index, so that a validation folder is labelled as the training folder was.
        seed: of a training stream's shuffling.
        batch_size: images per batch and process, by which a training stream rounds its length.

    Raises:
        UserError: for an unknown reader, a missing path, a class folder without images, or whatever else the reader
            refuses.
    """
    try:
        dataset = _open(data, split, class_map, seed, batch_size)
    except UserError:
        raise
    except Exception as error:  # readers raise what they please: assertions, IndexErrors, errors of their libraries
        part = data[SPLIT_KEYS[split]]
        where = f"data.name={data['name']}, data.root={data['root']}"
        reason = str(error) or type(error).__name__
        raise UserError(f"{where}: split '{part}' cannot be opened: {reason}") from error
    if data.get("benchmark") == "imagenet_real" and split != "train":
        dataset.reader.samples = imagenet.number_images(dataset.reader.samples)
    return dataset


def _open(
    data: Mapping[str, Any], split: str, class_map: dict[str, int] | None, seed: int, batch_size: int
) -> Dataset | IterableDataset:
    training = split == "train"
    name, part = data["name"], data[SPLIT_KEYS[split]]
    if name == "digits":
        if split == "test":
            raise UserError(f"data.test_split={part}: digits has none. Leave it at null.")
        return Digits(split)
    if name.startswith(("medmnist/", "medmnist_c/")):
        return MedMNIST(name, data["root"], part, bool(data["download"]))
    if name == "folder":
        return _open_folder(data, split, class_map)
    if "/" not in name:
        raise UserError(
            f"data.name={name}: no such dataset reader. Known: {READERS}. Those of dense prediction need "
            "task=detection, semantic or panoptic."
        )
    root = data["root"]
    options = {"split": part, "download": data["download"]}
    if not name.startswith("torch/"):
        options |= {key: data[key] for key in ("class_map", "input_key", "target_key")}
    if name.startswith(STREAMS):
        samples = data["train_samples" if training else "val_samples"]
        options |= {"is_training": training, "num_samples": samples, "seed": seed, "batch_size": batch_size}
    if name.startswith("wds/") and not (":" in str(root) or Path(str(root)).is_dir()):
        raise UserError(f"data.root={root}: no such directory of webdataset shards.")
    if name.startswith(ENCODED):
        return IterableImageDataset(root, reader=_open_encoded(name, root, options))
    dataset = create_dataset(name, root=root, **options)
    if isinstance(dataset, DatasetFolder):
        dataset.loader = str  # the path: its own loader makes 16-bit images white and shows what alpha hides
    return dataset


def _open_folder(data: Mapping[str, Any], split: str, class_map: dict[str, int] | None) -> ImageDataset:
    known, known_from = data["class_map"], "classes of data.class_map"
    if known and not isinstance(known, str):
        known = {str(name): index for name, index in known.items()}
    if not known and (known := imagenet.class_map(data.get("benchmark"))):
        known_from = f"classes of data.benchmark={data['benchmark']}"
    reader = ClassFolders(
        _locate(data, split),
        known or class_map,
        known_from=known_from if known else "training classes",
        complete=not known,
        endings=data["input_key"].split(";") if data["input_key"] else None,
    )
    return ImageDataset(None, reader=reader)


def _open_encoded(name: str, root: str | None, options: dict[str, Any]) -> Reader:
    """A reader of a stream that leaves its images as they are stored."""
    options = {key: value for key, value in options.items() if value is not None}
    kind, _, rest = name.partition("/")
    if kind == "wds":
        from dinat.data.shards import Shards

        del options["download"]
        return Shards(root, rest, **options)
    from dinat.data.hugging_face import HuggingFaceStream

    return HuggingFaceStream(rest, root, input_img_mode="", **options)


def class_to_idx(dataset: Dataset) -> dict[str, int]:
    """Class name -> index as the dataset tells it; empty for one that does not (webdataset shards, some streams)."""
    reader = getattr(dataset, "reader", dataset)
    return dict(getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {})


def _locate(data: Mapping[str, Any], split: str) -> str:
    """The folder or .tar file of a split below `data.root`, by its name or a usual synonym."""
    key = SPLIT_KEYS[split]
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
