"""Every layout that the weights exist in, for every published variant, and what is made of weights that do not fit."""

import gzip
import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch

from dinat.checkpoints import Shape, fit, read_checkpoint, resize_rpb, to_huggingface, to_native
from dinat.errors import CheckpointError, UserError

TAGGED = {
    "dinat_large_21k": "dinat_large.shi_in22k",
    "dinat_large_21k_11x11": "dinat_large_384_11x11.shi_in22k",
    "dinat_s_large_21k": "dinat_s_large.shi_in22k",
}
NAMES = json.loads(gzip.decompress((Path(__file__).parents[2] / "golden" / "published.json.gz").read_bytes()))["models"]


def huggingface(state, prefix="dinat."):
    """transformers' names, written down from design/models.md and independent of the package's own tables."""
    out = {}
    for key, value in state.items():
        if key.endswith("relative_position_index"):
            continue
        words = key.split(".")
        if words[0] == "patch_embed":
            words[0] = "embeddings"
            if words[1] == "proj":
                words[1:2] = ["patch_embeddings", "projection"]
        elif words[0] in ("levels", "layers"):
            words[0:1] = ["encoder", "levels" if words[2] in ("blocks", "downsample") else "layers"]
        words = ["layers" if word == "blocks" else word for word in words]
        name = ".".join(words)
        for there, here in (
            ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("attention.self.rpb", "attn.rpb"),
            ("attention.output.dense", "attn.proj"), ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
        ):  # fmt: skip
            name = re.sub(rf"\.{re.escape(here)}\b", f".{there}", name)
        if ".attn.qkv." in name:
            rows = len(value) // 3
            for i, part in enumerate(("query", "key", "value")):
                out[prefix + name.replace("attn.qkv", f"attention.self.{part}")] = value[i * rows : (i + 1) * rows]
        elif name.endswith(".gamma1"):
            scales = torch.stack([value, state[key[:-1] + "2"]])
            out[prefix + name.replace("gamma1", "layer_scale_parameters")] = scales
        elif name.startswith("head."):
            out[name.replace("head", "classifier")] = value
        elif name.startswith("norm"):
            out[prefix + "layer" + name] = value
        elif not name.endswith(".gamma2"):
            out[prefix + name] = value
    return out


def backbone(state, prefix, there=False):
    """A detection or segmentation model around the weights: prefix, stage norms, no final norm, no classifier."""
    widths = [len(state[key]) for key in state if re.search(r"\.(\d+)\.blocks\.0\.norm1\.weight$", key)]
    widths = widths or [len(state[key]) for key in state if re.search(r"^layers\.\d+\.norm1\.weight$", key)]
    out = {key: value for key, value in state.items() if not key.startswith(("norm.", "head."))}
    if there:
        out = huggingface(out, "")
    for i, width in enumerate(widths):
        name = f"hidden_states_norms.stage{i + 1}" if there else f"norm{i}"
        for leaf, value in (("weight", 2.0), ("bias", 3.0)):
            out[f"{name}.{leaf}"] = torch.full((width,), value, device=next(iter(state.values())).device)
    around = {"decode_head.conv_seg.weight": torch.zeros(2), "neck.patches.weight": torch.zeros(2)}
    return {prefix + key: value for key, value in out.items()} | (around if prefix else {})


LAYOUTS = {
    "published": lambda state: state,
    "huggingface": huggingface,
    "huggingface_backbone": lambda state: backbone(state, "", there=True),
    "oneformer": lambda state: backbone(state, "model.pixel_level_module.encoder.", there=True),
    "mmseg": lambda state: {"state_dict": backbone(state, "backbone."), "meta": {"epoch": 3}},
    "detectron2": lambda state: {"model": backbone(state, "backbone."), "iteration": 3},
    "timm": lambda state: {
        "epoch": 3, "arch": "nat", "args": Namespace(lr=1.0), "optimizer": {"state": {}},
        "state_dict": {f"module.{key}": torch.zeros_like(value) for key, value in state.items()},
        "state_dict_ema": {f"module._orig_mod.{key}": value for key, value in state.items()},
    },
}  # fmt: skip
BACKBONES = {"huggingface_backbone", "oneformer", "mmseg", "detectron2"}


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_of_every_variant(name, published_weights):
    """Strict loading from each, and idempotence; on the meta device."""
    state = published_weights(name, meta=True)
    model = timm.create_model(TAGGED.get(name, name), device="meta")
    dense = timm.create_model(TAGGED.get(name, name), stage_norm=True, num_classes=0, device="meta")
    for layout, laid_out in LAYOUTS.items():
        target = dense if layout in BACKBONES else model
        once = fit(laid_out(state), target)
        target.load_state_dict(once, strict=True)
        twice = fit(once, target)
        assert list(once) == list(twice), layout
        assert all(once[key] is twice[key] for key in once), layout


@pytest.mark.parametrize("name", ["nat_small", "dinat_s_tiny", "vitrpb_small"])
def test_weights_are_the_same_from_every_layout(name, published_weights):
    """Value by value; those of the published layout give the golden logits in test_models.py."""
    state, model = published_weights(name), timm.create_model(name, device="meta")
    expected = fit(state, model)
    for layout in ("huggingface", "timm"):
        weights = fit(LAYOUTS[layout](state), model)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], value) for key, value in expected.items()), layout


