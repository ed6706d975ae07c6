"""UPerNet: the original's outputs, transformers' own Swin, training on any pixels."""

import re
import subprocess
import sys

import pytest
import timm
import torch
from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

import dinat.dense
from dinat.dense.backbone import TimmConfig
from dinat.errors import UserError

TINY = dict(backbone="dinat_pico", channels=16, auxiliary_channels=8, num_classes=3)
PICO = dict(stem_stride=4, depths=(1, 1, 1), kernel_size=3, dilations=[[2], [1], [1]])


def tiny(**kwargs):
    return dinat.dense.create_model("upernet", **TINY | dict(backbone_kwargs=PICO) | kwargs)


def test_golden(original, golden, level_maps):
    model, expected = original("upernet", []), golden("upernet")
    for height, width in ((96, 128), (72, 104)):
        case = f"upernet/{height}x{width}"
        maps = level_maps(f"{case}/level{{}}", height, width)
        with torch.no_grad():
            logits, auxiliary = model.network.decode_head(maps), model.network.auxiliary_head(maps)
        torch.testing.assert_close(logits, expected[f"{case}/logits"], atol=1e-5, rtol=0)
        torch.testing.assert_close(auxiliary, expected[f"{case}/aux_logits"], atol=1e-5, rtol=0)


def swin_names(state):
    """timm's Swin under transformers' names, written down from both."""
    out = {}
    for key, value in state.items():
        # theirs is at the end of a layer
        name = re.sub(r"^layers_(\d)\.downsample", lambda m: f"layers_{int(m[1]) - 1}.downsample", key)
        name = "swin." + name.replace("layers_", "encoder.layers.")
        for there, here in (
            ("embeddings.patch_embeddings.projection.", "patch_embed.proj."), ("embeddings.norm.", "patch_embed.norm."),
            ("layernorm_before.", "norm1."), ("layernorm_after.", "norm2."), ("attention.o_proj.", "attn.proj."),
            ("attention.relative_position_bias.relative", "attn.relative"),
        ):  # fmt: skip
            name = name.replace(here, there)
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                out[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = rows
        else:
            out[name] = value
    return out


def test_swin_is_that_of_transformers():
    torch.manual_seed(0)
    # a size at which all maps are of whole windows, and more than one: otherwise, theirs and timm's pad and shift apart
    widths = dict(embed_dim=24, num_heads=(1, 2, 4, 8))
    theirs = SwinConfig(**widths, out_features=["stage1", "stage2", "stage3", "stage4"])
    theirs, ours = (
        UperNetForSemanticSegmentation(
            UperNetConfig(backbone_config=config, hidden_size=16, auxiliary_channels=8)
        ).eval()
        for config in (theirs, TimmConfig("swin_tiny_patch4_window7_224", widths | dict(img_size=448, stage_norm=True)))
    )
    for name, parameter in ours.named_parameters():
        if "table" in name or "norm" in name:  # whose initial values hide what they do
            torch.nn.init.normal_(parameter, mean=0.0 if "table" in name else 1.0)
    features = ours.backbone.features
    state = swin_names(features.model.state_dict())
    for i, norm in enumerate(features.norms):
        state |= {f"hidden_states_norms.stage{i + 1}.{key}": value for key, value in norm.state_dict().items()}
    missing = theirs.backbone.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    unused = re.compile(r"relative_position_index|^swin\.layernorm\.")
    assert all(unused.search(key) for key in missing.missing_keys), missing.missing_keys
    for head in ("decode_head", "auxiliary_head"):
        getattr(theirs, head).load_state_dict(getattr(ours, head).state_dict())
    images = torch.randn(1, 3, 448, 448)
    with torch.no_grad():
        expected, actual = theirs(images).logits, ours(images).logits
    assert expected.std() > 1e-3
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_saved_model_loads_in_a_fresh_process(tmp_path):
    network = tiny(backbone_kwargs=PICO | dict(drop_path_rate=0.2)).eval().network
    for name, parameter in network.named_parameters():
        if name.endswith("rpb"):
            torch.nn.init.normal_(parameter)
    network.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        torch.save((images, network(images).logits), tmp_path / "expected.pt")
    script = (
        "import sys, torch, dinat.dense.backbone\n"
        "from transformers import AutoModelForSemanticSegmentation as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1]).eval()\n"
        "images, expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "with torch.no_grad(): torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=0)\n"
        "model = model.backbone.features.model.model\n"
        "assert model.dilations == [[2], [1], [1]] and model.stage_norm, model\n"
        "assert model.levels[2].blocks[0].drop_path1.drop_prob > 0.19\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_loss_is_the_originals():
    """mmsegmentation's: mean over all pixels, ignored ones too; auxiliary loss times 0.4."""
    model = tiny(dropout=0.0, class_weights=[0.1, 1, 2]).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images, truth = torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))
    truth[0, :5] = 255
    losses = model(list(images), [{"semantic": x} for x in truth])
    maps = model.backbone(images).feature_maps
    weights = torch.tensor([0.1, 1, 2])
    for name, factor, head in (
        ("loss_semantic", 1.0, model.network.decode_head), ("loss_auxiliary", 0.4, model.network.auxiliary_head),
    ):  # fmt: skip
        logits = torch.nn.functional.interpolate(head(maps), (32, 32), mode="bilinear").movedim(1, -1)
        total = 0.0
        for scores, label in zip(logits.flatten(0, 2), truth.flatten().tolist(), strict=True):
            total += 0 if label == 255 else -weights[label] * scores.log_softmax(0)[label]
        torch.testing.assert_close(losses[name], factor * total / truth.numel(), atol=1e-6, rtol=1e-5)
    assert losses.keys() == {"loss_semantic", "loss_auxiliary"}


