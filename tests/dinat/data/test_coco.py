"""COCO files in their layouts, read exactly, and a message for each way in which they can be wrong."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dinat.data.coco import CocoObjects, CocoPanoptic, CocoSemantic
from dinat.errors import UserError

HEIGHT, WIDTH = 10, 14
CATEGORIES = [{"id": 90, "name": "bee"}, {"id": 7, "name": "ant"}, {"id": 12, "name": "cat"}]
CROWD = {"size": [HEIGHT, WIDTH], "counts": [20, 15, 105]}  # columns 2 and the upper half of 3, from the top down


def objects():
    """Two images with a square, a crowd and a triangle, and one without objects."""
    return {
        "images": [
            {"id": 31, "file_name": "a.png", "height": HEIGHT, "width": WIDTH},
            {"id": 5, "file_name": "b.png", "height": HEIGHT, "width": WIDTH},
            {"id": 8, "file_name": "empty.png", "height": HEIGHT, "width": WIDTH},
        ],
        "annotations": [
            {"id": 1, "image_id": 31, "category_id": 12, "bbox": [2, 3, 4, 5], "area": 99.0, "iscrowd": 0,
             "segmentation": [[2, 3, 6, 3, 6, 8, 2, 8]]},
            {"id": 2, "image_id": 31, "category_id": 7, "bbox": [2, 0, 2, 10], "area": 15.0, "iscrowd": 1,
             "segmentation": CROWD},
            {"id": 3, "image_id": 5, "category_id": 90, "bbox": [10, 4, 6, 3], "area": 9.0, "iscrowd": 0,
             "segmentation": [[10, 4, 13, 4, 13, 7]]},
        ],
        "categories": CATEGORIES,
    }  # fmt: skip


def pixels_of_segments(target):
    return [(target["panoptic"] == number).sum().item() for number in target["segment_ids"]]


def panoptic():
    """Two images: a thing beside stuff and void; a crowd."""
    categories = [{**category, "isthing": int(category["name"] != "cat")} for category in CATEGORIES]
    return {
        "images": objects()["images"][:2],
        "annotations": [
            {"image_id": 5, "file_name": "b.png", "segments_info": [{"id": 70000, "category_id": 90, "iscrowd": 1}]},
            {"image_id": 31, "file_name": "a.png", "segments_info": [
                {"id": 300, "category_id": 7}, {"id": 2, "category_id": 12, "iscrowd": 0}]},
        ],
        "categories": categories,
    }  # fmt: skip


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def colours(ids):
    return np.stack([ids % 256, ids // 256 % 256, ids // 256**2], 2)


def write(root, content, file="annotations/instances_train2017.json", images="train2017"):
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(content if isinstance(content, str) else json.dumps(content))
    for number, name in enumerate(("a.png", "b.png", "empty.png")):
        save(root / images / name, np.full((HEIGHT, WIDTH, 3), 10 * number))
    return root


def write_panoptic(root, content, ids=None):
    a = np.full((HEIGHT, WIDTH), 2)
    a[:5], a[0, 0] = 300, 0
    maps = {"a": a, "b": np.full((HEIGHT, WIDTH), 70000), **(ids or {})}
    for name, numbers in maps.items():
        save(root / f"annotations/panoptic_train2017/{name}.png", colours(numbers))
    return write(root, content, "annotations/panoptic_train2017.json")


@pytest.mark.parametrize(
    ("file", "images", "split"),
    [
        ("annotations/instances_train2017.json", "train2017", "train"),
        ("annotations/instances_val2017.json", "images/val2017", "validation"),
        ("annotations/train.json", "images/train", "train"),
        ("annotations/instances_train.json", "train", "train"),
        ("train/_annotations.coco.json", "train", "train"),
        ("valid/_annotations.coco.json", "valid", "validation"),
    ],
)
def test_layouts(tmp_path, file, images, split):
    source = CocoObjects(write(tmp_path, objects(), file, images), split)
    assert [source.filename(index) for index in range(len(source))] == ["a.png", "b.png", "empty.png"]
    assert source.filename(1, absolute=True) == str(tmp_path / images / "b.png")


def test_files_of_any_name(tmp_path):
    write(tmp_path, objects(), "labels/mine.json", "photos")
    assert len(CocoObjects(tmp_path, "train", annotations="labels/mine.json", images="photos")) == 3


def test_objects_are_read_exactly(tmp_path):
    source = CocoObjects(write(tmp_path, objects()), "train")
    assert source.classes == ["ant", "cat", "bee"]  # by id, without gaps
    assert source.category_ids == [7, 12, 90]
    image, target = source[0]
    assert (image.shape, image.dtype, int(image.max())) == ((3, HEIGHT, WIDTH), torch.uint8, 0)
    assert target["image_id"] == 31
    assert target["boxes"].tolist() == [[2, 3, 6, 8], [2, 0, 4, 10]]
    assert target["labels"].tolist() == [1, 0]
    assert target["iscrowd"].tolist() == [False, True]
    assert target["area"].tolist() == [99, 15]
    square, crowd = target["masks"]
    assert square[3:8, 2:6].all()
    assert square.sum() == 20
    assert crowd[:, 2].all()
    assert crowd[:5, 3].all()
    assert crowd.sum() == 15
    _, target = source[2]
    assert (target["boxes"].shape, target["masks"].shape, target["labels"].dtype) == (
        (0, 4),
        (0, HEIGHT, WIDTH),
        torch.int64,
    )


def test_boxes_over_the_edge_are_clamped_and_said(tmp_path, caplog):
    source = CocoObjects(write(tmp_path, objects()), "train")
    assert source[1][1]["boxes"].tolist() == [[10, 4, 14, 7]]
    assert "1 boxes are clamped to their image, the first:" in caplog.text
    assert "image b.png (id 5), annotation 3: box [10, 4, 6, 3] reaches over the edge" in caplog.text


def test_images_without_objects_can_be_left_out(tmp_path):
    content = objects()
    content["annotations"][2]["iscrowd"] = 1  # a crowd is no object
    source = CocoObjects(write(tmp_path, content), "train", keep_empty=False)
    assert [source.filename(index) for index in range(len(source))] == ["a.png"]


def test_boxes_alone(tmp_path):
    content = objects()
    for annotation in content["annotations"]:
        annotation["segmentation"] = []  # as Roboflow writes it
        del annotation["area"]
    _, target = CocoObjects(write(tmp_path, content), "train")[0]
    assert "masks" not in target
    assert target["area"].tolist() == [20, 20]


def test_labels_follow_the_training_classes(tmp_path):
    content = objects()
    content["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "bee"}, {"id": 3, "name": "ant"}]
    for annotation, number in zip(content["annotations"], (1, 3, 2), strict=True):
        annotation["category_id"] = number
    write(tmp_path, content, "annotations/instances_val.json", "val")
    source = CocoObjects(tmp_path, "validation", classes=["ant", "cat", "bee"])
    assert source[0][1]["labels"].tolist() == [1, 0]
    assert source.category_ids == [3, 1, 2]
    with pytest.raises(
        UserError, match=r"other classes than in training; only here: \['bee', 'cat'\], only there: \['x'\]"
    ):
        CocoObjects(tmp_path, "validation", classes=["ant", "x"])


def change(position, **values):
    """Objects with other values in one of the annotations, or without those that are None."""

    def changed():
        content = objects()
        entry = content["annotations"][position]
        entry.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del entry[key]
        return content

    return changed


def with_entries(**lists):
    return lambda: {**objects(), **lists}


FIRST = r"instances_train2017.json: image a.png \(id 31\), annotation 1: "
BAD = {
    "cut off": (lambda: '{"images": [', r"instances_train2017.json: not JSON, perhaps cut off: "),
    "no lists": (lambda: {"images": []}, "no list 'annotations', so not a COCO annotation file"),
    "image without a size": (
        with_entries(images=[{"id": 1, "file_name": "a.png"}]), "image 1: file_name, height and width are needed",
    ),
    "shared image id": (with_entries(images=objects()["images"] * 2), "2 images have the id 31"),
    "shared category id": (with_entries(categories=[*CATEGORIES, CATEGORIES[0]]), "2 categories have the id 90"),
    "shared name": (
        with_entries(categories=[*CATEGORIES, {"id": 1, "name": "ant"}]), "several categories are named ant",
    ),
    "category without name": (with_entries(categories=[{"id": 7}]), "category 7 has no name"),
    "shared annotation id": (change(1, id=1), "2 annotations have the id 1"),
    "unknown image": (change(0, image_id=6), r"image \? \(id 6\), annotation 1: there is no such image"),
    "id as text": (change(0, image_id="31"), r"image \? \(id '31'\), annotation 1: there is no such image"),
    "id of another kind": (change(0, image_id=[31]), r"image \? \(id \[31\]\), annotation 1: there is no such image"),
    "own id of another kind": (change(0, id=[1]), r"annotations: id \[1\] is not an integer"),
    "label as text": (change(0, category_id="12"), FIRST + "category_id '12' has no name in categories"),
    "label of another kind": (change(0, category_id=[12]), FIRST + r"category_id \[12\] has no name in categories"),
    "no labels": (with_entries(categories=[]), "instances_train2017.json: holds no categories"),
    "crowd as text": (change(0, iscrowd="0"), FIRST + "iscrowd '0' is neither 0 nor 1"),
    "area as text": (change(0, area="99"), FIRST + "area '99' is no number of pixels"),
    "negative area": (change(0, area=-1), FIRST + "area -1 is no number of pixels"),
    "area without a number": (change(0, area=float("nan")), FIRST + "area nan is no number of pixels"),
    "label without a name": (change(0, category_id=3), FIRST + "category_id 3 has no name in categories"),
    "no box": (change(0, bbox=None), FIRST + r"box None is not \[left, top, width, height\]"),
    "not numbers": (change(0, bbox=[1, 2, float("nan"), 3]), FIRST + "box .* is not"),
    "negative size": (change(0, bbox=[2, 3, -1, 5]), FIRST + r"box \[2, 3, -1, 5\] has a negative size"),
    "outside": (
        change(0, bbox=[14, 3, 2, 5]), FIRST + r"box \[14, 3, 2, 5\] lies outside of the image of 14 x 10 pixels",
    ),
    "outside to the left": (change(0, bbox=[-2, 3, 2, 5]), FIRST + r"box \[-2, 3, 2, 5\] lies outside of the image"),
    "two points": (
        change(0, segmentation=[[2, 3, 6, 3]]), FIRST + r"polygon \[2, 3, 6, 3\] has fewer than three points",
    ),
    "mask of another size": (
        change(0, segmentation={"size": [4, 5], "counts": [20]}), FIRST + "its mask has 5 x 4 pixels, the image 14 x",
    ),
    "no mask at all": (change(0, segmentation=True), FIRST + "polygon True has fewer than three points"),
    "mask without counts": (
        change(0, segmentation={"size": [HEIGHT, WIDTH], "counts": None}), FIRST + "its segmentation is",
    ),
    "fractions of pixels": (
        change(0, segmentation={"size": [HEIGHT, WIDTH], "counts": [1.5, 138.5]}), FIRST + "its segmentation is",
    ),
    "no mask": (change(0, segmentation=[]), FIRST + "has no segmentation, where others have one"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_said_before_training(tmp_path, content, message):
    with pytest.raises(UserError) as error:
        CocoObjects(write(tmp_path, content()), "train")
    assert re.search(message, str(error.value)), error.value
    assert str(tmp_path / "annotations/instances_train2017.json") in str(error.value)


def test_what_is_bad_is_failed_or_skipped(tmp_path):
    with pytest.raises(UserError, match=r"data\.kwargs\.on_bad=ignore: must be fail or skip\."):
        CocoObjects(write(tmp_path, objects()), "train", on_bad="ignore")


def test_hidden_files_are_not_missed_in_a_file(tmp_path, caplog):
    write(tmp_path, objects())
    save(tmp_path / "train2017/._a.png", np.zeros((2, 2)))
    save(tmp_path / "train2017/d.png", np.zeros((2, 2)))
    with caplog.at_level("INFO", "dinat"):
        CocoObjects(tmp_path, "train")
    assert f"{tmp_path}/train2017: 1 images are not in" in caplog.text


def test_what_is_wrong_can_be_left_out_and_is_said(tmp_path, caplog):
    content = objects()
    content["annotations"][0]["bbox"] = [2, 3, -1, 5]
    write(tmp_path, content)
    (tmp_path / "train2017/b.png").unlink()
    with pytest.raises(UserError, match=r"b.png \(id 5\): there is no file .*train2017/b.png"):
        CocoObjects(tmp_path, "train")
    source = CocoObjects(tmp_path, "train", on_bad="skip")
    assert [source.filename(index) for index in range(len(source))] == ["a.png", "empty.png"]
    assert source[0][1]["labels"].tolist() == [0]
    assert "left out, 2 in all" in caplog.text
    assert "has a negative size" in caplog.text


def test_objects_without_area_are_left_out_and_said(tmp_path, caplog):
    """As annotation 918 of COCO's train2017, whose polygon is a line."""
    content = objects()
    content["annotations"][0] |= {"bbox": [2.65, 3.33, 1.03, 0.0], "area": 0.0}
    content["annotations"][0]["segmentation"] = [[2.65, 3.33, 2.65, 3.33, 3.68, 3.33, 3.68, 3.33]]
    source = CocoObjects(write(tmp_path, content), "train")
    assert source[0][1]["labels"].tolist() == [0]
    assert "1 objects without area are left out, the first: " in caplog.text
    assert re.search(FIRST + r"box \[2.65, 3.33, 1.03, 0.0\] has no area", caplog.text)


