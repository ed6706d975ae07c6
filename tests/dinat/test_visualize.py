"""Pictures of predictions: what is where, in the colour of its class."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinat.data.scenes import DetectionScenes
from dinat.visualize import colour, draw, write_pictures

CLASSES = ["ant", "bee", "cat"]


def pixels(picture):
    return np.asarray(picture).astype(int)


def blended(label):
    """A class's colour over black."""
    return (0.6 * np.array(colour(label))).astype(int)


@pytest.fixture
def image():
    return torch.zeros(3, 60, 80, dtype=torch.uint8)


def test_classes_have_colours_of_their_own():
    assert len({colour(label) for label in range(150)}) == 150


def test_a_map_is_coloured_by_class(image):
    labels = torch.zeros(60, 80, dtype=torch.int64)
    labels[:, 40:], labels[50:] = 2, 255
    picture = pixels(draw(image, {"semantic": labels}, CLASSES))
    assert picture.shape == (60, 80, 3)
    assert np.abs(picture[2, 2] - blended(0)).max() <= 1
    assert np.abs(picture[2, 77] - blended(2)).max() <= 1
    assert picture[55, 2].max() == 0  # ignored


@pytest.mark.parametrize("of", ["prediction", "target"])
def test_segments_are_coloured_by_class(image, of):
    ids = torch.zeros(60, 80, dtype=torch.int32)
    ids[:20], ids[40:] = 5, 9
    segments = [{"id": 5, "label": 1}, {"id": 9, "label": 2}]
    result = {
        "prediction": {"segments": segments},
        "target": {"segment_ids": torch.tensor([5, 9]), "labels": torch.tensor([1, 2])},
    }[of]
    picture = pixels(draw(image, {"panoptic": ids, **result}, CLASSES))
    assert np.abs(picture[2, 2] - blended(1)).max() <= 1
    assert np.abs(picture[58, 2] - blended(2)).max() <= 1
    assert picture[30, 2].max() == 0


def test_objects_have_boxes_and_masks_where_they_score_enough(image):
    masks = torch.zeros(2, 60, 80, dtype=torch.bool)
    masks[0, 20:40, 20:40] = masks[1, 45:, 60:] = True
    found = {
        "boxes": torch.tensor([[10.0, 10, 50, 50], [55, 42, 79, 59]]),
        "labels": torch.tensor([2, 1]),
        "scores": torch.tensor([0.9, 0.4]),
        "masks": masks,
    }
    picture = pixels(draw(image, found, CLASSES))
    assert np.abs(picture[38, 38] - blended(2)).max() <= 1
    assert tuple(picture[30, 10]) == colour(2)
    assert picture[44:, 56:].max() == 0
    assert pixels(draw(image, found, CLASSES, min_score=0.3))[50, 70].max() > 0


def test_pictures_can_be_enlarged(image):
    box = {"boxes": torch.tensor([[20.0, 20, 60, 40]]), "labels": torch.tensor([1])}
    picture = pixels(draw(image, box, CLASSES, side=160))
    assert picture.shape == (120, 160, 3)
    assert tuple(picture[60, 40]) == colour(1)


def test_a_table_of_truth_and_prediction(tmp_path):
    source = DetectionScenes("validation")
    rows = [(*source[0], source[0][1]), (*source[1], {})]
    write_pictures(tmp_path / "predictions.png", rows, source.classes)
    table = pixels(Image.open(tmp_path / "predictions.png"))
    assert table.shape == (20 + 2 * 328, 3 * 328 - 8, 3)
    image, truth, prediction = (table[20:340, left : left + 320] for left in (0, 328, 656))
    assert np.array_equal(truth, prediction)
    assert not np.array_equal(image, truth)
    assert np.array_equal(table[348:668, :320], table[348:668, 656:])  # nothing was predicted
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.png"]


def test_nothing_to_draw(image):
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0),
               "masks": torch.zeros(0, 60, 80, dtype=torch.bool)}  # fmt: skip
    empty = {"panoptic": torch.zeros(60, 80, dtype=torch.int32), "segments": []}
    for result in (nothing, empty, {"semantic": torch.full((60, 80), 255)}):
        assert pixels(draw(image, result, CLASSES)).max() == 0
