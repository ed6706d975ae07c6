"""Reading MedMNIST's files: generated ones of each kind, and what may be wrong with one."""

import hashlib
import logging
import shutil

import numpy as np
import pytest
import torch

from dinat.data import class_to_idx, medmnist, open_split
from dinat.errors import UserError

SECTION = {
    "name": None,
    "root": None,
    "train_split": "train",
    "val_split": "val",
    "test_split": "test",
    "download": False,
}
COUNTS = {"train": 6, "val": 4, "test": 5}


def arrays(name: str, size: int = 28) -> dict[str, np.ndarray]:
    """The arrays of a set as published, but for their lengths."""
    facts, draw = medmnist.known_sets()[name], np.random.default_rng(0)
    sides = (size,) * (3 if name.endswith("3d") else 2) + ((3,) if facts["channels"] == 3 else ())
    several = facts["task"].startswith("multi-label")
    found = {}
    for part, count in COUNTS.items():
        found[f"{part}_images"] = draw.integers(0, 256, (count, *sides)).astype(np.uint8)
        classes, columns = (2, len(facts["classes"])) if several else (len(facts["classes"]), 1)
        found[f"{part}_labels"] = draw.integers(0, classes, (count, columns)).astype(np.uint8)
    return found


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Writes a set's file, and has its MD5 be the published one."""

    def published(name: str, size: int = 28, **changed: np.ndarray | None) -> dict[str, np.ndarray]:
        content = {key: value for key, value in {**arrays(name, size), **changed}.items() if value is not None}
        file = tmp_path / (f"{name}.npz" if size == 28 else f"{name}_{size}.npz")
        np.savez_compressed(file, **content)
        digest = hashlib.md5(file.read_bytes()).hexdigest()
        monkeypatch.setitem(medmnist.known_sets()[name]["md5"], size, digest)
        return content

    return published


def section(folder, name: str, **changed) -> dict:
    return {**SECTION, "root": str(folder), "name": name, **changed}


@pytest.mark.parametrize(
    ("name", "size", "classes"),
    [
        ("pathmnist", 64, 9),
        ("breastmnist", 28, 2),
        ("retinamnist", 28, 5),
        ("chestmnist", 28, 14),
        ("organmnist3d", 28, 11),
    ],
)
def test_a_set_of_each_kind(name, size, classes, published, tmp_path):
    content = published(name, size)
    data = section(tmp_path, f"medmnist/{name}@{size}")
    for split, part in (("train", "train"), ("validation", "val"), ("test", "test")):
        opened = open_split(data, split)
        assert len(opened) == COUNTS[part]
        assert isinstance(opened.images, np.memmap)
        assert list(class_to_idx(opened).values()) == list(range(classes))
        for (image, target), pixels, label in zip(
            opened, content[f"{part}_images"], content[f"{part}_labels"], strict=True
        ):
            assert np.array_equal(np.asarray(image), pixels)
            assert np.array_equal(np.atleast_1d(target), label)
    assert opened.volumes == name.endswith("3d")
    assert opened.label_kind == ("multi_hot" if name == "chestmnist" else None)


def test_unpacked_once(published, tmp_path, monkeypatch):
    """The file is needed no more then, nor read again."""
    published("bloodmnist")
    open_split(section(tmp_path, "medmnist/bloodmnist"), "train")
    (tmp_path / "bloodmnist.npz").unlink()
    monkeypatch.setattr(medmnist, "unpack", lambda *_: pytest.fail("unpacked again"))
    assert len(open_split(section(tmp_path, "medmnist/bloodmnist@28"), "validation")) == 4