def test_the_map_of_segments(tmp_path):
    """The first five rows are an ant but for void in the corner, the others a cat; a crowd has its class too."""
    source = CocoSemantic(write_panoptic(tmp_path, panoptic()), "train")
    assert source.classes == ["ant", "cat", "bee"]
    expected = np.full((HEIGHT, WIDTH), 1)
    expected[:5], expected[0, 0] = 0, 255
    assert source[0][1].keys() == {"semantic", "image_id"}
    assert source[0][1]["semantic"].tolist() == expected.tolist()
    assert source[1][1]["semantic"].unique().tolist() == [2]
    content = panoptic()
    content["categories"] += [{"id": 100 + i, "name": f"class {i}", "isthing": 0} for i in range(253)]
    with pytest.raises(UserError, match="256 classes: at most 255 fit into a map of bytes"):
        CocoSemantic(write_panoptic(tmp_path, content), "train")


def test_the_file_of_exactly_that_name_is_the_one(tmp_path):
    """As beside the first hundred images of val2017 that detectron2 tests with."""
    content = objects()
    write(tmp_path, content, "annotations/instances_train2017.json")
    part = {**content, "images": content["images"][:1], "annotations": []}
    (tmp_path / "annotations/instances_train2017_100.json").write_text(json.dumps(part))
    with pytest.raises(UserError, match=r"several .*_train2017_100\.json\. .*data\.val_split=train2017\."):
        CocoObjects(tmp_path, "train")
    assert len(CocoObjects(tmp_path, "train2017")) == len(content["images"])


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UserError, match=r"train: no annotation file\. Looked for .*SPLIT = train, training"):
        CocoObjects(tmp_path, "train")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        CocoObjects(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"annotation file: not found. Looked for .*mine.json"):
        CocoObjects(tmp_path, "train", annotations="mine.json")
    write(tmp_path, objects(), images="elsewhere")
    with pytest.raises(UserError, match=r"folder of images for .*: not found. Looked for .*train2017, "):
        CocoObjects(tmp_path, "train")
    write(tmp_path, objects(), "annotations/instances_train2014.json")
    with pytest.raises(
        UserError, match=r"several annotation files for train: instances_train2014.json, instances_train2017"
    ):
        CocoObjects(tmp_path, "train")


