"""Which images a configuration opens, under every name that a split may have."""

import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from dinat.data import class_to_idx, open_split, sources
from dinat.data.digits import Digits

SECTION = {
    "name": "folder", "root": None, "train_split": "train", "val_split": "validation", "benchmark": None,
    "class_map": None, "num_classes": None, "train_samples": None, "val_samples": None, "input_key": None,
    "target_key": None, "download": False,
}  # fmt: skip


@pytest.fixture
def classes(tmp_path):
    """Makes class folders with one image each, as a folder or a .tar file of a name."""

    def classes(name, *labels):
        for label in labels:
            path = tmp_path / name.removesuffix(".tar") / label / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(path)
        if name.endswith(".tar"):
            folder = tmp_path / name.removesuffix(".tar")
            with tarfile.open(tmp_path / name, "w") as archive:
                archive.add(folder, arcname=".")
            shutil.rmtree(folder)
        return tmp_path

    return classes


NAMES = [("train", "train"), ("train", "training"), ("validation", "validation"), ("validation", "val"),
         ("validation", "valid"), ("validation", "eval"), ("validation", "test")]  # fmt: skip


@pytest.mark.parametrize("suffix", ["", ".tar"])
@pytest.mark.parametrize(("split", "name"), NAMES)
def test_every_name_of_a_split(classes, split, name, suffix):
    root = classes(f"{name}{suffix}", "a", "b")
    opened = open_split({**SECTION, "root": str(root)}, split)
    assert len(opened) == 2
    assert class_to_idx(opened) == {"a": 0, "b": 1}


def test_the_name_asked_for_comes_before_its_synonyms(classes):
    classes("val", "a", "b", "c")
    classes("test", "a")
    root = classes("validation", "a", "b")
    lengths = {
        name: len(open_split({**SECTION, "root": str(root), "val_split": name}, "validation"))
        for name in ("validation", "val", "test")
    }
    assert lengths == {"validation": 2, "val": 3, "test": 1}


def test_each_split_by_its_own_key(classes):
    classes("one", "a", "b", "c")
    section = {**SECTION, "root": str(classes("two", "a", "b")), "train_split": "one", "val_split": "two"}
    assert len(open_split(section, "train")) == 3
    assert len(open_split(section, "validation")) == 2


def test_class_map_of_the_user_wins(classes):
    root = str(classes("validation", "a", "b"))
    trained = {"a": 0, "b": 1}
    of_training = open_split({**SECTION, "root": root}, "validation", class_map=trained | {"c": 2})
    assert class_to_idx(of_training) == trained | {"c": 2}
    own = open_split({**SECTION, "root": root, "class_map": {"a": 4, "b": 2}}, "validation", class_map=trained)
    assert [target for _, target in own] == [4, 2]


def test_what_timm_is_told(monkeypatch):
    """Of a stream, each split's own number of samples; of all, the keys; of torchvision, whether to download."""
    told = []
    monkeypatch.setattr(sources, "create_dataset", lambda name, **options: told.append((name, options)))
    section = {
        **SECTION, "root": "/d", "train_samples": 120, "val_samples": 37, "input_key": "img", "target_key": "fine",
        "class_map": {"a": 0},
    }  # fmt: skip
    options = {"input_key": "img", "target_key": "fine", "class_map": {"a": 0}, "download": False}
    keys = {"root": "/d", **options}
    open_split({**section, "name": "tfds/x"}, "train", seed=5, batch_size=8)
    stream = {"is_training": True, "num_samples": 120, "seed": 5, "batch_size": 8, "split": "train"}
    assert told.pop() == ("tfds/x", {**keys, **stream})
    hugging_face = pytest.importorskip("dinat.data.hugging_face")
    monkeypatch.setattr(hugging_face, "HuggingFaceStream", lambda name, root, **options: (name, root, options))
    stream |= {"is_training": False, "num_samples": 37, "seed": 0, "split": "validation"}
    reader = open_split({**section, "name": "hfids/x"}, "validation", batch_size=8).reader
    assert reader == ("x", "/d", {**options, **stream, "input_img_mode": ""})
    open_split({**section, "name": "hfds/x"}, "validation")
    assert told.pop() == ("hfds/x", {**keys, "split": "validation"})
    for download in (False, True):
        open_split({**section, "name": "torch/cifar10", "download": download}, "train")
        assert told.pop() == ("torch/cifar10", {"root": "/d", "split": "train", "download": download})


def test_digits_have_seventeen_grey_levels():
    """The data set's 0 to 16 are 0 to 255; both splits together are all of it."""
    train, validation = Digits("train"), Digits("validation")
    found = np.concatenate([np.stack([np.asarray(image)[..., 0] for image, _ in part]) for part in (train, validation)])
    levels = np.unique(found)
    assert (len(levels), levels[0], levels[8], levels[-1]) == (17, 0, 128, 255)
    originals = load_digits().images
    assert sorted(map(bytes, (found / (255 / 16)).round().astype(np.uint8))) == sorted(
        map(bytes, originals.astype(np.uint8))
    )
    assert torch.bincount(torch.tensor([digit for _, digit in validation])).min() >= 35