def test_dropout_is_of_whole_channels_and_only_in_training():
    model = tiny(dropout=0.5)
    seen = []
    model.network.decode_head.classifier.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for _ in range(4):
        model([torch.randn(3, 32, 32)] * 2, [{"semantic": torch.zeros(32, 32)}] * 2)
    zero = torch.stack([(x == 0).flatten(2).all(2) for x in seen]).float().mean()
    assert 0.2 < zero < 0.8
    model.eval()(torch.randn(1, 3, 32, 32))
    assert not (seen[-1] == 0).flatten(2).all(2).all()


def test_bad_arguments():
    with pytest.raises(UserError, match=r"class_weights has 2 entries: must be one per class, 3"):
        tiny(class_weights=[1, 2])
    with pytest.raises(UserError, match=r"task=panoptic: upernet is for semantic"):
        tiny(task="panoptic")
    two = dict(stem_stride=4, depths=(1, 1), num_heads=(1, 2))
    with pytest.raises(UserError, match=r"auxiliary_channels=8: the auxiliary head takes the third feature map, which"):
        tiny(backbone_kwargs=two)
    assert tiny(backbone_kwargs=two, auxiliary_channels=0).backbone.features.strides == [4, 8]
    with pytest.raises(UserError, match=r"two images or more at a time, .* batch_size must be at least twice"):
        tiny().train()([torch.zeros(3, 32, 32)], [{"semantic": torch.zeros(32, 32)}])
    with pytest.raises(TypeError, match=r"predict\(\) of upernet takes no threshold"):
        tiny().eval().predict([torch.zeros(3, 32, 32)], threshold=0.5)


def test_pretrained_backbone(tmp_path, monkeypatch):
    """The backbone's weights come as timm gets them."""
    donor = timm.create_model("dinat_pico", **PICO)
    torch.save(donor.state_dict(), tmp_path / "donor.pth")
    overlay = dict(pretrained_cfg_overlay=dict(file=str(tmp_path / "donor.pth")))
    model = tiny(backbone_kwargs=PICO | overlay, pretrained_backbone=True)
    weights = model.backbone.features.state_dict()
    torch.testing.assert_close(
        weights["model.model.levels.2.blocks.0.mlp.fc1.weight"], donor.levels[2].blocks[0].mlp.fc1.weight
    )