def test_what_only_the_pixels_tell_is_said_when_they_are_read(tmp_path):
    content = objects()
    content["annotations"][1]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [20, 15]}
    source = CocoObjects(write(tmp_path, content), "train")
    with pytest.raises(ValueError, match=r"image a.png \(id 31\), annotation 2: .* decoded 35 pixels but expected 140"):
        source[0]
    save(tmp_path / "train2017/b.png", np.zeros((5, 6, 3)))
    with pytest.raises(ValueError, match=r"image b.png \(id 5\): has 6 x 5 pixels, stated are 14 x 10"):
        source[1]


def test_panoptic_segments_are_read_exactly(tmp_path):
    source = CocoPanoptic(write_panoptic(tmp_path, panoptic()), "train")
    assert (source.classes, source.things) == (["ant", "cat", "bee"], [True, False, True])
    assert source.category_ids == [7, 12, 90]
    image, target = source[0]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert target["segment_ids"].tolist() == [300, 2]
    assert target["labels"].tolist() == [0, 1]
    assert pixels_of_segments(target) == [69, 70]
    assert target["panoptic"].dtype == torch.int32
    assert target["panoptic"][0, :2].tolist() == [0, 300]
    _, target = source[1]
    assert target["iscrowd"].tolist() == [True]
    assert target["segment_ids"].tolist() == [70000]
    assert pixels_of_segments(target) == [HEIGHT * WIDTH]