@pytest.mark.parametrize("name", ["dinat_mini"])
def test_golden_weights_from_every_backbone_layout(name, published_weights, tmp_path):
    """The same blocks as in the classifier, and each stage norm where it belongs."""
    state = published_weights(name)
    expected = to_native(state)
    overlay = dict(file=str(tmp_path / "laid_out.pth"))
    for layout in sorted(BACKBONES):
        torch.save(LAYOUTS[layout](state), overlay["file"])
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, stage_norm=True)
        assert model.num_classes == 0
        for key, value in model.state_dict().items():
            if re.match(r"norm\d", key):
                assert value.eq(2.0 if key.endswith("weight") else 3.0).all(), key
            elif not key.startswith("norm."):
                assert torch.equal(value, expected[key]), key
    features = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, stage_norm=True, features_only=True
    )
    own = features.model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in model.state_dict().items() if key[:5] != "norm.")
    with pytest.raises(CheckpointError, match=r"laid_out\.pth: .*create the model with stage_norm=True"):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize("name", ["nat_mini", "nat_small", "dinat_large_384_11x11"])
def test_huggingface_there_and_back(name, published_weights):
    state = published_weights(name, meta=name != "nat_small")
    native = to_native(state)
    there = to_huggingface(native, "nat.")
    expected = huggingface(state, "nat.")
    assert there.keys() == expected.keys()
    assert all(there[key].shape == expected[key].shape for key in there)
    back = to_native(there)
    assert back.keys() == native.keys()
    if name == "nat_small":
        assert all(torch.equal(there[key], expected[key]) for key in there)
        assert all(torch.equal(back[key], native[key]) for key in back)


def test_huggingface_keys_as_published(published, published_weights):
    keys = to_huggingface(to_native(published_weights("dinat_mini", meta=True)), "dinat.")
    assert {key: list(value.shape) for key, value in keys.items()} == published["keys"]["hf_dinat_mini"]


@pytest.mark.parametrize("name", NAMES)
def test_shape(name, published, published_weights):
    """Heads, windows, classes and the rest are read from the weights."""
    facts = published["models"][name]
    shape = Shape.of(to_native(published_weights(name, meta=True)))
    model = timm.create_model(TAGGED.get(name, name), device="meta")
    assert shape.depths == tuple(len(level.blocks) for level in model.levels)
    assert shape.num_heads == tuple(level.blocks[0].attn.num_heads for level in model.levels)
    assert shape.kernel_size == tuple(tuple(level.blocks[0].attn.kernel_size) for level in model.levels)
    assert shape.embed_dim == model.feature_info[0]["num_chs"]
    assert shape.mlp_ratio == facts["arch"].get("mlp_ratio", 4)
    assert shape.layer_scale == (facts["arch"].get("layer_scale") is not None)
    assert (shape.num_classes, shape.in_chans, shape.stage_norm) == (model.num_classes, 3, False)


def tiny(**options):
    arguments = dict(img_size=16, embed_dim=8, depths=(1, 2), num_heads=(1, 2), stem_stride=2) | options
    return timm.create_model("dinat_pico", **arguments)


@pytest.fixture
def from_file(tmp_path):
    """Creates the tiny model from a state dict in a file."""

    def from_file(state, **options):
        torch.save(state, tmp_path / "weights.pth")
        overlay = dict(file=str(tmp_path / "weights.pth"))
        return tiny(pretrained=True, pretrained_cfg_overlay=overlay, **options)

    return from_file


def test_classes_and_channels_come_from_the_file(tmp_path):
    """Also where a configuration says something else."""
    state = tiny(num_classes=21842, in_chans=1).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    for claims in ({}, dict(num_classes=1000, input_size=(3, 16, 16))):
        overlay = dict(file=str(tmp_path / "weights.pth"), **claims)
        model = tiny(pretrained=True, pretrained_cfg_overlay=overlay)
        assert (model.num_classes, model.in_chans) == (21842, 1)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_new_head_and_other_channels(from_file):
    state = tiny(num_classes=21842).state_dict()
    model = from_file(state, num_classes=3, in_chans=1)
    assert model.head.fc.weight.shape == (3, 16)
    stem = "patch_embed.proj.0.weight"
    torch.testing.assert_close(model.state_dict()[stem], state[stem].sum(1, keepdim=True))
    assert all(
        torch.equal(value, state[key])
        for key, value in model.state_dict().items()
        if not key.startswith(("head", stem))
    )
    with_head = from_file(state, num_classes=21842)
    assert torch.equal(with_head.head.fc.weight, state["head.fc.weight"])


