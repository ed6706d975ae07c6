"""ADE20K, Cityscapes and Mapillary Vistas in the folders that people have, each generated in the exact format."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinat.classes import CITYSCAPES
from dinat.data.ade20k import Ade20kInstances, Ade20kPanoptic, Ade20kSemantic
from dinat.data.cityscapes import CityscapesInstances, CityscapesPanoptic, CityscapesSemantic
from dinat.data.mapillary import MapillaryPanoptic, MapillarySemantic
from dinat.errors import UserError
from dinat.metrics.detection import DetectionMetric

HEIGHT, WIDTH = 6, 8


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def photograph(path):
    save(path, np.full((HEIGHT, WIDTH, 3), 80, np.uint8))


def colours(ids):
    return np.stack([ids % 256, ids // 256 % 256, ids // 256**2], 2).astype(np.uint8)


def pixels_of_segments(target):
    return [(target["panoptic"] == number).sum().item() for number in target["segment_ids"]]


def halves(left, right, dtype=np.uint8):
    """A map of two columns of the same width."""
    values = np.full((HEIGHT, WIDTH), left, dtype)
    values[:, WIDTH // 2 :] = right
    return values


def box_record(number, image, category, left, top, width, height):
    corners = [left, top, left + width, top, left + width, top + height, left, top + height]
    return {
        "id": number, "image_id": image, "category_id": category, "bbox": [left, top, width, height],
        "area": width * height, "iscrowd": 0, "segmentation": [corners],
    }  # fmt: skip


@pytest.fixture(scope="module")
def ade20k(tmp_path_factory):
    """Two images: "other" beside the class 150; a bed, id 7, over a wall, id 0, that covers a floor, id 3."""
    root = tmp_path_factory.mktemp("ADEChallengeData2016")
    names = [f"class {i}" for i in range(150)]
    rows = [f"{i + 1}\t0.01\t10\t2\t{name}" for i, name in enumerate(names)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
    for split, short in (("training", "train"), ("validation", "val")):
        ids = [f"ADE_{short}_0000000{i}" for i in (1, 2)]
        for image in ids:
            photograph(root / "images" / split / f"{image}.jpg")
            save(root / "annotations" / split / f"{image}.png", halves(0, 150))
            save(root / f"ade20k_panoptic_{short}" / f"{image}.png", colours(halves(1, 7, np.int64)))
        images = [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in ids]
        things = [{"id": 7, "name": "bed"}, {"id": 149, "name": "flag"}]
        objects = [box_record(1, ids[1], 149, 1, 2, 3, 4), box_record(2, ids[0], 7, 0, 0, 4, 6)]
        content = {"images": images, "categories": things[::-1], "annotations": objects}
        (root / f"ade20k_instance_{short}.json").write_text(json.dumps(content))
        segments = [{"id": 1, "category_id": 0}, {"id": 3, "category_id": 3}, {"id": 7, "category_id": 7}]
        annotations = [{"image_id": i, "file_name": f"{i}.png", "segments_info": segments} for i in ids]
        categories = [{"id": i, "name": name, "isthing": int(i == 7)} for i, name in enumerate(names)]
        content = {"images": images, "categories": categories, "annotations": annotations}
        (root / f"ade20k_panoptic_{short}.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("split", ["train", "validation"])
def test_ade20k(ade20k, split):
    source = Ade20kSemantic(ade20k, split)
    assert (len(source), source.classes[::149]) == (2, ["class 0", "class 149"])
    assert source[0][1]["semantic"].tolist() == halves(255, 149).tolist()
    source = Ade20kInstances(ade20k, split)
    assert (source.classes, source.category_ids) == (["bed", "flag"], [7, 149])
    _, target = source[1]
    assert (target["labels"].tolist(), target["boxes"].tolist()) == ([1], [[1, 2, 4, 6]])
    assert target["image_id"].endswith("_00000002")


def test_segments_of_ade20k_that_are_covered_stay(ade20k):
    """As in COCO's protocol, which counts them as missed."""
    source = Ade20kPanoptic(ade20k, "validation")
    assert [i for i, thing in enumerate(source.things) if thing] == [7]
    _, target = source[0]
    assert target["labels"].tolist() == [0, 3, 7]
    assert pixels_of_segments(target) == [24, 0, 24]


