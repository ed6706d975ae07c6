"""Mask R-CNN and Cascade Mask R-CNN: the original's detections, targets worked out by hand, losses."""

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.ops import box_iou

import dinat.dense
from dinat.dense.rcnn import Anchors, BestMatcher, CascadeMaskRCNN, Stage, crop_masks, paste_masks, pool
from dinat.errors import UserError

METHODS = ["mask_rcnn", "cascade_mask_rcnn"]
PICO = dict(stem_stride=4, depths=(1, 1, 1), kernel_size=3, dilations=[[2], [1], [1]])
TINY = dict(fpn_channels=16, box_channels=16, mask_channels=8, roi_samples=16, rpn_samples=32, num_classes=3)


def tiny(method="mask_rcnn", **kwargs):
    return dinat.dense.create_model(method, backbone="dinat_pico", **dict(backbone_kwargs=PICO) | TINY | kwargs)


@pytest.mark.parametrize("method", METHODS)
def test_golden(original, golden, level_maps, method):
    """In two halves, since boxes far larger than the image magnify the rounding of convolutions, which differs between
    CPUs. (With two threads and ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2, the proposals are the same to 2e-5.)
    """
    model = original(method, level_maps("det/160x224/level{}", 160, 224))
    prefix = f"{method}/"
    expected = {key.removeprefix(prefix): value for key, value in golden("detection").items() if key.startswith(prefix)}
    truth, seen = expected["proposals"][:, :4], {}

    def exchange(module, inputs, output):
        seen.update(pyramid=inputs[1], proposals=output[0])
        return [truth], {}

    model.rpn.register_forward_hook(exchange)
    result = model.predict([torch.zeros(3, 150, 210)], [(100, 140)])[0]
    for i, x in enumerate(seen["pyramid"].values()):
        torch.testing.assert_close(x[0].mean((1, 2)), expected[f"fpn{i}_channel_mean"], atol=1e-5, rtol=0)
        torch.testing.assert_close(x[0].mean(0), expected[f"fpn{i}_map_mean"], atol=1e-5, rtol=0)
    torch.testing.assert_close(seen["proposals"][0], truth, atol=2e-3, rtol=0)
    order = result["labels"].argsort(stable=True)  # by class, and in it by score
    assert result["labels"][order].tolist() == expected["labels"].tolist()
    torch.testing.assert_close(result["boxes"][order], expected["boxes_scores"][:, :4], atol=1e-3, rtol=0)
    torch.testing.assert_close(result["scores"][order], expected["boxes_scores"][:, 4], atol=1e-5, rtol=0)
    masks = np.unpackbits(expected["masks_packed"].numpy())[: 100 * 100 * 140].reshape(100, 100, 140).astype(bool)
    assert (result["masks"][order].numpy() != masks).sum() == 0
    assert masks.any()


def test_anchors_have_exact_sizes_at_fixed_strides():
    anchors = Anchors([4, 8], 8.0, [0.5, 1.0, 2.0])
    maps = [torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 2, 1)]
    batch = type("Images", (), {"image_sizes": [(9, 8)], "tensors": torch.zeros(1, 3, 9, 8)})
    (boxes,) = anchors(batch, maps)
    assert boxes.shape == (3 * (6 + 2), 4)
    half = 32 / 2  # of the first level's square, which has 8 cells of 4 pixels
    wide, high = half * 2**0.5, half / 2**0.5  # ratio 0.5 = height / width
    torch.testing.assert_close(boxes[0], torch.tensor([-wide, -high, wide, high]))
    torch.testing.assert_close(boxes[1], torch.tensor([-half, -half, half, half]))
    torch.testing.assert_close(
        boxes[3 * 3 + 1], torch.tensor([4 - half, 4 - half, 4 + half, 4 + half])
    )  # row 1, column 1
    torch.testing.assert_close(boxes[3 * 7 + 1], torch.tensor([-32.0, 8 - 32, 32, 8 + 32]))  # second level, row 1


def box(x1, y1, x2, y2):
    return [float(x1), float(y1), float(x2), float(y2)]


# overlaps with A = (0, 0, 10, 10) and B = (20, 0, 30, 10), worked out by hand: intersection / union
OBJECTS = torch.tensor([box(0, 0, 10, 10), box(20, 0, 30, 10)])
ANCHORS = torch.tensor(
    [
        box(0, 0, 10, 10),  # A: 1
        box(0, 0, 10, 8),  # A: 80 / 100
        box(0, 0, 10, 5),  # A: 50 / 100
        box(0, 0, 5, 4),  # A: 20 / 100
        box(20, 0, 24, 10),  # B: 40 / 100, the best there is for it
        box(23, 0, 30, 5),  # B: 35 / 100
        box(40, 0, 50, 10),  # neither
        box(5, 0, 25, 10),  # A: 50 / 250, B: 50 / 250
    ]
)


