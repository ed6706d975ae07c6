"""Digit scenes: functions of (split, index, seed), honest about what is held out, with targets that agree."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from dinat.data.scenes import OPAQUE, DetectionScenes, PanopticScenes, SemanticScenes, _enlarge
from dinat.errors import UserError

SMALL = {"size": 64, "digits": (2, 3), "digit_size": (24, 36)}


def test_a_scene_is_a_function_of_split_index_and_seed():
    first, again = DetectionScenes("train", **SMALL), DetectionScenes("train", **SMALL)
    again[3]  # what was asked before has no influence
    for index in (0, 7):
        (image, target), (same, equal) = first[index], again[index]
        assert torch.equal(image, same)
        assert torch.equal(target["masks"], equal["masks"])
        assert torch.equal(target["labels"], equal["labels"])
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], DetectionScenes("train", **SMALL, seed=1)[0][0])
    assert not torch.equal(first[0][0], DetectionScenes("validation", **SMALL)[0][0])


def test_validation_is_the_same_for_every_seed_and_number_of_scenes():
    first, other = DetectionScenes("validation", **SMALL), DetectionScenes("validation", **SMALL, seed=5, scenes=7)
    assert len(first) == len(other) == 128
    assert len(DetectionScenes("train", **SMALL, scenes=7)) == 7
    assert torch.equal(first[100][0], other[100][0])


def test_no_digit_and_no_background_pixel_is_shared():
    train, validation = DetectionScenes("train"), DetectionScenes("validation")
    together = np.concatenate([train.ink, validation.ink]).reshape(-1, 64) * 16
    everything = load_digits().data
    assert sorted(map(tuple, together.round().astype(int))) == sorted(map(tuple, everything.astype(int)))
    for left, right, whole in zip(train.photographs, validation.photographs, load_sample_images().images, strict=True):
        assert np.array_equal(np.concatenate([left, right], axis=1), whole)


def test_scenes_show_their_own_digits_and_photographs_only():
    scenes = DetectionScenes("validation", **SMALL)
    scenes.photographs = [Image.new("RGB", (80, 70), (51, 102, 153))]
    scenes.ink = np.ones((1, 8, 8), np.float32)
    scenes.labels = np.array([4])
    image, target = scenes[0]
    background = image[:, ~target["masks"].any(0)]
    assert (background == torch.tensor([51, 102, 153])[:, None]).all()
    assert set(target["labels"].tolist()) == {4}
    last = target["boxes"][-1]  # nothing covers it, and a square of ink is square
    assert last[2] - last[0] == last[3] - last[1] == target["masks"][-1].sum().sqrt()


@pytest.mark.parametrize("index", range(12))
def test_masks_are_what_is_visible_and_boxes_are_around_it(index):
    scene, (image, target) = (scenes := DetectionScenes("train", **SMALL)).scene(index), scenes[index]
    masks, boxes = target["masks"], target["boxes"]
    assert (image.shape, image.dtype, masks.dtype, boxes.dtype) == ((3, 64, 64), torch.uint8, torch.bool, torch.float32)
    assert masks.sum(0).max() <= 1
    assert 1 <= len(masks) <= 3
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        rows, columns = torch.where(mask)
        edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert (left, top, right, bottom) == tuple(int(edge) for edge in edges)
    assert torch.equal(target["area"], masks.sum((1, 2)).float())
    assert np.array_equal(target["labels"].numpy(), scene.labels)


@pytest.mark.parametrize(("digits", "side"), [(1, 16), (3, 12)])
def test_number_and_size_of_digits(digits, side):
    scenes = DetectionScenes("train", size=64, digits=(digits, digits), digit_size=(side, side), visible=0.1)
    scenes.ink = np.ones((1, 8, 8), np.float32)
    for index in range(10):
        areas = scenes[index][1]["area"]
        assert len(areas) == digits
        assert areas.max() == side**2


@pytest.mark.parametrize("visible", [0.6, 0.9])
def test_later_digits_cover_earlier_ones_but_not_too_much(visible):
    scenes = DetectionScenes("train", size=48, digits=(4, 4), digit_size=(24, 24), visible=visible)
    scenes.ink = scenes.ink[:1]
    whole = (_enlarge(scenes.ink[0], 24) >= OPAQUE).sum()
    shares = [scenes.scene(index).masks.sum((1, 2)) / whole for index in range(30)]
    assert all(share[-1] == 1 for share in shares)
    covered = np.concatenate([share[:-1] for share in shares])
    assert visible <= covered.min() < visible + 0.1


@pytest.mark.parametrize(("grey", "contrast"), [(128, 0.5), (100, 0.3), (240, 0.4)])
def test_contrast_is_kept(grey, contrast):
    scenes = DetectionScenes("train", **{**SMALL, "digits": (1, 1)}, contrast=contrast)
    scenes.photographs = [Image.new("RGB", (80, 80), (grey, grey, grey))]
    scenes.ink = np.ones((1, 8, 8), np.float32)
    for index in range(20):
        image, target = scenes[index]
        brightness = image[:, target["masks"][0]].float().mean()
        assert abs(brightness - grey) >= contrast * 255 - 1


def test_targets_of_the_tasks_agree():
    kinds = [kind("validation", **SMALL) for kind in (DetectionScenes, SemanticScenes, PanopticScenes)]
    (image, objects), (same, semantic), (equal, panoptic) = (scenes[9] for scenes in kinds)
    assert torch.equal(image, same)
    assert torch.equal(image, equal)
    background = ~objects["masks"].any(0)
    for mask, label in zip(objects["masks"], objects["labels"], strict=True):
        assert (semantic["semantic"][mask] == label).all()
    assert (semantic["semantic"][background] == 10).all()
    assert panoptic["labels"].tolist() == [*objects["labels"].tolist(), 10]
    for mask, number in zip([*objects["masks"], background], panoptic["segment_ids"], strict=True):
        assert torch.equal(panoptic["panoptic"] == number, mask)
    assert kinds[1].classes[10] == "background"
    assert kinds[2].things == [True] * 10 + [False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"digits": (3, 2)}, "data.kwargs.digits=[3, 2]"),
        ({"digit_size": (0, 9)}, "data.kwargs.digit_size=[0, 9]"),
        ({"size": 32, "digit_size": (20, 40)}, "kwargs.digit_size=[20, 40]: larger than a scene, data.img_size=32."),
        ({"visible": 0.0}, "data.kwargs.visible=0.0: give a share of a digit, above 0 and up to 1."),
        ({"contrast": 0.7}, "data.kwargs.contrast=0.7: give a difference in brightness from 0 to 0.5."),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError) as error:
        DetectionScenes("train", **options)
    assert message in str(error.value)
