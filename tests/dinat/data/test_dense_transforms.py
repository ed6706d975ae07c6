"""Transforms of images with boxes, masks and maps, against sizes and pixels worked out by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from dinat.data.dense_transforms import (
    Resize,
    dense_eval_transform,
    dense_train_transform,
    dense_views_transform,
    scaled_steps,
)
from dinat.errors import UserError


def sample(height=12, width=20):
    """A gradient with two objects: a block on the left and one pixel in the right lower corner."""
    columns = torch.arange(width, dtype=torch.uint8).expand(3, height, width) * 10
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, 2:8, 1:5] = True
    masks[1, -1, -1] = True
    boxes = torch.tensor([[1.0, 2, 5, 8], [width - 1, height - 1, width, height]])
    return tv_tensors.Image(columns.contiguous()), {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.tensor([3, 4]),
        "masks": tv_tensors.Mask(masks),
        "iscrowd": torch.tensor([False, True]),
        "area": torch.tensor([24.0, 1.0]),
        "segment_ids": torch.tensor([7, 9]),
        "semantic": tv_tensors.Mask(masks[0].to(torch.uint8)),
        "panoptic": tv_tensors.Mask((7 * masks[0] + 9 * masks[1]).int()),
        "image_id": 5,
    }


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        ({"shortest": 800, "longest": 1333}, (480, 640), [800, 1067]),  # 1066.67: mm* and detectron2
        ({"shortest": 800, "longest": 1333, "rounding": "floor"}, (480, 640), [800, 1066]),  # torchvision
        ({"shortest": 800, "longest": 1333}, (427, 640), [800, 1199]),  # 1199.06
        ({"shortest": 800, "longest": 1333}, (300, 640), [625, 1333]),  # 624.8
        ({"shortest": 512, "longest": 2048}, (683, 512), [683, 512]),
        ({"shortest": 1024, "longest": 1024, "scale": [0.5, 0.5]}, (480, 640), [384, 512]),  # large-scale jitter
    ],
)
def test_sizes_are_those_of_the_originals(options, size, expected):
    assert Resize(**options).size(*size) == expected


def test_resamplers():
    row = torch.tensor([0, 100, 200, 40], dtype=torch.uint8).expand(3, 1, 4)
    image = tv_tensors.Image(row.contiguous())
    larger = Resize(2, resample="bilinear").resize(image, [1, 8])
    assert larger[0, 0].tolist() == [0, 25, 75, 125, 175, 160, 80, 40]  # pixel centres at (i + 0.5) / 2 - 0.5
    image = tv_tensors.Image(torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8))
    smaller = Resize(10, resample="pil").resize(image, [10, 13])
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((13, 10), Image.Resampling.BILINEAR)
    assert np.array_equal(smaller.permute(1, 2, 0).numpy(), np.asarray(pixels))
    assert not torch.equal(smaller, Resize(10, resample="bilinear").resize(image, [10, 13]))


def test_resize_moves_everything_together():
    image, target = dense_train_transform([{"resize": {"shortest": 24}}])(*sample())
    assert (image.shape, image.dtype) == ((3, 24, 40), torch.uint8)
    assert target["boxes"].tolist() == [[2, 4, 10, 16], [38, 22, 40, 24]]
    assert target["boxes"].canvas_size == (24, 40)
    assert target["masks"][0].nonzero().amin(0).tolist() == [4, 2]
    assert target["masks"].sum((1, 2)).tolist() == [96, 4]
    assert target["area"].tolist() == [96, 4]
    assert target["semantic"].sum() == 96
    assert (target["size"], target["image_id"], target["labels"].tolist()) == ((12, 20), 5, [3, 4])


def test_a_crop_removes_what_it_empties_and_clamps_the_rest():
    seen = set()
    transform = dense_train_transform([{"crop": {"size": [6, 8]}}])
    for _ in range(60):
        image, target = transform(*sample())
        left = int(image[0, 0, 0]) // 10
        kept = target["labels"].tolist()
        assert image.shape == (3, 6, 8)
        assert len({len(target[key]) for key in ("boxes", "labels", "masks", "iscrowd", "area", "segment_ids")}) == 1
        assert target["masks"].flatten(1).any(1).all()
        assert torch.equal(target["area"], target["masks"].sum((1, 2)).float())
        if 3 in kept:  # columns 1..4 of the block, from where the crop begins
            box = target["boxes"][kept.index(3)]
            assert (box[0], box[2]) == (max(1 - left, 0), 5 - left)
            assert target["segment_ids"][kept.index(3)] == 7
        seen.add(tuple(kept))
    assert {(), (3,)} <= seen


def test_segments_stay_as_long_as_their_map_has_them():
    """The map of ids alone tells what a mask for each would."""
    steps = [{"resize": {"shortest": [8, 12, 30]}}, {"crop": {"range": [6, 20]}}, {"flip": {"p": 0.5}}]
    transform, left = dense_train_transform([*steps, {"pad": {"size": 12}}]), set()
    for seed in range(60):
        image, target = sample()
        of_masks = {key: target[key] for key in ("labels", "masks")}
        of_map = {key: target[key] for key in ("labels", "segment_ids", "panoptic", "iscrowd")}
        torch.manual_seed(seed)
        expected = transform(image, of_masks)[1]
        torch.manual_seed(seed)
        found = transform(image, of_map)[1]
        assert found["labels"].tolist() == expected["labels"].tolist()
        assert found["iscrowd"].tolist() == [label == 4 for label in found["labels"]]
        assert torch.equal(found["panoptic"] == found["segment_ids"][:, None, None], expected["masks"])
        left.add(tuple(found["segment_ids"].tolist()))
    assert {(7,), (9,), (7, 9)} <= left


def test_objects_need_pixels_and_a_box_to_stay():
    image, target = sample()
    del target["panoptic"]
    corners = torch.tensor([[1.0, 2, 5, 8], [5, 2, 5.5, 8], [1, 2, 4, 8]])
    target |= {
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(12, 20)),
        "masks": tv_tensors.Mask(torch.stack([target["masks"][0], target["masks"][0], torch.zeros(12, 20)]).bool()),
        **{key: torch.arange(3) for key in ("labels", "iscrowd", "segment_ids", "area")},
    }
    transform = dense_train_transform([{"flip": {"p": 0.0}}])
    assert transform(image, target)[1]["labels"].tolist() == [0]  # the second is half a pixel wide, the third has none
    del target["masks"]
    assert transform(image, target)[1]["labels"].tolist() == [0, 2]
    assert transform(image, target)[1]["area"].tolist() == [24, 18]


def test_padding_fills_up_to_a_size():
    image, target = sample()
    image, target = dense_train_transform([{"pad": {"size": [16, 10], "fill": [1, 2, 3]}}])(image, target)
    assert image.shape == (3, 16, 20)
    assert image[:, 12:].unique(dim=2).squeeze(2).T.unique(dim=0).tolist() == [[1, 2, 3]]
    assert torch.equal(image[:, :12], sample()[0])
    assert (target["semantic"][12:] == 255).all()
    assert target["semantic"][:12].max() == 1
    assert target["masks"].sum((1, 2)).tolist() == [24, 1]
    assert (target["boxes"].tolist(), target["boxes"].canvas_size) == (sample()[1]["boxes"].tolist(), (16, 20))


def test_steps_at_several_scales():
    steps = [{"resize": {"shortest": 512, "longest": 2048, "resample": "bilinear"}}]
    small, large = scaled_steps(steps, [0.75, 1.25])
    assert small == [{"resize": {"shortest": 384, "longest": 1536, "resample": "bilinear"}}]
    assert large == [{"resize": {"shortest": 640, "longest": 2560, "resample": "bilinear"}}]
    views, target = dense_views_transform(scaled_steps([{"resize": {"shortest": 12}}], [0.5, 2]))(*sample())
    assert [view.shape for view in views] == [(3, 6, 10), (3, 24, 40)]
    assert (target["size"], target["masks"].shape) == ((12, 20), (2, 12, 20))
    for scales, wrong in (([0.5], []), ([], steps), ([-1], steps)):
        with pytest.raises(UserError, match=r"test\.scales=.* give factors above 0, and one resize to scale"):
            scaled_steps(wrong, scales)


def test_a_flip_mirrors_everything():
    image, target = dense_train_transform([{"flip": {"p": 1.0}}])(*sample())
    assert image[0, 0].tolist() == [*range(190, -1, -10)]
    assert target["boxes"].tolist() == [[15, 2, 19, 8], [0, 11, 1, 12]]
    assert target["masks"][0, 2:8, 15:19].all()
    assert target["semantic"][2:8, 15:19].all()


def test_the_class_share_of_a_crop_is_limited():
    image, target = sample(40, 40)
    labels = torch.zeros(40, 40, dtype=torch.uint8)
    labels[:, 24:] = 1
    labels[:10] = 255
    target = {"semantic": tv_tensors.Mask(labels)}

    def shares(limit):
        transform, found = dense_train_transform([{"crop": {"size": 16, "max_class_share": limit}}]), []
        for _ in range(40):
            known = (crop := transform(image, target)[1]["semantic"])[crop != 255]
            found.append(max((known == 0).sum(), (known == 1).sum()) / max(len(known), 1))
        return torch.stack(found)

    assert (shares(1.0) > 0.75).float().mean() > 0.5
    assert (shares(0.75) > 0.75).float().mean() < 0.2  # where ten draws were not enough
    with pytest.raises(ValueError, match=r"max_class_share=0\.9 needs a semantic map"):
        dense_train_transform([{"crop": {"size": 16, "max_class_share": 0.9}}])(image, {"image_id": 0})


def test_an_image_without_objects_and_one_smaller_than_the_crop():
    image, target = sample()
    target = {key: target[key][:0] for key in ("labels", "iscrowd", "area")} | {
        "boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(12, 20)),
        "masks": tv_tensors.Mask(torch.zeros(0, 12, 20, dtype=torch.bool)),
    }
    steps = [{"resize": {"shortest": 9}}, {"flip": {"p": 1.0}}, {"crop": {"size": 100}}, {"photometric": {}}]
    image, target = dense_train_transform(steps)(image, target)
    assert (image.shape, target["masks"].shape, target["boxes"].shape) == ((3, 9, 15), (0, 9, 15), (0, 4))


def test_draws_come_from_the_global_generator_of_pytorch():
    steps = [
        {
            "one_of": [
                [{"resize": {"shortest": [8, 16, 24]}}],
                [{"crop": {"range": [4, 9]}}, {"resize": {"shortest": 9}}],
            ]
        },
        {"flip": {"p": 0.5}},
        {"photometric": {}},
    ]
    transform = dense_train_transform(steps)

    def drawn(seed):
        torch.manual_seed(seed)
        return transform(*sample())[0]

    images = [drawn(seed) for seed in range(25)]
    assert all(torch.equal(image, drawn(seed)) for seed, image in enumerate(images))
    assert {8, 9, 16, 24} <= {image.shape[1] for image in images}


def test_colours_are_distorted_and_shapes_are_not():
    image, target = sample()
    distorted, same = dense_train_transform([{"photometric": {"p": 1.0}}])(image, target)
    assert distorted.dtype == torch.uint8
    assert not torch.equal(distorted, image)
    assert torch.equal(same["masks"], target["masks"])
    assert torch.equal(dense_train_transform([{"photometric": {"p": 0.0}}])(image, target)[0], image)


def test_evaluation_leaves_the_target_in_its_frame():
    image, target = dense_eval_transform([{"resize": {"shortest": 24, "longest": 30}}])(*sample())
    assert image.shape == (3, 18, 30)
    assert target["boxes"].tolist() == sample()[1]["boxes"].tolist()
    assert (target["masks"].shape, target["size"]) == ((2, 12, 20), (12, 20))


@pytest.mark.parametrize(
    ("build", "steps", "message"),
    [
        (
            dense_train_transform,
            [{"resise": {}}],
            "no step resise. Known: resize, crop, pad, flip, photometric, one_of. Did",
        ),
        (dense_train_transform, [{"resize": {"short": 8}}], "resize: {'short': 8}: "),
        (
            dense_train_transform,
            [{"resize": {"shortest": 8, "resample": "cubic"}}],
            "resample=cubic: not known. Known: pil",
        ),
        (dense_train_transform, [{"resize": {"shortest": 0}}], "shortest=0"),
        (dense_train_transform, [{"crop": {}}], "give one of the two"),
        (dense_train_transform, [{"crop": {"size": 8, "max_class_share": 0}}], "max_class_share=0: out of range"),
        (dense_train_transform, [{"pad": {"size": 0}}], "pad: {'size': 0}: size=0: give one or two numbers above 0."),
        (dense_train_transform, ["flip"], "flip is not a step. Write one as `- flip: {p: 0.5}`."),
        (dense_eval_transform, [{"flip": {"p": 0.5}}], "would be random. Use resize with one size."),
        (dense_eval_transform, [{"resize": {"shortest": [8, 9]}}], "would be random"),
    ],
)
def test_steps_that_cannot_be(build, steps, message):
    with pytest.raises(UserError) as error:
        build(steps)
    assert message in str(error.value)
