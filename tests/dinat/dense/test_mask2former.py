"""Mask2Former and OneFormer: the original's outputs and post-processing, the original's loss written down plainly."""

import math
import sys

import pytest
import torch
from torch.nn import functional as F
from torchvision import tv_tensors
from transformers.modeling_outputs import BackboneOutput
from transformers.models.mask2former import configuration_mask2former

import dinat.dense
from dinat.dense import postprocess
from dinat.dense.mask2former import OneFormerCriterion
from dinat.dense.texts import TASK_TOKENS, find_tokenizer
from dinat.errors import UserError

PICO = dict(stem_stride=4, depths=(1, 1, 1), kernel_size=3, dilations=[[2], [1], [1]])
LAYERS = dict(encoder_layers=1, decoder_layers=3, encoder_mlp=32, decoder_mlp=32)
TINY = dict(num_classes=3, width=32, heads=4, queries=5, points=64) | LAYERS


def tiny(method="mask2former", **kwargs):
    return dinat.dense.create_model(method, backbone="dinat_pico", **dict(backbone_kwargs=PICO) | TINY | kwargs)


def wrap(maps):
    return BackboneOutput(feature_maps=tuple(maps))


def test_golden_mask2former(original, golden, level_maps):
    expected = {key.removeprefix("mask2former/"): value for key, value in golden("mask2former").items()}
    model = original("mask2former", level_maps("mask2former/res{}", 96, 128, first=2), wrap)
    with torch.no_grad():
        pixels = model.network.model.pixel_level_module(torch.zeros(1, 3, 96, 128))
        found = model.network(torch.zeros(1, 3, 96, 128), output_auxiliary_logits=True)
        logits, masks = model(torch.zeros(1, 3, 96, 128))
    for actual, name in (
        (pixels.decoder_last_hidden_state, "pixel_decoder/mask_features"),
        (pixels.decoder_hidden_states[1], "pixel_decoder/multi_scale_1"),
        (pixels.decoder_hidden_states[2], "pixel_decoder/multi_scale_2"),
        (logits, "pred_logits"),
        (masks, "pred_masks"),
        (found.auxiliary_logits[0]["class_queries_logits"], "aux0/pred_logits"),
        (found.auxiliary_logits[4]["masks_queries_logits"][:, :10], "aux4/pred_masks"),
    ):
        torch.testing.assert_close(
            actual, expected[name], atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_transformers_does_not_doubt_the_backbone(monkeypatch):
    """It warns once of any but Swin, in the words of a mistake."""
    warned = []
    monkeypatch.setattr(configuration_mask2former.logger, "warning_once", warned.append)
    tiny()
    assert not warned


def test_golden_oneformer(original, golden, level_maps):
    expected = {key.removeprefix("oneformer/"): value for key, value in golden("oneformer").items()}
    model = original(
        "oneformer", level_maps("oneformer/res{}", 96, 128, first=2), wrap,
        queries=60, tokenizer=lambda texts: None, class_names=["a"] * 133,
    )  # fmt: skip
    tokens = expected["task_tokens"][0]
    assert tuple(tokens[tokens != 0].tolist()) == TASK_TOKENS["panoptic"]
    with torch.no_grad():
        found = model.run(torch.zeros(1, 3, 96, 128), ["panoptic"])
        texts = model.network.model.text_mapper.encode_text(expected["text_tokens"])
    torch.testing.assert_close(found.task_token, expected["task_embedding"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.class_queries_logits, expected["pred_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.masks_queries_logits, expected["pred_masks"], atol=1e-4, rtol=0)
    torch.testing.assert_close(texts, expected["text_embedding"], atol=1e-4, rtol=0)


def test_golden_postprocessing(golden):
    expected = {key.removeprefix("mask2former/post/"): value for key, value in golden("mask2former").items()}
    logits, masks = expected["pred_logits"], expected["pred_masks"]
    things = [i < 80 for i in range(133)]
    masks = postprocess.fit_masks(masks, (96, 128), (90, 120), (75, 100))
    scores = postprocess.semantic(logits, masks)
    assert torch.equal(scores.argmax(0), expected["semantic_argmax"].long())
    torch.testing.assert_close(scores.mean((1, 2)), expected["semantic_class_mean"], atol=1e-6, rtol=0)
    ids, segments = postprocess.panoptic(logits, masks, things, 0.8, 0.8)
    assert torch.equal(ids, expected["panoptic_ids"])
    assert [[s["id"], s["label"], int(s["isthing"])] for s in segments] == expected["panoptic_segments"].tolist()
    found = postprocess.instances(logits, masks, things, 100)
    rows = zip(found["scores"].tolist(), found["labels"].tolist(), found["masks"].sum((1, 2)).tolist(), strict=True)
    names = ("instance_scores", "instance_classes", "instance_areas")
    truth = zip(*(expected[name].tolist() for name in names), strict=True)
    for actual, wanted in zip(sorted(rows), sorted(truth), strict=True):
        assert actual == pytest.approx(wanted, abs=1e-5)


def test_things_and_stuff():
    """Two queries of one stuff class are one segment; a thing that is mostly behind another is none."""
    logits = torch.full((4, 4), -9.0)
    logits[[0, 1, 2, 3], [2, 2, 0, 1]] = 9.0
    logits[3, 1] = 5.0
    masks = torch.full((4, 4, 8), -9.0)
    masks[0, :, :3], masks[1, :, 5:], masks[2, :2, 3:5], masks[3, :2, 3:5] = 9.0, 9.0, 9.0, 9.0
    ids, segments = postprocess.panoptic(logits, masks, [True, True, False], 0.8, 0.8)
    assert [(s["id"], s["label"], s["isthing"]) for s in segments] == [(1, 2, False), (2, 0, True)]
    assert ids.unique().tolist() == [0, 1, 2]
    assert (ids == 1).sum() == 24
    nothing = postprocess.panoptic(torch.full((2, 4), 0.0), masks[:2], [True] * 3, 0.8, 0.8)
    assert nothing[1] == []
    assert not nothing[0].any()


def test_instances_have_boxes_of_their_masks():
    logits, masks = torch.zeros(2, 2), torch.full((2, 6, 6), -9.0)
    logits[0, 0] = 3.0
    masks[0, 1:3, 2:5] = 2.0
    found = postprocess.instances(logits, masks, [True], 100)
    assert found["boxes"].tolist() == [[2, 1, 5, 3], [0, 0, 0, 0]]
    score = (torch.tensor([3.0, 0]).softmax(0)[0] * torch.tensor(2.0).sigmoid()).item()
    assert found["scores"].tolist() == pytest.approx([score, 0], abs=1e-5)


def original_loss(predictions, truth, matches, points, no_object=0.1):
    """Mask2Former's criterion in plain words, for one layer: class, mask and dice losses before their weights.

    predictions: (logits (queries, classes + 1), masks (queries, h, w)) per image; truth: (labels, masks) per image;
    matches: (query, object) pairs per image; points: (n, 2) in 0..1 for each matched pair, in order.
    """
    weighted, weights, bce, dice, count = 0.0, 0.0, 0.0, 0.0, 0
    points = iter(points)
    for (logits, masks), (labels, objects), pairs in zip(predictions, truth, matches, strict=True):
        wanted = dict(pairs)
        for query in range(len(logits)):
            label = labels[wanted[query]].item() if query in wanted else logits.shape[1] - 1
            weight = 1.0 if query in wanted else no_object
            weighted, weights = weighted - weight * logits[query].log_softmax(0)[label], weights + weight
        for query, i in pairs:
            grid = 2 * next(points)[None, None] - 1
            x = F.grid_sample(masks[query][None, None], grid, align_corners=False).flatten()
            y = F.grid_sample(objects[i][None, None].float(), grid, align_corners=False).flatten()
            bce = bce + (x.clamp(min=0) - x * y + (1 + (-x.abs()).exp()).log()).mean()
            p = x.sigmoid()
            dice = dice + 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
            count += 1
    return weighted / weights, bce / max(count, 1), dice / max(count, 1)


@pytest.mark.parametrize("method", ["mask2former", "oneformer"])
def test_loss_is_the_originals(method, monkeypatch):
    torch.manual_seed(0)
    model = tiny(method, decoder_layers=3)
    criterion = model.network.criterion
    truth = [(torch.tensor([1, 0]), torch.rand(2, 32, 32) > 0.5), (torch.tensor([2]), torch.rand(1, 32, 32) > 0.5)]
    matches = [[(0, 1), (3, 0)], [(4, 0)]]
    points = torch.rand(3, 40, 2)
    pairs = [tuple(torch.tensor(x) for x in zip(*pairs, strict=True)) for pairs in matches]
    monkeypatch.setattr(type(criterion.matcher), "forward", lambda self, *args: pairs)
    monkeypatch.setattr(type(criterion), "sample_points_using_uncertainty", lambda self, *args: points)
    images = [torch.randn(3, 32, 32) for _ in truth]
    targets = [{"labels": labels, "masks": tv_tensors.Mask(masks)} for labels, masks in truth]
    model.things = [True] * 3
    model.task = "detection"
    model.eval()  # no dropout
    losses = model.losses(torch.stack(images), images, targets)
    found = model.run(torch.stack(images), ["instance"] * 2, output_auxiliary_logits=True)
    layers = list(found.auxiliary_logits if method == "mask2former" else found.auxiliary_predictions)
    layers.append({key: found[key] for key in ("class_queries_logits", "masks_queries_logits")})
    assert len(layers) == 3
    total = torch.zeros(3)
    for layer in layers:
        predictions = list(zip(layer["class_queries_logits"], layer["masks_queries_logits"], strict=True))
        total = total + torch.stack(original_loss(predictions, truth, matches, points)) * torch.tensor([2.0, 5.0, 5.0])
    actual = torch.stack([losses["loss_class"], losses["loss_mask"], losses["loss_dice"]])
    torch.testing.assert_close(actual, total, atol=1e-4, rtol=1e-5)


def test_segments_of_each_task():
    model = tiny(things=[True, True, False])
    masks = torch.zeros(4, 4, 4, dtype=torch.bool)
    masks[0, 0], masks[1, 1], masks[2, 2], masks[3, 3] = True, True, True, True
    target = {"masks": tv_tensors.Mask(masks), "labels": torch.tensor([0, 0, 2, 1])}
    found, labels = model.segments(target, "panoptic", (8, 4))
    assert found.shape == (4, 8, 4)
    assert labels.tolist() == [0, 0, 2, 1]
    assert model.segments(target, "instance", (4, 4))[1].tolist() == [0, 0, 1]
    found, labels = model.segments(target, "semantic", (4, 4))
    assert labels.tolist() == [0, 1, 2]
    assert found[0].nonzero()[:, 0].unique().tolist() == [0, 1]
    ids = tv_tensors.Mask((masks * torch.tensor([5, 6, 8, 9])[:, None, None]).sum(0).int())
    of_ids = {"panoptic": ids, "segment_ids": torch.tensor([5, 6, 8, 9]), "labels": target["labels"]}
    for task in ("panoptic", "semantic", "instance"):
        expected = model.segments(target, task, (4, 8))
        assert all(map(torch.equal, model.segments(of_ids, task, (4, 8)), expected))
    plain = tv_tensors.Mask(torch.tensor([[0, 255], [2, 2]], dtype=torch.uint8))
    found, labels = model.segments({"semantic": plain}, "semantic", (2, 2))
    assert labels.tolist() == [0, 2]
    assert found.tolist() == [[[1, 0], [0, 0]], [[0, 0], [1, 1]]]
    with pytest.raises(
        UserError, match=r"the data has no masks, which mask2former is trained with for the task panoptic"
    ):
        model.segments({"semantic": plain}, "panoptic", (2, 2))


TEXTS = dict(width=64, queries=6, text_layers=1, text_context=2, class_names=["tree", "car", "sky"], task="detection")


def a_car_a_tree_and_a_car():
    masks = tv_tensors.Mask(torch.ones(3, 32, 32, dtype=torch.bool))
    return [torch.randn(3, 32, 32)], [{"masks": masks, "labels": torch.tensor([1, 0, 1])}]


def test_texts_of_oneformer():
    seen = []

    def tokenizer(texts):
        seen.append(texts)
        tokens = torch.zeros(len(texts), 77, dtype=torch.long)
        tokens[:, 0], tokens[:, 1] = 49406, 49407
        return tokens

    model = tiny("oneformer", tokenizer=tokenizer, **TEXTS)
    losses = model(*a_car_a_tree_and_a_car())
    assert seen == [["a photo with a car", "a photo with a tree", "an instance photo"]]  # each is read once
    texts = ["a photo with a tree", "a photo with a car", "a photo with a car", "an instance photo"]
    assert model.texts([1, 0, 1], "instance") == texts
    assert losses.keys() == {"loss_class", "loss_mask", "loss_dice", "loss_contrastive"}
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.eval().predict([torch.randn(3, 32, 32)])[0]["masks"].shape[1:] == (32, 32)


def test_texts_that_are_read_once_are_where_they_belong(monkeypatch):
    """As transformers reads all texts of all images."""
    model, seen = tiny("oneformer", tokenizer="clip", **TEXTS), []
    contrast = OneFormerCriterion.loss_contrastive
    monkeypatch.setattr(
        OneFormerCriterion, "loss_contrastive", lambda self, *args: (seen.append(args[1]), contrast(self, *args))[1]
    )
    masks = tv_tensors.Mask(torch.ones(2, 32, 32, dtype=torch.bool))
    labels = [torch.tensor([1, 2]), torch.tensor([0, 1])]
    model([torch.randn(3, 32, 32)] * 2, [{"masks": masks, "labels": label} for label in labels])
    tokenize = find_tokenizer("clip")
    tokens = torch.stack([tokenize(model.texts(label.tolist(), "instance")) for label in labels])
    torch.testing.assert_close(seen[0], model.network.model.text_mapper(tokens))
    assert seen[0].shape == (2, 6, 64)


def test_tokens_of_clip():
    """Against those that CLIP and OneFormer published."""
    found = find_tokenizer("clip")(["a photo with a cat", "The task is panoptic", "the task is semantic", "cat " * 90])
    assert (found.dtype, found.shape) == (torch.int64, (4, 77))
    assert found[0].tolist() == [49406, 320, 1125, 593, 320, 2368, 49407] + [0] * 70
    assert found[1].tolist() == [*TASK_TOKENS["panoptic"]] + [0] * 70
    assert found[2].tolist() == [*TASK_TOKENS["semantic"]] + [0] * 70
    assert found[3].tolist() == [49406] + [2368] * 75 + [49407]


def test_only_training_reads_texts(monkeypatch):
    """A model with a text encoder predicts where CLIP's package is not installed, and says what its training lacks."""
    model = tiny("oneformer", tokenizer="clip", **TEXTS)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.delitem(sys.modules, "open_clip.tokenizer", raising=False)
    find_tokenizer.cache_clear()
    monkeypatch.setattr(model.network.model.text_mapper, "forward", None)
    assert model.eval().predict([torch.randn(3, 32, 32)])[0]["masks"].shape[1:] == (32, 32)
    with pytest.raises(
        UserError, match=r'tokenizer=clip needs open_clip, not installed here: pip install "dinat\[dense\]"'
    ):
        model.train()(*a_car_a_tree_and_a_car())


def test_contrast():
    """Worked out by hand: of two images, the queries of the first look like both texts."""
    criterion = OneFormerCriterion(3, None, {}, 0.1, 64, 3.0, 0.75, contrastive_temperature=1.0)
    queries, texts = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]]), torch.tensor([[[3.0, 4.0]], [[5.0, 0.0]]])
    # cosines: 0.6 and 1 of the first queries, 0.8 and 0 of the second
    of_images = (math.log(math.exp(0.6) + math.exp(1)) - 0.6 + math.log(math.exp(0.8) + 1)) / 2
    of_texts = (math.log(math.exp(0.6) + math.exp(0.8)) - 0.6 + math.log(math.exp(1) + 1)) / 2
    assert criterion.loss_contrastive(queries, texts)["loss_contrastive"].item() == pytest.approx(of_images + of_texts)


def test_oneformer_draws_a_task_per_image(monkeypatch):
    model = tiny("oneformer", things=[True, True, False])
    told = []
    run = model.run
    monkeypatch.setattr(
        model, "run", lambda batch, tasks, **kwargs: (told.extend(tasks), run(batch, tasks, **kwargs))[1]
    )
    target = {"masks": tv_tensors.Mask(torch.ones(1, 32, 32, dtype=torch.bool)), "labels": torch.tensor([2])}
    for seed in (0, 0, 1, 2):
        torch.manual_seed(seed)
        model([torch.randn(3, 32, 32)] * 4, [target] * 4)
    assert set(told) == {"semantic", "instance", "panoptic"}
    assert told[:4] == told[4:8]


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.0), (0.0, 0.0, 1.0), (0.25, 0.25, 0.5)])
def test_shares_of_the_tasks(monkeypatch, shares):
    """As the draws of 0, 1/8, 2/8, ... say: an image is for the first task whose summed share is above its draw."""
    model, told = tiny("oneformer", task_shares=shares), []

    def spy(batch, tasks, **kwargs):
        told.extend(tasks)
        raise InterruptedError

    monkeypatch.setattr(model, "run", spy)
    monkeypatch.setattr(torch, "rand", lambda count: torch.arange(count) / count)
    target = {"masks": tv_tensors.Mask(torch.ones(1, 32, 32, dtype=torch.bool)), "labels": torch.tensor([2])}
    with pytest.raises(InterruptedError):
        model([torch.randn(3, 32, 32)] * 8, [target] * 8)
    counts = [int(8 * share) for share in shares]
    assert told == ["semantic"] * counts[0] + ["instance"] * counts[1] + ["panoptic"] * counts[2]