def test_licences_are_shown(published, tmp_path, caplog):
    caplog.set_level(logging.INFO, "dinat")
    for name in ("dermamnist", "nodulemnist3d"):
        published(name)
        open_split(section(tmp_path, f"medmnist/{name}"), "train")
    assert "medmnist/dermamnist, train: 6 images, licence CC BY-NC 4.0 (non-commercial use only)" in caplog.text
    assert "medmnist/nodulemnist3d, train: 6 volumes, licence CC BY 4.0\n" in caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            dict(val_labels=None),
            r"bloodmnist\.npz: lacks val_labels; it holds test_images, test_labels, train_images, ",
        ),
        (
            dict(val_images=np.zeros((4, 32, 32, 3), np.uint8)),
            r"val_images is uint8 \(4, 32, 32, 3\), not uint8 \(4, 28, ",
        ),
        (
            dict(val_images=np.zeros((4, 28, 28), np.uint8)),
            r"val_images is uint8 \(4, 28, 28\), not uint8 \(4, 28, 28, 3\)",
        ),
        (dict(val_images=np.zeros((4, 28, 28, 3))), r"val_images is float64 .*, not uint8 \(4, 28, 28, 3\)"),
        (dict(val_labels=np.zeros((4, 2), np.uint8)), r"val_labels is uint8 \(4, 2\), not \(4, 1\)"),
        (dict(val_labels=np.zeros((5, 1), np.uint8)), r"val_labels is uint8 \(5, 1\), not \(4, 1\)"),
    ],
)
def test_what_a_file_may_lack(changed, message, published, tmp_path):
    published("bloodmnist", **changed)
    with pytest.raises(UserError, match=message):
        open_split(section(tmp_path, "medmnist/bloodmnist"), "validation")


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("medmnist/bloodmist", {}, r"data\.name=medmnist/bloodmist: no such set\. .* Did you mean bloodmnist"),
        ("medmnist/organmnist3d@128", {}, r"organmnist3d has the sizes 28, 64\."),
        ("medmnist/bloodmnist", {"val_split": "validation"}, r"no split 'validation' in .* It has train, val, test\."),
        ("medmnist/bloodmnist", {"root": None}, r"data\.root is not set"),
        (
            "medmnist/bloodmnist",
            {"root": "/nowhere"},
            r"data\.root: /nowhere is no folder, bloodmnist\.npz should be in it",
        ),
        (
            "medmnist/bloodmnist@64",
            {},
            r"bloodmnist_64\.npz: no such file\. data\.download=true fetches it from https://zenodo\.org/records/10519652/",
        ),
        ("medmnist_c/bloodmnist", {"val_split": "test"}, r"which corruption\? Write medmnist_c/bloodmnist/CORRUPTION"),
        ("medmnist_c/bloodmnist/pixelate", {}, r"no split 'val' in .* It has test\."),
        (
            "medmnist_c/bloodmnist/pixelate",
            {"val_split": "test"},
            r"pixelate\.npz: no such file\. The package medmnistc makes it|bloodmnist is no folder",
        ),
    ],
)
def test_what_there_is_not(name, changed, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_split(section(tmp_path, name, **changed), "validation")


def test_another_file_than_the_published_one(published, tmp_path, monkeypatch):
    published("bloodmnist")
    monkeypatch.setitem(medmnist.known_sets()["bloodmnist"]["md5"], 28, "0" * 32)
    with pytest.raises(UserError, match=r"bloodmnist\.npz: its MD5 is [0-9a-f]{32}, not 0{32} as published"):
        open_split(section(tmp_path, "medmnist/bloodmnist"), "train")
    assert not (tmp_path / "bloodmnist").exists()
    published("bloodmnist")
    open_split(section(tmp_path, "medmnist/bloodmnist"), "train")
    monkeypatch.setitem(medmnist.known_sets()["bloodmnist"]["md5"], 28, "1" * 32)
    with pytest.raises(UserError, match="was unpacked from a file of MD5"):
        open_split(section(tmp_path, "medmnist/bloodmnist"), "train")
    (tmp_path / "retinamnist.npz").write_text("<html>")
    digest = hashlib.md5(b"<html>").hexdigest()
    monkeypatch.setitem(medmnist.known_sets()["retinamnist"]["md5"], 28, digest)
    with pytest.raises(UserError, match=r"retinamnist\.npz: not a \.npz file"):
        open_split(section(tmp_path, "medmnist/retinamnist"), "train")


def test_download(published, tmp_path, monkeypatch):
    published("bloodmnist")
    shutil.move(tmp_path / "bloodmnist.npz", tmp_path / "server.npz")
    asked = []

    def fetch(url, target):
        asked.append(url)
        shutil.copy(tmp_path / "server.npz", target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    data = section(tmp_path, "medmnist/bloodmnist", download=True)
    assert [len(open_split(data, split)) for split in ("train", "validation")] == [6, 4]
    assert asked == ["https://zenodo.org/records/10519652/files/bloodmnist.npz?download=1"]

    def fail(*_):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(
        UserError, match=r"pathmnist\.npz: cannot be fetched from .*: no route to host\. Put it there by"
    ):
        open_split(section(tmp_path, "medmnist/pathmnist", download=True), "train")


def test_corrupted(tmp_path):
    """Five severities, one after the other, of 224 pixels."""
    (tmp_path / "breastmnist").mkdir()
    images, labels = np.full((10, 224, 224), 7, np.uint8), np.tile([[0], [1]], (5, 1)).astype(np.uint8)
    np.savez(tmp_path / "breastmnist" / "pixelate.npz", test_images=images, test_labels=labels)
    opened = open_split(section(tmp_path, "medmnist_c/breastmnist/pixelate", val_split="test"), "validation")
    assert [target for _, target in opened] == [0, 1] * 5
    assert opened[9][0].size == (224, 224)