def test_images_with_names_for_ids_are_scored(ade20k):
    metric = DetectionMetric(["bed", "flag"])
    targets = [target for _, target in Ade20kInstances(ade20k, "validation")]
    metric.update([target | {"scores": torch.tensor([0.9])} for target in targets], targets)
    assert metric.compute()["mask_ap"] == 100


STEM = "aachen_000000_000019"
CAR_2, GROUP_OF_CARS, CARAVAN, ROAD = 26002, 26, 29000, 7


def city(root, ids, stem=STEM, split="val"):
    """An image of Cityscapes with these instance ids."""
    name = f"{stem.partition('_')[0]}/{stem}"
    photograph(root / "leftImg8bit" / split / f"{name}_leftImg8bit.png")
    truth = root / "gtFine" / split
    save(truth / f"{name}_gtFine_instanceIds.png", ids.astype(np.uint16))
    save(truth / f"{name}_gtFine_labelIds.png", np.where(ids < 1000, ids, ids // 1000).astype(np.uint8))
    save(truth / f"{name}_gtFine_color.png", np.zeros((HEIGHT, WIDTH, 4), np.uint8))
    (truth / f"{name}_gtFine_polygons.json").write_text("{}")


@pytest.fixture
def cityscapes(tmp_path):
    """A road with a car, a group of cars and a caravan, a corner out of the region of interest; a sky."""
    ids = np.full((HEIGHT, WIDTH), ROAD)
    ids[1:3, 2:5], ids[4, 6], ids[5, :2], ids[0, 0] = CAR_2, GROUP_OF_CARS, CARAVAN, 3
    city(tmp_path, ids)
    city(tmp_path, np.full((HEIGHT, WIDTH), 23), "ulm_000001_000019")
    return tmp_path


def test_cityscapes_labels_are_train_ids(cityscapes):
    source = CityscapesSemantic(cityscapes, "validation")
    assert (source.classes[0], source.classes[13], source.classes[-1], len(source.classes)) == (
        "road", "car", "bicycle", 19,
    )  # fmt: skip
    expected = np.zeros((HEIGHT, WIDTH), int)
    expected[1:3, 2:5], expected[4, 6], expected[5, :2], expected[0, 0] = 13, 13, 255, 255
    assert source[0][1]["semantic"].tolist() == expected.tolist()
    assert source[1][1]["semantic"].unique().tolist() == [10]
    assert source.filename(1) == "ulm/ulm_000001_000019_leftImg8bit.png"


def test_cityscapes_instances(cityscapes):
    source = CityscapesInstances(cityscapes, "val")
    assert source.classes == ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    assert source.category_ids == [24, 25, 26, 27, 28, 31, 32, 33]
    image, target = source[0]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert target["labels"].tolist() == [2, 2]
    assert target["iscrowd"].tolist() == [True, False]
    assert target["boxes"].tolist() == [[6, 4, 7, 5], [2, 1, 5, 3]]
    assert target["masks"].sum((1, 2)).tolist() == target["area"].tolist() == [1, 6]
    _, target = source[1]
    assert (target["boxes"].shape, target["masks"].shape) == ((0, 4), (0, HEIGHT, WIDTH))


def test_cityscapes_panoptic(cityscapes):
    """As createPanopticImgs writes it: ids are names, and the names of images are not theirs."""
    images = [{"id": STEM, "width": WIDTH, "height": HEIGHT, "file_name": f"{STEM}_gtFine_leftImg8bit.png"}]
    segments = [{"id": 7, "category_id": 7, "iscrowd": 0}, {"id": CAR_2, "category_id": 26, "iscrowd": 0}]
    categories = [
        {"id": number, "name": name, "isthing": int(thing)}
        for number, name, thing in zip(CITYSCAPES.ids, CITYSCAPES.names, CITYSCAPES.things, strict=True)
    ]
    annotations = [{"image_id": STEM, "file_name": f"{STEM}_gtFine_panoptic.png", "segments_info": segments}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (cityscapes / "gtFine" / "cityscapes_panoptic_val.json").write_text(json.dumps(content))
    save(cityscapes / f"gtFine/cityscapes_panoptic_val/{STEM}_gtFine_panoptic.png", colours(halves(7, CAR_2, int)))
    source = CityscapesPanoptic(cityscapes, "validation")
    assert source.classes == list(CITYSCAPES.names)
    assert sum(source.things) == 8
    assert source.filename(0) == f"aachen/{STEM}_leftImg8bit.png"
    _, target = source[0]
    assert (target["labels"].tolist(), target["segment_ids"].tolist()) == ([0, 13], [7, CAR_2])
    assert pixels_of_segments(target) == [24, 24]


def test_what_is_wrong_with_cityscapes(cityscapes):
    truth = cityscapes / "gtFine/val/ulm/ulm_000001_000019_gtFine_instanceIds.png"
    save(truth, np.full((HEIGHT, WIDTH), 50, np.uint16))
    with pytest.raises(ValueError, match=r"ulm_000001_000019_gtFine_instanceIds.png: has the value 50, which is no"):
        CityscapesInstances(cityscapes, "val")[1]
    truth.unlink()
    with pytest.raises(UserError, match=r"ulm/ulm_000001_000019_leftImg8bit.png: has no mask of the same name"):
        CityscapesInstances(cityscapes, "val")
    with pytest.raises(UserError, match=r"train: folder of images: not found. Looked for .*leftImg8bit/train, "):
        CityscapesSemantic(cityscapes, "train")
    for reader in (CityscapesSemantic, CityscapesInstances):
        with pytest.raises(UserError, match=r"Cityscapes has other classes than in training: .*'car'.*not \['ant'\]"):
            reader(cityscapes, "val", classes=["ant"])


@pytest.mark.parametrize(("folder", "config"), [("v1.2/", "config_v1.2.json"), ("", "config.json")])
def test_mapillary(tmp_path, folder, config):
    """Two classes, one that is not evaluated between them, and "unlabeled" at the end."""
    labels = [("Bird", True), ("Ground", False), ("Sky", True), ("Unlabeled", False)]
    content = {"labels": [{"readable": name, "name": "x", "evaluate": use, "instances": False} for name, use in labels]}
    (tmp_path / config).write_text(json.dumps(content))
    photograph(tmp_path / "validation/images/0a_-B.jpg")
    save(tmp_path / f"validation/{folder}labels/0a_-B.png", np.array([[0, 1, 2, 3] * 2] * HEIGHT, np.uint8))
    source = MapillarySemantic(tmp_path, "validation")
    assert source.classes == ["Bird", "Sky"]
    assert source[0][1]["semantic"][0].tolist() == [0, 255, 1, 255] * 2
    with pytest.raises(UserError, match=r"other classes than in training: \['Bird', 'Sky'\], not \['Bird'\]"):
        MapillarySemantic(tmp_path, "validation", classes=["Bird"])
    image = {"id": "0a_-B", "file_name": "0a_-B.jpg", "height": WIDTH, "width": HEIGHT}  # as it is published
    segments = [{"id": 900, "category_id": 1}, {"id": 5, "category_id": 28}]
    content = {
        "images": [image],
        "annotations": [{"image_id": "0a_-B", "file_name": "0a_-B.png", "segments_info": segments}],
        "categories": [{"id": 28, "name": "Sky", "isthing": 0}, {"id": 1, "name": "Bird", "isthing": 1}],
    }
    save(tmp_path / f"validation/{folder}panoptic/0a_-B.png", colours(halves(900, 5, int)))
    (tmp_path / f"validation/{folder}panoptic/panoptic_2018.json").write_text(json.dumps(content))
    source = MapillaryPanoptic(tmp_path, "validation")
    assert (source.classes, source.things) == (["Bird", "Sky"], [True, False])
    pixels, target = source[0]
    assert (pixels.shape, target["panoptic"].shape) == ((3, HEIGHT, WIDTH), (HEIGHT, WIDTH))
    assert target["labels"].tolist() == [0, 1]
    save(tmp_path / f"validation/{folder}panoptic/0a_-B.png", colours(halves(900, 5, int)).transpose(1, 0, 2))
    with pytest.raises(ValueError, match=r"0a_-B\.png has 6 x 8 pixels, the image 8 x 6"):
        source[0]


def test_a_damaged_config_of_mapillary(tmp_path):
    (tmp_path / "config.json").write_text('{"labels": [{"name": "animal--bird"}]}')
    with pytest.raises(UserError, match=r"config.json: no list 'labels' with readable and evaluate of each: KeyError"):
        MapillarySemantic(tmp_path, "train")