def test_bad_arguments():
    with pytest.raises(
        UserError, match=r"must have at least three feature maps, each half as large.*strides: \[4, 8\]"
    ):
        tiny(backbone_kwargs=dict(stem_stride=4, depths=(1, 1), num_heads=(1, 2)))
    with pytest.raises(UserError, match=r"width=48: must be a multiple of 32"):
        tiny(width=48)
    with pytest.raises(UserError, match=r"things has 2 entries: must be one per class, 3"):
        tiny(things=[True, False])
    with pytest.raises(UserError, match=r"task=boxes: mask2former predicts panoptic, semantic, instance"):
        tiny().eval().predict([torch.zeros(3, 32, 32)], task="boxes")
    for shares in ((0.5, 0.5), (0.5, 0.4, 0.0), (-0.5, 1.0, 0.5)):
        with pytest.raises(UserError, match=r"task_shares=.*: give three numbers from 0, with the sum 1"):
            tiny("oneformer", task_shares=shares)
    for kwargs, message in (
        (dict(class_names=None), "class_names=None: a tokenizer needs the names of the 3 classes"),
        (dict(tokenizer="klip"), r"tokenizer=klip: no such tokenizer\. Known: clip\."),
        (dict(queries=2), r"queries=2: with a tokenizer, must be more than text_context=2\."),
        (dict(width=32), r"width=32: with a tokenizer, must be a multiple of 64\."),
    ):
        with pytest.raises(UserError, match=message):
            tiny("oneformer", **{**TEXTS, "tokenizer": "clip", **kwargs})