def segments(position, *infos):
    def changed():
        content = panoptic()
        content["annotations"][position]["segments_info"] = list(infos)
        return content

    return changed


def annotations(*kept, **values):
    def changed():
        content = panoptic()
        content["annotations"] = [{**content["annotations"][index], **values} for index in kept]
        return content

    return changed


ANT, B = {"id": 9, "category_id": 7}, r"panoptic_train2017.json: image b.png \(id 5\): "
BAD_PANOPTIC = {
    "crowd as text": (segments(0, {**ANT, "iscrowd": "0"}), B + "segment 9: iscrowd '0' is neither 0 nor 1"),
    "shared segment id": (segments(0, ANT, ANT), B + "several segments have the id 9"),
    "unknown class": (segments(0, {"id": 9, "category_id": 4}), B + "segment 9: category_id 4 has no name"),
    "id of void": (segments(0, {"id": 0, "category_id": 7}), B + "segment 0: ids are from 1 to 16777215"),
    "no segments": (annotations(0, 1, segments_info=None), B + "its segments_info is not a list"),
    "no annotation": (annotations(0), r"image a.png \(id 31\): has no annotation"),
    "twice": (annotations(0, 1, 1), "2 annotations have the image_id 31"),
    "unknown image": (
        lambda: {**panoptic(), "annotations": [{"image_id": 4}]},
        r"image \? \(id 4\): there is no such image",
    ),
    "no PNG": (annotations(0, 1, file_name="c.png"), B + "there is no file .*panoptic_train2017/c.png"),
    "no isthing": (lambda: {**panoptic(), "categories": CATEGORIES}, "category ant does not say isthing, 0 or 1"),
}


