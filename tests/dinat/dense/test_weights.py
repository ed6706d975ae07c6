"""Published weights of dense models: the layouts they exist in, where they come from, and what is refused."""

import io
import logging
import math
import re

import pytest
import torch

import dinat.dense
from dinat.dense import PUBLISHED
from dinat.errors import CheckpointError, UserError
from dinat.tasks.models import load_dense_weights

TINY = [  # one of each method
    "mask_rcnn_dinat_mini.coco", "cascade_mask_rcnn_dinat_s_tiny.coco", "upernet_nat_small.ade20k",
    "mask2former_dinat_large.cityscapes_instance", "oneformer_dinat_large.cityscapes",
]  # fmt: skip


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def same(model, state, but=()):
    return {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])} == set(but)


def old_detectron2(state):
    """As files were written before the pixel decoder had a level of its own."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace(".query_feat.", ".static_query.")
        renamed[key] = value
    return renamed


def layouts(model, published):
    """What a file with the weights may hold: layout -> content."""
    found = {
        "ours": model.state_dict(),
        "training script": {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 3},
    }
    if "former" in model.method:
        found |= {
            "detectron2": {"model": published, "iteration": 5, "scheduler": {"last_epoch": 1}},
            "detectron2, bare": published,
            "detectron2, old": {"model": old_detectron2(published)},
        }
    else:
        found["mm"] = {
            "meta": {"CLASSES": ("a", "b"), "epoch": 36},
            "state_dict": published,
            "optimizer": {"state": {}},
        }
    if hasattr(model, "network"):
        found["transformers"] = model.network.state_dict()
    return found


@pytest.mark.parametrize("name", TINY)
def test_every_layout_gives_the_same_model(name, tiny, randomized, as_published, tmp_path):
    model, state = randomized(name)
    for layout, content in layouts(model, as_published(model)).items():
        torch.save(content, tmp_path / "weights.pth")
        again = tiny(name, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")})
        assert same(again, state), layout


HUGGINGFACE = [  # independent of the package's own table
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^patch_embed\.norm", "embeddings.norm"),
    (r"^levels\.(\d)\.downsample", lambda match: f"encoder.levels.{int(match[1]) - 1}.downsample"),
    (r"^levels\.(\d)\.blocks", r"encoder.levels.\1.layers"),
    (r"^norm(\d)", lambda match: f"hidden_states_norms.stage{int(match[1]) + 1}"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.rpb", ".attention.self.rpb"),
]


def huggingface_backbone(state):
    out = {}
    for key, value in state.items():
        for pattern, name in HUGGINGFACE:
            key = re.sub(pattern, name, key)
        if ".attn.qkv." in key:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[key.replace(".attn.qkv.", f".attention.self.{part}.")] = rows
        else:
            out[key] = value
    return out


def test_oneformer_of_the_hub(tiny, randomized, tmp_path):
    """In transformers' own names the backbone is its DiNAT."""
    name = "oneformer_dinat_large.cityscapes"
    model, state = randomized(name)
    there = huggingface_backbone(model.timm_model[1].state_dict())
    encoder = "model.pixel_level_module.encoder."
    content = {key: value for key, value in model.network.state_dict().items() if not key.startswith(encoder)}
    content |= {encoder + key: value for key, value in there.items()}
    torch.save(content, tmp_path / "pytorch_model.bin")
    again = tiny(name, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "pytorch_model.bin")})
    assert same(again, state)


@pytest.mark.parametrize("name", TINY)
def test_download(name, hub, tiny, randomized, as_published, monkeypatch):
    """From the hub if the model is there, else from the publisher; from the cache ever after."""
    row, (model, state) = PUBLISHED[name], randomized(name)
    monkeypatch.setattr(type(row), "host", hub.url)
    address = f"/{row.hub}/resolve/main/pytorch_model.bin" if row.hub else f"/projects/{row.path}"
    hub.files = {address: saved({"model": as_published(model)})}
    assert same(tiny(name, pretrained=True), state)
    assert hub.bodies() == [address]
    hub.log.clear()
    assert same(tiny(name, pretrained=True), state)
    assert not hub.log
    hub.files = {f"/projects/{row.path}": hub.files[address]}
    overlay = {"url": f"{hub.url}/projects/{row.path}#sha256={64 * '0'}", "hf_hub_id": None}
    with pytest.raises(CheckpointError, match=rf"{row.path}: .*, not the pinned {64 * '0'}"):
        tiny(name, pretrained=True, pretrained_cfg_overlay=overlay)


