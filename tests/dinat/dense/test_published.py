"""The 49 published models: the catalogue against what their authors say, and each of them at full size, on "meta"."""

import json
import re
from pathlib import Path

import pytest
import torch
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

import dinat.dense
from dinat.checkpoints import fit_dense
from dinat.classes import CLASSES
from dinat.dense import PUBLISHED
from dinat.errors import UserError

FACTS = json.loads((Path(__file__).parents[2] / "golden" / "dense" / "published.json").read_text())
LAYER_SCALE = {"nat_small", "nat_base", "dinat_base"}


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return dinat.dense.create_model(name, **kwargs)


@pytest.mark.parametrize("name", FACTS)
def test_row(name):
    row, facts = PUBLISHED[name], FACTS[name]
    assert (len(row.classes), row.task, row.figures) == (facts["classes"], facts["task"], facts["figures"])
    assert row.pretrained_cfg.url == f"https://shi-labs.com/projects/{facts['path']}"
    assert row.hub == facts.get("hub")
    assert list(row.resize.values()) == facts["resize"]
    assert row.preprocessing["transform"] == [
        {"resize": dict(zip(("shortest", "longest", "resample"), facts["resize"], strict=True))}
    ]
    assert [list(scale) for scale in row.multi_scale] == facts.get("multi_scale", [])
    views = [{"shortest": a, "longest": b, "resample": facts["resize"][2]} for a, b in facts.get("multi_scale", [])]
    assert row.preprocessing["views"] == [[{"resize": view}] for view in views]


def test_the_catalogue_is_whole():
    assert PUBLISHED.keys() == FACTS.keys()
    assert dinat.dense.list_models("*nat_mini*", pretrained=True) == [
        "mask_rcnn_nat_mini.coco", "mask_rcnn_dinat_mini.coco", "cascade_mask_rcnn_nat_mini.coco",
        "cascade_mask_rcnn_dinat_mini.coco", "upernet_nat_mini.ade20k", "upernet_dinat_mini.ade20k",
    ]  # fmt: skip


def original_shape(key, shape, widths, row):
    """That of a head's weight in the published file: golden/dense/keys.json has other channels, classes and queries."""
    if match := re.search(r"lateral_convs\.(\d)\.conv\.weight$", key):
        return [shape[0], widths[int(match[1])], *shape[2:]]
    for pattern, width in (
        (r"psp_modules\.\d\.1\.conv\.weight", widths[3]),
        (r"decode_head\.bottleneck\.conv\.weight", widths[3] + 4 * 512),
        (r"auxiliary_head\.convs\.0\.conv\.weight", widths[2]),
        (r"adapter_1\.weight", widths[0]),
        *((rf"input_proj\.{i}\.0\.weight", widths[3 - i]) for i in range(3)),
    ):
        if re.search(pattern, key):
            return [shape[0], width, *shape[2:]]
    if re.search(r"class_embed\.", key):
        return [len(row.classes) + 1, *shape[1:]]
    if re.search(r"predictor\.query_(feat|embed)\.weight", key):
        return [row.head["queries"], *shape[1:]]
    return shape


@pytest.fixture
def file_of(keys, published_weights):
    """The file of a published model as its authors wrote it, on "meta"."""

    def file_of(name):
        row = PUBLISHED[name]
        backbone = published_weights(row.backbone.partition(".")[0], meta=True)
        state = {key: value for key, value in backbone.items() if not key.startswith(("norm.", "head."))}
        widths = [len(value) for key, value in state.items() if key.endswith(".blocks.0.norm1.weight")]
        norms = {f"norm{i}.{leaf}": [width] for i, width in enumerate(widths) for leaf in ("weight", "bias")}
        heads = {key: original_shape(key, shape, widths, row) for key, shape in keys[row.method].items()}
        if "former" in row.method:
            heads["criterion.empty_weight"] = [len(row.classes) + 1]
        if row.method == "oneformer":
            heads["criterion.logit_scale"] = []
        state |= {key: torch.empty(shape, device="meta") for key, shape in norms.items()}
        return {f"backbone.{key}": value for key, value in state.items()} | {
            key: torch.empty(shape, device="meta") for key, shape in heads.items()
        }

    return file_of


