"""Folders of images and masks: layouts, palettes, ADE20K's numbering, and a message for what is wrong."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinat.data.masks import SemanticFolder
from dinat.errors import UserError

LABELS = np.array([[0, 0, 1], [2, 255, 1]], np.uint8)


def save(path, pixels, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels))
    if palette:
        image = image.convert("P")
        image.putdata(np.asarray(pixels).flatten().tolist())
        image.putpalette([200, 10, 10] * 256)
    image.save(path)


def write(root, images="images/train", masks="annotations/train", labels=LABELS, names="ant\nbee\n\ncat\n", **options):
    for number, name in enumerate(("b", "sub/a")):
        save(root / images / f"{name}.jpg", np.full((2, 3, 3), 50 * number, np.uint8))
        save(root / masks / f"{name}.png", labels, **options)
    if names:
        (root / "classes.txt").write_text(names)
    return root


@pytest.mark.parametrize(
    ("images", "masks", "split"),
    [
        ("images/train", "annotations/train", "train"),
        ("images/training", "annotations/training", "train"),  # ADE20K
        ("images/validation", "masks/validation", "validation"),
        ("train/images", "train/masks", "train"),
        ("val/images", "val/labels", "validation"),
    ],
)
def test_layouts(tmp_path, images, masks, split):
    source = SemanticFolder(write(tmp_path, images, masks), split)
    assert source.classes == ["ant", "bee", "cat"]
    assert [source.filename(index) for index in range(len(source))] == ["b.jpg", "sub/a.jpg"]
    image, target = source[1]
    assert (image.shape, image.dtype) == ((3, 2, 3), torch.uint8)
    assert abs(float(image.float().mean()) - 50) < 2
    assert target["semantic"].tolist() == LABELS.tolist()
    assert (target["semantic"].dtype, target["image_id"]) == (torch.uint8, 1)


def test_folders_of_any_name(tmp_path):
    source = SemanticFolder(write(tmp_path, "photos", "truth"), "train", images="photos", masks="truth")
    assert len(source) == 2


@pytest.mark.parametrize("options", [{"palette": True}, {"labels": LABELS.astype(np.uint16)}])
def test_masks_are_read_as_numbers(tmp_path, options):
    assert SemanticFolder(write(tmp_path, **options), "train")[0][1]["semantic"].tolist() == LABELS.tolist()


def test_ade20k_counts_from_one(tmp_path):
    write(tmp_path, labels=np.array([[0, 1, 2], [3, 3, 0]], np.uint8), names=None)
    table = "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t10\t2\tant\n2\t0.1\t10\t2\tbee, honey bee\n3\t0.1\t10\t2\tcat\n"
    (tmp_path / "objectInfo150.txt").write_text(table)
    source = SemanticFolder(tmp_path, "train", reduce_zero_label=True)
    assert source.classes == ["ant", "bee, honey bee", "cat"]
    assert source[0][1]["semantic"].tolist() == [[255, 0, 1], [2, 2, 255]]


def test_another_value_can_be_ignored(tmp_path):
    write(tmp_path, labels=np.array([[0, 1, 77], [2, 2, 0]], np.uint8))
    assert SemanticFolder(tmp_path, "train", ignore_label=77)[0][1]["semantic"].tolist() == [[0, 1, 255], [2, 2, 0]]


def test_values_without_a_name_are_refused(tmp_path):
    source = SemanticFolder(write(tmp_path), "train", classes=["ant", "bee"])
    with pytest.raises(ValueError, match=r"annotations/train/b.png: 1 pixels have the value 2; of 2 classes"):
        source[0]
    source = SemanticFolder(tmp_path, "train", ignore_label=None)
    with pytest.raises(ValueError, match="have the value 255"):
        source[0]


def test_a_mask_of_another_size_or_in_colours_is_refused(tmp_path):
    source = SemanticFolder(write(tmp_path), "train")
    save(tmp_path / "annotations/train/b.png", LABELS[:, :2])
    with pytest.raises(ValueError, match=r"b.png: has 2 x 2 pixels, its image .*b.jpg 3 x 2"):
        source[0]
    save(tmp_path / "annotations/train/b.png", np.stack([LABELS] * 3, 2))
    with pytest.raises(ValueError, match=r"b.png: a mask has one number per pixel; this image has mode RGB"):
        source[0]


def test_images_and_masks_come_in_pairs(tmp_path):
    write(tmp_path)
    (tmp_path / "annotations/train/b.png").unlink()
    with pytest.raises(UserError, match=r"images/train/b.jpg: has no mask of the same name \(1 such files\)"):
        SemanticFolder(tmp_path, "train")
    save(tmp_path / "annotations/train/b.png", LABELS)
    save(tmp_path / "annotations/train/c.png", LABELS)
    with pytest.raises(UserError, match=r"annotations/train/c.png: has no image"):
        SemanticFolder(tmp_path, "train")


def test_hidden_files_are_no_data_and_others_are_said(tmp_path, caplog):
    """Jupyter copies an image with its mask; macOS writes a second file beside each one into archives."""
    write(tmp_path)
    for folder, ending in (("images/train", "jpg"), ("annotations/train", "png")):
        save(tmp_path / folder / ".ipynb_checkpoints" / f"b.{ending}", LABELS)
        save(tmp_path / folder / f"._b.{ending}", LABELS)
    (tmp_path / "images/train/notes.txt").write_text("words")
    with caplog.at_level("INFO", "dinat"):
        source = SemanticFolder(tmp_path, "train")
    assert [source.filename(index) for index in range(len(source))] == ["b.jpg", "sub/a.jpg"]
    assert caplog.messages == [f"{tmp_path}/images/train: 1 file is left out with other endings: 1 .txt"]


def test_names_are_utf_8(tmp_path):
    write(tmp_path, names=None)
    (tmp_path / "classes.txt").write_bytes("\ufeffgrün\n猫\nx".encode())  # with the mark that Windows writes
    assert SemanticFolder(tmp_path, "train").classes == ["grün", "猫", "x"]
    (tmp_path / "classes.txt").write_bytes("rot\ngrün".encode("latin-1"))
    with pytest.raises(UserError, match=r"classes.txt: not UTF-8: .* at byte 6\. Save it as that\."):
        SemanticFolder(tmp_path, "train")


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (None, {}, "names of the classes, one per line (or set data.kwargs.classes): not found. Looked for"),
        ("ant\nbee\nant\n", {}, "classes.txt: several classes are named ant."),
        ("\n", {}, "classes.txt: no names of classes."),
        ("ant\nbee\n", {"ignore_label": 1}, "kwargs.ignore_label=1: is the value of a class; there are 2 from 0 on."),
        ("ant", {"masks": "elsewhere"}, "train: folder of masks: not found. Looked for"),
        ("ant", {"images": "elsewhere"}, "train: folder of images: not found. Looked for"),
    ],
)
def test_what_is_wrong_is_said_before_training(tmp_path, names, options, message):
    write(tmp_path, names=names)
    with pytest.raises(UserError) as error:
        SemanticFolder(tmp_path, "train", **options)
    assert message in str(error.value)