def test_every_failure_is_named(hub, tiny, monkeypatch):
    name = "oneformer_dinat_large.cityscapes"
    monkeypatch.setattr(type(PUBLISHED[name]), "host", hub.url)
    hub.files = {f"/projects/{PUBLISHED[name].path}": b"<!DOCTYPE html>"}
    with pytest.raises(CheckpointError, match="no source has the weights") as caught:
        tiny(name, pretrained=True)
    assert "Hugging Face hub shi-labs/oneformer_cityscapes_dinat_large: 404" in str(caught.value)
    assert "a web page, not a checkpoint" in str(caught.value)


CLASS_LAYERS = {
    "mask_rcnn": r"box_predictors|mask_fcn_logits",
    "cascade_mask_rcnn": r"box_predictors|mask_fcn_logits",
    "upernet": r"classifier",
    "mask2former": r"class_predictor|empty_weight",
    "oneformer": r"class_embed|empty_weight",
}


@pytest.mark.parametrize("name", TINY)
def test_other_classes_start_anew(name, tiny, randomized, as_published, tmp_path, caplog):
    """All but what depends on their number is loaded, and the log names that."""
    (model, state), file = randomized(name), tmp_path / "weights.pth"
    torch.save(as_published(model), file)
    caplog.set_level(logging.INFO, "dinat")
    torch.manual_seed(3)
    fresh = tiny(name, num_classes=5).state_dict()
    torch.manual_seed(3)
    other = tiny(name, num_classes=5, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    found = other.state_dict()
    anew = {key for key in found if found[key].shape != state[key].shape}
    assert anew
    assert all(re.search(CLASS_LAYERS[model.method], key) for key in anew)
    assert all(torch.equal(found[key], fresh[key]) for key in anew)
    assert all(torch.equal(found[key], state[key]) for key in found.keys() - anew)
    assert f"5 classes instead of {model.num_classes}: " in caplog.text
    assert all(key in caplog.text for key in anew)


@pytest.mark.parametrize(
    ("name", "without", "part"),
    [
        ("mask_rcnn_dinat_mini.coco", dict(masks=False), "mask_heads"),
        ("upernet_nat_small.ade20k", dict(auxiliary_channels=0), "network.auxiliary_head"),
    ],
)
def test_optional_parts_are_left_out_loudly(name, without, part, tiny, randomized, as_published, tmp_path, caplog):
    model, state = randomized(name)
    torch.save(as_published(model), tmp_path / "weights.pth")
    caplog.set_level(logging.INFO, "dinat")
    overlay = {"file": str(tmp_path / "weights.pth")}
    assert same(tiny(name, pretrained=True, pretrained_cfg_overlay=overlay, **without), state)
    assert f"tensors are of parts that the model was made without: {part}" in caplog.text


def test_files_may_lack_the_weights_of_classes_in_the_loss(tiny, randomized, as_published, tmp_path):
    name = "mask2former_dinat_large.cityscapes_instance"
    model, state = randomized(name)
    content = as_published(model)
    del content["criterion.empty_weight"]
    torch.save(content, tmp_path / "weights.pth")
    again = tiny(name, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")})
    assert same(again, state, but=["network.criterion.empty_weight"])
    assert again.state_dict()["network.criterion.empty_weight"].tolist() == pytest.approx([1.0] * 8 + [0.1])


def test_text_encoders_may_be_on_either_side(tiny, randomized, as_published, tmp_path, caplog):
    """A file and a model may both have OneFormer's, which is for training, or one of them, or none."""
    name, options = "oneformer_dinat_large.cityscapes", dict(width=64, queries=17)
    texts = options | dict(tokenizer="clip", class_names=PUBLISHED[name].classes.names, text_layers=1)
    (model, state), (plain, _) = randomized(name, **texts), randomized(name, **options)
    read = {key for key in state if ".text_mapper." in key}
    assert len(read) == 12 + 1 + 1 + 2 + 4 + 1  # a layer, both embeddings, the norm, the projector, texts of its own
    with_texts, file = as_published(model), tmp_path / "weights.pth"

    def loaded(content, **kwargs):
        torch.save({"model": content}, file)
        caplog.clear()
        return tiny(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **kwargs)

    scale = {"criterion.logit_scale": state["network.criterion.logit_scale"]}
    assert same(loaded(with_texts | scale, **texts), state)
    assert same(loaded(with_texts | scale, **options), state)
    assert "tensors are of parts that the model was made without: network." in caplog.text
    without = as_published(plain)
    again, anew = loaded(without, **texts), [*read, "network.criterion.logit_scale"]
    fitted = plain.state_dict() | {key: again.state_dict()[key] for key in anew}
    assert same(again, fitted)
    assert again.state_dict()["network.criterion.logit_scale"].item() == pytest.approx(math.log(1 / 0.07))
    assert f"{len(read)} tensors that the checkpoint lacks start anew: network.model.text_mapper" in caplog.text
    with pytest.raises(CheckpointError, match=r"1 entries differ \(lacks network\.model\.text_mapper\.prompt_ctx"):
        loaded({key: value for key, value in with_texts.items() if key != "prompt_ctx.weight"}, **texts)


@pytest.mark.parametrize(
    ("name", "of_file", "message"),
    [
        ("mask_rcnn_dinat_mini.coco", "cascade_mask_rcnn_dinat_s_tiny.coco",
         r"weights\.pth: the checkpoint is of the method cascade_mask_rcnn, the model is of the method mask_rcnn\."),
        ("cascade_mask_rcnn_dinat_s_tiny.coco", "mask_rcnn_dinat_mini.coco", r"is of the method mask_rcnn, the model"),
        ("mask2former_dinat_large.cityscapes_instance", "oneformer_dinat_large.cityscapes", r"method oneformer, the"),
        ("oneformer_dinat_large.cityscapes", "mask2former_dinat_large.cityscapes_instance", r"mask2former, the model"),
        ("oneformer_dinat_large.cityscapes", "upernet_nat_small.ade20k", r"method upernet, the model is of the method"),
        ("mask_rcnn_dinat_mini.coco", dict(num_classes=20), r"the checkpoint has 20 classes, not 80\."),
        ("upernet_nat_small.ade20k", dict(num_classes=19), r"the checkpoint has 19 classes, not 150\."),
        ("oneformer_dinat_large.cityscapes", dict(num_classes=65), r"the checkpoint has 65 classes, not 19\."),
        ("mask2former_dinat_large.cityscapes_instance", dict(queries=6), r"queries_embedder\.weight is \(6, 32\), not"),
        ("upernet_nat_small.ade20k", "upernet_dinat_small.ade20k",
         r"The model has layer scale \(ls_init_value\), the checkpoint has not\."),
        ("mask_rcnn_dinat_mini.coco", dict(backbone_kwargs=dict(ls_init_value=1e-5)),
         r"The checkpoint has layer scale, the model has not"),
        ("mask_rcnn_dinat_mini.coco", dict(backbone_kwargs=dict(kernel_size=5)),
         r"The window is 5 in the checkpoint, 3 in the model \(kernel_size\)\."),
        ("mask_rcnn_dinat_mini.coco", dict(backbone_kwargs=dict(depths=(1, 1, 1, 1), dilations=[[1]] * 4)),
         r"lacks features\.model\.model\.levels\.1\.blocks\.1"),
    ],
)  # fmt: skip
def test_another_model_is_refused(name, of_file, message, tiny, as_published, tmp_path):
    other = tiny(name, **of_file) if isinstance(of_file, dict) else tiny(of_file)
    torch.save({"model": as_published(other)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message):
        tiny(name, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"neck.more": torch.ones(1)}, r"1 keys of the checkpoint belong to no known part"),
        (lambda state: {k: v for k, v in state.items() if "rpn_reg.bias" not in k}, r"1 entries differ \(lacks rpn\."),
        (lambda state: {k: v for k, v in state.items() if "neck" in k}, r"holds no backbone of the NAT family"),
        (lambda state: {k: v for k, v in state.items() if "backbone" in k}, r"holds no head of a dense model that is"),
    ],
)
def test_what_is_not_whole_is_refused(change, message, tiny, as_published, tmp_path):
    name = "mask_rcnn_dinat_mini.coco"
    torch.save(change(as_published(tiny(name))), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message):
        tiny(name, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")})


def test_nothing_is_known_of_other_names():
    with pytest.raises(UserError, match=r"pretrained_cfg_overlay=\{'fil': 'x'\}: .*unexpected keyword argument 'fil'"):
        dinat.dense.create_model("upernet_nat_mini.ade20k", pretrained=True, pretrained_cfg_overlay={"fil": "x"})
    with pytest.raises(UserError, match=r"no weights of upernet_dinat_tiny are known\. Did you mean"):
        dinat.dense.create_model("upernet_dinat_tiny", pretrained=True)


@pytest.mark.parametrize("name", TINY)
def test_training_starts_from_published_files(name, tiny, randomized, as_published, tmp_path):
    """`model.checkpoint`: whole, or with `model.reset_head` all but what the other classes change."""
    (model, state), file = randomized(name), tmp_path / "weights.pth"
    torch.save({"model": as_published(model)}, file)
    again = tiny(name)
    load_dense_weights(again, file)
    assert same(again, state)
    other = tiny(name, num_classes=3)
    hint = (
        r"weights\.pth is of another model .*\(model\.reset_head=true takes .*\): the checkpoint has \d+ classes, not 3"
    )
    with pytest.raises(UserError, match=hint):
        load_dense_weights(other, file)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    load_dense_weights(other, file, reset_head=True)
    own = {key for key, value in before.items() if value.shape != state[key].shape or "empty_weight" in key}
    assert 0 < len(own) < 10 + 10 * name.startswith("cascade")
    assert all(torch.equal(value, (before if key in own else state)[key]) for key, value in other.state_dict().items())
    alike = tiny(name)  # as many classes, but others
    before = {key: value.clone() for key, value in alike.state_dict().items()}
    load_dense_weights(alike, file, reset_head=True)
    assert all(torch.equal(value, (before if key in own else state)[key]) for key, value in alike.state_dict().items())


def test_training_starts_from_another_published_model(tiny, randomized, as_published, tmp_path):
    """OneFormer of ADE20K from that of COCO: only what 150 classes instead of 133 change is new."""
    (model, state), file = randomized("oneformer_dinat_large.coco"), tmp_path / "weights.pth"
    torch.save({"model": as_published(model)}, file)
    options = {"pretrained": "oneformer_dinat_large.coco", "pretrained_cfg_overlay": {"file": str(file)}}
    taken = tiny("oneformer_dinat_large_1280.coco_ft_ade20k", **options).state_dict()
    assert {key for key, value in taken.items() if value.shape != state[key].shape} == {
        "network.criterion.empty_weight", "network.model.transformer_module.decoder.class_embed.weight",
        "network.model.transformer_module.decoder.class_embed.bias",
    }  # fmt: skip
    assert all(torch.equal(value, state[key]) for key, value in taken.items() if value.shape == state[key].shape)
    with pytest.raises(
        UserError, match=r"pretrained=oneformer_dinat_large\.coca: no such published model\. Did you mean"
    ):
        tiny("oneformer_dinat_large.coco", pretrained="oneformer_dinat_large.coca")