@pytest.mark.parametrize(
    ("high", "low", "min_quality", "expected"),
    [
        (0.7, 0.3, 0.3, [0, 0, -2, -1, 1, -2, -1, -1]),  # proposals: B keeps its best, from 0.3 on
        (0.7, 0.3, 0.45, [0, 0, -2, -1, -2, -2, -1, -1]),  # too bad a best
        (0.5, 0.5, None, [0, 0, 0, -1, -1, -1, -1, -1]),  # RoIs of a cascade's first stage
        (0.6, 0.6, None, [0, 0, -1, -1, -1, -1, -1, -1]),
    ],
)  # fmt: skip
def test_assignment_box_by_box(high, low, min_quality, expected):
    assert BestMatcher(high, low, min_quality)(box_iou(OBJECTS, ANCHORS)).tolist() == expected


def test_assignment_of_an_object_takes_all_its_best_boxes_even_from_others():
    """mmdetection's: of two objects, the later one takes a box that is the best there is for it."""
    overlaps = torch.tensor([[0.8, 0.1, 0.1], [0.5, 0.5, 0.2]])
    assert BestMatcher(0.7, 0.3, 0.3)(overlaps).tolist() == [1, 1, -1]
    assert BestMatcher(0.7, 0.3, 0.3)(torch.zeros(0, 3)).tolist() == [-1, -1, -1]


def test_anchors_that_are_trained():
    """Within what the image is padded to by itself; in a cascade, wholly within the image."""
    centred = torch.tensor(
        [box(-8, -8, 8, 8), box(20, 20, 36, 36), box(28, 4, 36, 12), box(0, 0, 16, 16), box(4, 4, 30, 20)]
    )
    target = [{"boxes": torch.tensor([box(0, 0, 16, 16)]), "frame": (20, 30)}]
    labels, matched = tiny().rpn.assign_targets_to_anchors([centred], target)
    assert labels[0].tolist() == [
        0,
        0,
        -1,
        1,
        0,
    ]  # the third's centre is at x = 32, the padded side; the last overlaps by 144 / 528
    assert matched[0][3].tolist() == [0, 0, 16, 16]
    labels, _ = tiny("cascade_mask_rcnn").rpn.assign_targets_to_anchors([centred], target)
    assert labels[0].tolist() == [-1, -1, -1, 1, -1]  # the last touches the right side, as mmdetection counts it


def test_samples_of_a_stage():
    model = tiny("cascade_mask_rcnn", roi_samples=8)
    samples = model.sample(Stage(0.5, (1, 1, 1, 1)), ANCHORS, OBJECTS, torch.tensor([2, 1]))
    assert samples.positive == 2  # a quarter of 8, of the five that overlap enough
    assert len(samples.boxes) == 2 + 5  # five are background
    assert samples.labels[2:].tolist() == [3] * 5
    for roi, label, i in zip(
        samples.boxes[:2].tolist(), samples.labels.tolist(), samples.objects.tolist(), strict=False
    ):
        assert label == [2, 1][i]
        assert roi in [[*map(float, b)] for b in (OBJECTS[i].tolist(), *ANCHORS[:3].tolist())]
    given = [roi in OBJECTS.tolist() for roi in samples.boxes.tolist()]
    assert all(g for g, own in zip(given, samples.given.tolist(), strict=True) if own)
    empty = model.sample(Stage(0.5, (1, 1, 1, 1)), ANCHORS, OBJECTS[:0], torch.zeros(0, dtype=torch.long))
    assert empty.positive == 0
    assert empty.labels.tolist() == [3] * 8


def test_samples_are_drawn_by_torch():
    model = tiny(roi_samples=4)
    draws = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        draws.append(model.sample(model.stages[0], ANCHORS, OBJECTS, torch.tensor([2, 1])).boxes.tolist())
    assert draws[0] == draws[1]
    assert any(draw != draws[0] for draw in draws)