@pytest.mark.parametrize(("content", "message"), BAD_PANOPTIC.values(), ids=BAD_PANOPTIC)
def test_what_is_wrong_with_segments_is_said_before_training(tmp_path, content, message):
    with pytest.raises(UserError) as error:
        CocoPanoptic(write_panoptic(tmp_path, content()), "train")
    assert re.search(message, str(error.value)), error.value


def test_segments_and_their_png_must_agree(tmp_path):
    source = CocoPanoptic(write_panoptic(tmp_path, panoptic(), {"a": np.full((HEIGHT, WIDTH), 300)}), "train")
    with pytest.raises(ValueError, match=r"image a.png \(id 31\): segment 2 has no pixel in .*a.png"):
        source[0]
    write_panoptic(tmp_path, panoptic(), {"b": np.full((HEIGHT, WIDTH), 8)})
    with pytest.raises(ValueError, match=r"image b.png \(id 5\): .*b.png has the id 8, which no segment has"):
        source[1]
    write_panoptic(tmp_path, panoptic(), {"b": np.full((3, 4), 70000)})
    with pytest.raises(ValueError, match=r"b.png has 4 x 3 pixels, the image 14 x 10"):
        source[1]
    save(tmp_path / "annotations/panoptic_train2017/b.png", np.zeros((HEIGHT, WIDTH)))
    with pytest.raises(ValueError, match=r"b.png: segment ids are colours; this image has mode L"):
        source[1]