def test_bias_tables_are_resized(from_file):
    state = tiny(kernel_size=3, num_classes=2).state_dict()
    state["levels.0.blocks.0.attn.rpb"] = torch.arange(25.0).reshape(1, 5, 5)
    model = from_file(state, kernel_size=5)
    table = model.levels[0].blocks[0].attn.rpb
    assert table.shape == (1, 9, 9)
    torch.testing.assert_close(table[0, 4, 4], torch.tensor(12.0))  # the middle stays
    state["levels.0.blocks.0.attn.rpb"] = torch.tensor([0.0, 1, 4, 9, 16]).expand(1, 5, 5)
    across = from_file(state, kernel_size=5).levels[0].blocks[0].attn.rpb[0, 0]
    place = (3 + 0.5) * 5 / 9 - 0.5  # of the fourth of nine among five, without aligned corners: 1 + t
    t, a = place - 1, -0.75  # Keys' cubic convolution
    far = [a * ((d - 5) * d + 8) * d - 4 * a for d in (1 + t, 2 - t)]
    near = [((a + 2) * d - (a + 3)) * d * d + 1 for d in (t, 1 - t)]
    expected = far[0] * 0 + near[0] * 1 + near[1] * 4 + far[1] * 9
    torch.testing.assert_close(across[3], torch.tensor(expected))
    torch.testing.assert_close(table[0].flip(0, 1), 24 - table[0], atol=1e-4, rtol=0)  # and the symmetry
    half = resize_rpb(torch.ones(1, 5, 5, dtype=torch.bfloat16), (4, 3))
    assert (half.shape, half.dtype, half.eq(1).all().item()) == ((1, 7, 5), torch.bfloat16, True)


@pytest.mark.parametrize(
    ("weights", "model", "reason"),
    [
        (dict(ls_init_value=1e-5), {}, r"The checkpoint has layer scale, the model has not"),
        ({}, dict(ls_init_value=1e-5), r"The model has layer scale \(ls_init_value\), the checkpoint has not"),
        (dict(stage_norm=True), {}, r"create the model with stage_norm=True"),
        (dict(num_heads=(1, 1)), {}, r"levels\.1\.blocks\.0\.attn\.rpb is \(1, 5, 5\), not \(2, 5, 5\)"),
        (
            dict(depths=(1, 1)),
            {},
            r"another architecture than this NAT: 13 entries differ \(lacks levels\.1\.blocks\.1",
        ),
        (dict(mlp_ratio=4.0), {}, r"mlp\.fc1\.bias is \(32,\), not \(24,\)"),
    ],
    ids=["scale", "no_scale", "norms", "heads", "depth", "mlp"],
)
@pytest.mark.parametrize("num_classes", [10, 3])
def test_another_architecture_is_refused(from_file, weights, model, reason, num_classes):
    """Also where the head is new, which timm takes for leave to load what fits and keep silent about the rest."""
    state = tiny(num_classes=10, **weights).state_dict()
    with pytest.raises(CheckpointError, match=rf"weights\.pth: .*{reason}"):
        from_file(state, num_classes=num_classes, **model)


def test_another_patch_size_is_refused():
    """All shapes but those of the stem are the same, and the stem is timm's to adapt."""
    options = dict(img_size=16, embed_dim=8, depths=(1, 1), num_heads=(1, 2))
    state = timm.create_model("dinat_s_tiny", stem_stride=2, **options).state_dict()
    with pytest.raises(CheckpointError, match=r"1 entries differ \(patch_embed\.proj\.weight is \(8, 3, 2, 2\), not"):
        fit(state, timm.create_model("dinat_s_tiny", stem_stride=4, **options))


def test_weights_of_something_else_are_refused(from_file):
    with pytest.raises(CheckpointError, match=r"no backbone of the NAT family; its keys begin \['conv1\.0"):
        from_file(timm.create_model("resnet10t").state_dict())
    with pytest.raises(CheckpointError, match="none of the NAT family"):
        from_file(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict())
    state = tiny().state_dict()
    with pytest.raises(CheckpointError, match=r"2 backbones, student\., teacher\."):
        from_file({f"{prefix}.{key}": value for prefix in ("student", "teacher") for key, value in state.items()})
    with pytest.raises(CheckpointError, match="no such file"):
        tiny(pretrained=True, pretrained_cfg_overlay=dict(file="/nowhere/weights.pth"))
    assert issubclass(CheckpointError, UserError)
    assert issubclass(CheckpointError, RuntimeError)


def test_missing_entries_are_refused_in_every_layout(published_weights):
    model = timm.create_model("dinat_mini", device="meta")
    state = published_weights("dinat_mini", meta=True)
    del state["levels.2.blocks.3.norm2.bias"]
    for layout in ("published", "huggingface", "timm"):
        with pytest.raises(CheckpointError, match=r"1 entries differ \(lacks levels\.2\.blocks\.3\.norm2\.bias\)"):
            fit(LAYOUTS[layout](state), model)


def test_read_checkpoint_reads_no_code(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "hook": print}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "code.pth")
    for page in ("<html></html>", "\n<!DOCTYPE html>", "<?xml version='1.0'?><Error>AccessDenied</Error>"):
        (tmp_path / "page.pth").write_text(page)
        with pytest.raises(CheckpointError, match=r"page\.pth: a web page, not a checkpoint"):
            read_checkpoint(tmp_path / "page.pth")
    torch.save({"a": torch.ones(2)}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "legacy.pth")["a"].tolist() == [1, 1]