def test_box_losses_by_hand():
    """L1 on deltas in units of their deviations; GIoU times 10 on boxes; both are divided by all samples."""
    truth = [torch.tensor([box(0, 0, 20, 10)])]
    rois = torch.tensor([box(0, 0, 10, 10), box(50, 50, 60, 60)])
    for model, expected in (
        (tiny(), (1 / 0.2 * torch.tensor(2.0).log() + 0.5 / 0.1).item() / 2),
        (tiny("cascade_mask_rcnn"), 10 * 0.5 / 2),
    ):
        samples = model.sample(Stage(0.5, (1, 1, 1, 1)), rois[1:], rois[:1], torch.tensor([1]))
        logits, deltas = torch.zeros(2, 4), torch.zeros(2, 3, 4)
        losses = model._box_losses(0, logits, deltas, [samples], truth)
        assert samples.boxes.tolist() == rois.tolist()
        torch.testing.assert_close(losses["loss_box"].item(), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(losses["loss_class"].item(), torch.tensor(4.0).log().item(), atol=1e-5, rtol=0)


def test_refined_rois_leave_out_given_boxes():
    model = tiny("cascade_mask_rcnn")
    samples = model.sample(Stage(0.5, (1, 1, 1, 1)), torch.tensor([box(40, 0, 60, 10)]), OBJECTS, torch.tensor([2, 1]))
    logits, deltas = torch.zeros(len(samples.boxes), 4), torch.zeros(len(samples.boxes), 3, 4)
    logits[:, 0] = 1  # what background is taken for
    deltas[:, 0, 0] = 5.0  # of deviation 0.1: half a width to the right
    (rois,) = model._refined(0, logits, deltas, [samples], [(8, 64)])
    assert rois.tolist() == [[50.0, 0.0, 64.0, 8.0]]  # moved, and cut to the image


def test_pooling_takes_the_level_for_the_size():
    """56 pixels and more, up to 112, from the finest map, and so on; a constant map pools to its value."""
    maps = [torch.full((2, 1, 512 // s, 512 // s), float(s)) for s in (4, 8, 16)]
    rois = [
        torch.tensor([box(0, 0, 10, 10), box(0, 0, 100, 100)]),
        torch.tensor([box(0, 0, 112, 112), box(0, 0, 448, 448)]),
    ]
    pooled = pool(maps, [4, 8, 16], rois, 2)
    assert pooled.amax((1, 2, 3)).tolist() == [4, 4, 8, 16]
    assert pool(maps, [4, 8, 16], [rois[0][:0], rois[1][:0]], 7).shape == (0, 1, 7, 7)


def test_masks_cropped_and_pasted():
    masks = tv_tensors.Mask(torch.zeros(1, 8, 8, dtype=torch.bool))
    masks[0, 2:6, 2:4] = True
    boxes = torch.tensor([box(2, 2, 6, 6)])
    cropped = crop_masks(masks, boxes, 4)
    assert cropped[0].tolist() == [[1, 1, 0, 0]] * 4
    assert torch.equal(paste_masks(cropped, boxes, (8, 8))[0], masks[0].as_subclass(torch.Tensor))
    beyond = paste_masks(torch.ones(2, 4, 4), torch.tensor([box(-3, -3, 3, 2), box(5, 5, 5, 5)]), (8, 8))
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:2, :3] = True
    assert torch.equal(beyond[0], expected)
    assert not beyond[1].any()


def target(*boxes, size=(64, 64), masks=True):
    out = {"boxes": tv_tensors.BoundingBoxes(torch.tensor(boxes).reshape(-1, 4), format="XYXY", canvas_size=size)}
    out["labels"] = torch.arange(len(boxes)) % 3
    if masks:
        out["masks"] = tv_tensors.Mask(torch.zeros(len(boxes), *size, dtype=torch.bool))
        for mask, (x1, y1, x2, y2) in zip(out["masks"], boxes, strict=True):
            mask[int(y1) : int(y2), int(x1) : int(x2)] = True
    return out


def test_boxes_without_masks():
    model = tiny(masks=False)
    images = [torch.randn(3, 64, 64)]
    assert model(images, [target(box(4, 4, 30, 40), masks=False)]).keys() == {
        "loss_rpn_class", "loss_rpn_box", "loss_class", "loss_box",
    }  # fmt: skip
    assert "masks" not in model.eval().predict(images)[0]
    with pytest.raises(UserError, match=r"masks=True: the data has boxes only; create mask_rcnn with masks=False"):
        tiny()(images, [target(box(4, 4, 30, 40), masks=False)])


def test_stage_weights():
    model = tiny("cascade_mask_rcnn")
    images, targets = [torch.randn(3, 64, 64)] * 2, [target(box(4, 4, 30, 40)), target(box(8, 8, 60, 60))]
    torch.manual_seed(0)
    weighted = model(images, targets)
    model.stages = tuple(Stage(s.iou, s.deviations) for s in CascadeMaskRCNN.stages)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    plain = model(images, targets)
    for name, loss in plain.items():
        factor = {"0": 1, "1": 0.5, "2": 0.25}.get(name[-1], 1)
        torch.testing.assert_close(weighted[name], factor * loss)


def test_learns_one_picture():
    """Losses go down where there is something to learn, masks included."""
    torch.manual_seed(0)
    model = tiny(backbone_kwargs=PICO | dict(embed_dim=16, num_heads=(1, 1, 1)))
    image = torch.zeros(3, 64, 64)
    image[0, 10:42, 16:48] = 2.0
    truth = target(box(16, 10, 48, 42))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    first = None
    for _ in range(25):
        loss = sum(model([image], [truth]).values())
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 * first


def test_bad_arguments():
    with pytest.raises(
        UserError, match=r"each feature map must have half the side of the one before; strides: \[16, 16, 16"
    ):
        dinat.dense.create_model(
            "mask_rcnn", backbone="nat_isotropic_small", backbone_kwargs=dict(embed_dim=32, num_heads=(1,) * 12)
        )
    with pytest.raises(UserError, match=r"backbone=dinat_mimi: no such model. Did you mean dinat_mini"):
        dinat.dense.create_model("mask_rcnn", backbone="dinat_mimi")
    with pytest.raises(TypeError, match=r"predict\(\) of mask_rcnn takes no threshold"):
        tiny().eval().predict([torch.zeros(3, 32, 32)], threshold=0.5)