@pytest.mark.parametrize("name", FACTS)
def test_model(name, file_of):
    """At full size: parameters, every block's window and dilation, layer scale, and what post-processing goes by."""
    facts, model = FACTS[name], on_meta(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert facts["params"] == (count if facts["params"] > 1000 else round(count / 1e6))
    _, backbone = model.timm_model
    for axis in (0, 1):
        found = [",".join(str(block.attn.dilation[axis]) for block in level.blocks) for level in backbone.levels]
        assert " | ".join(found) == facts["dilations"]
    windows = {tuple(block.attn.kernel_size) for level in backbone.levels for block in level.blocks}
    assert windows == {(facts["window"], facts["window"])}
    scaled = PUBLISHED[name].backbone.partition(".")[0] in LAYER_SCALE
    assert any("ls1" in key for key in model.state_dict()) == scaled
    assert (model.task, model.num_classes) == (facts["task"], facts["classes"])
    assert model.size_divisor == (1 if model.method == "upernet" else 32)
    assert model.preprocessing == PUBLISHED[name].preprocessing
    for attribute in ("object_threshold", "instances"):
        assert getattr(model, attribute, None) == facts.get(attribute)
    if "queries" in facts:
        assert model.network.config.num_queries == facts["queries"]
        assert model.combine_first == (facts["task"] == "semantic")
        if facts["task"] == "panoptic":
            assert model.things == list(PUBLISHED[name].classes.things)
    used_whole(model, file_of(name))


def used_whole(model, file):
    """Every key of the published file is used, and every weight of the model is in it."""
    content = {"model": file} if "former" in model.method else {"state_dict": file, "meta": {}}
    weights = fit_dense(content, model, model.method)
    model.load_state_dict(weights, strict=True, assign=True)
    used = {id(value) for value in weights.values()}
    unused = {key for key, value in file.items() if id(value) not in used and "in_proj" not in key}
    training = ("text_encoder.", "text_projector.", "prompt_ctx.", "criterion.logit_scale")
    assert all(key.startswith(training) for key in unused), unused


def test_classes():
    """Counts as the data sets state them; the names of COCO are torchvision's."""
    counts = {key: (len(classes), sum(classes.things), len(set(classes.ids))) for key, classes in CLASSES.items()}
    assert counts == {
        "coco": (80, 80, 80), "coco_panoptic": (133, 80, 133), "ade20k": (150, 100, 150),
        "ade20k_instance": (100, 100, 100), "cityscapes": (19, 8, 19), "cityscapes_instance": (8, 8, 8),
        "mapillary": (65, 37, 65),
    }  # fmt: skip
    categories = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    named = [(i, name) for i, name in enumerate(categories) if name not in ("__background__", "N/A")]
    assert list(zip(CLASSES["coco"].ids, CLASSES["coco"].names, strict=True)) == named
    for classes in CLASSES.values():
        assert len(set(classes.names)) == len(classes) == len(classes.things) == len(classes.ids)
        assert all(name == name.strip() and "\n" not in name for name in classes.names)
    one = {key: dict(zip(classes.ids, classes.names, strict=True)) for key, classes in CLASSES.items()}
    assert (one["coco_panoptic"][92], one["coco_panoptic"][200]) == ("banner", "rug-merged")
    assert (one["ade20k"][12], one["ade20k_instance"][149]) == ("person", "flag")
    assert (one["cityscapes"][7], one["cityscapes_instance"][33]) == ("road", "bicycle")
    assert (one["mapillary"][1], one["mapillary"][65]) == ("Bird", "Ego Vehicle")


def test_arguments_replace_or_join_those_of_the_model():
    name = "mask2former_dinat_large.coco_panoptic"
    model = on_meta(name, num_classes=5, backbone_kwargs={"drop_path_rate": 0.3}, queries=10)
    assert (model.num_classes, model.things, model.network.config.num_queries) == (5, [True] * 5, 10)
    _, backbone = model.timm_model
    assert backbone.dilations == [list(level) for level in PUBLISHED[name].dilations]
    assert backbone.levels[-1].blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert on_meta(name, task="semantic").combine_first is False
    assert PUBLISHED[name].arguments["num_classes"] == 133


def test_names_that_are_not_published():
    for name, message in (
        ("upernet_dinat_mini.ade", r"upernet_dinat_mini\.ade: no such model\. Did you mean upernet_dinat_mini\.ade20k"),
        (
            "mask_rcnn_dinat_tiny.ade20k",
            r"no such model\. Did you mean mask_rcnn_dinat_tiny\.coco, .*upernet_dinat_tiny\.ade20k",
        ),
    ):
        with pytest.raises(UserError, match=message):
            dinat.dense.create_model(name)
    with pytest.raises(UserError, match=r"backbone=resnet18: the name upernet_dinat_mini\.ade20k has a backbone"):
        dinat.dense.create_model("upernet_dinat_mini.ade20k", backbone="resnet18")
    assert on_meta("upernet_dinat_mini.shi_in1k").num_classes == 150  # a tag of the backbone
