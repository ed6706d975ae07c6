"""The models against the published ones: golden outputs, parameter counts, checkpoint keys, dilations, MACs."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from dinat_kernels import NeighborhoodAttention2d
from omegaconf import OmegaConf
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dinat  # noqa: F401  registers the models
from dinat.models.layers import GELU, NATBlock
from dinat.models.nat import checkpoint_filter_fn

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "models.safetensors")
CASES = sorted({key.split("/")[0] for key in GOLDEN})
TAGGED = {
    "dinat_large_21k": "dinat_large.shi_in22k",
    "dinat_large_21k_11x11": "dinat_large_384_11x11.shi_in22k",
    "dinat_s_large_21k": "dinat_s_large.shi_in22k",
}
PUBLISHED = [
    *(f"nat_{size}" for size in ("mini", "tiny", "small", "base")),
    *(f"dinat_{size}" for size in ("mini", "tiny", "small", "base", "large", "large_384", "large_384_11x11")),
    *(f"dinat_s_{size}" for size in ("tiny", "small", "base", "large", "large_384")),
    *(f"{kind}_{size}" for kind in ("nat_isotropic", "dinat_isotropic", "vitrpb") for size in ("small", "base")),
    *TAGGED,
]
OURS = ["dinat_pico", "dinat_nano"]


@pytest.mark.parametrize("case", CASES)
def test_golden(case, published_weights, fill, tmp_path):
    """Logits and stage statistics of the original code, through timm's own loading of a published checkpoint."""
    name, size = case.split("@")
    torch.save(published_weights(name), tmp_path / "published.pth")
    overlay = dict(file=str(tmp_path / "published.pth"))
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    image = fill.image(1, *map(int, size.split("x")))
    with torch.inference_mode():
        torch.testing.assert_close(model(image)[0], GOLDEN[f"{case}/logits"], atol=1e-4, rtol=0)
        final, stages = model.forward_intermediates(image)
    for i, stage in enumerate([final] if model.isotropic else stages):
        tokens = stage[0].flatten(1).T  # (tokens, channels)
        close = dict(atol=1e-4, rtol=0)
        torch.testing.assert_close(tokens.mean(0), GOLDEN[f"{case}/stage{i}_channel_mean"], **close)
        torch.testing.assert_close(tokens.std(1), GOLDEN[f"{case}/stage{i}_token_std"], **close)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_variant(name, published, published_weights):
    """Parameter count, strict loading of the published keys, dilations, norms and what timm is told; on meta."""
    facts = published["models"][name]
    model = timm.create_model(TAGGED.get(name, name), device="meta")
    assert sum(p.numel() for p in model.parameters()) == facts["params"]
    model.load_state_dict(checkpoint_filter_fn(published_weights(name, meta=True), model), strict=True)
    dilations = facts["arch"].get("dilations") or [[1] * d for d in facts["arch"].get("depths", [12])]
    if model.isotropic:
        dilations = [[d] for d in torch.tensor(dilations).flatten().tolist()]
    assert model.dilations == dilations
    cfg = model.pretrained_cfg
    assert list(cfg["input_size"]) == facts["input_size"]
    assert (cfg["crop_pct"], cfg["interpolation"]) == (facts["crop_pct"], facts["interpolation"])
    assert cfg["url"] == facts["checkpoint_url"]
    assert cfg.get("hf_hub_id") == facts["hf_hub_id"]
    assert (cfg["mean"], cfg["std"]) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert model.get_submodule(cfg["first_conv"]).weight.shape[1] == 3
    assert model.get_submodule(cfg["classifier"]).weight.shape[0] == cfg["num_classes"]
    assert list(cfg["pool_size"]) == [side // model.feature_info[-1]["reduction"] for side in cfg["input_size"][1:]]
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}
    assert not list(model.buffers())


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiply_adds(name, published):
    """Published MACs; ours count visible keys of the padded maps, as theirs did. Bias and norms are not counted."""
    facts = published["models"][name]
    model = timm.create_model(TAGGED.get(name, name), device="meta").eval()
    image = torch.empty(1, 3, facts["gmacs_at"], facts["gmacs_at"], device="meta")
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(facts["gmacs"], rel=0.01)


@pytest.mark.parametrize("name", ["dinat_mini", "nat_small", "dinat_s_tiny", "dinat_isotropic_small", "vitrpb_small"])
def test_filter_is_idempotent(name, published_weights):
    model = timm.create_model(name, device="meta")
    once = checkpoint_filter_fn(published_weights(name), model)
    twice = checkpoint_filter_fn(once, model)
    assert once.keys() == twice.keys() == model.state_dict().keys()
    assert all(torch.equal(once[key], twice[key]) for key in once)


def test_deprecated_names_map_to_tags():
    for name, tagged in TAGGED.items():
        with pytest.warns(UserWarning, match=f"Mapping deprecated model name {name} to current {tagged}"):
            model = timm.create_model(name, device="meta")
        assert model.num_classes == 21841


@pytest.mark.parametrize("name", OURS)
def test_small_family(name):
    model = timm.create_model(name, num_classes=10).eval()
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 4e6
    assert not model.pretrained_cfg["url"]
    for side in (32, 64, 96):
        assert model(torch.randn(1, 3, side, side)).shape == (1, 10)
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(name, pretrained=True)


def test_dilation_policies():
    coco = timm.create_model("dinat_mini", img_size=800, dilations="gradual", device="meta")
    assert coco.dilations == [
        [1, 28, 1],
        [1, 7, 1, 14],
        [1, 3, 1, 5, 1, 7],
        [1, 3, 1, 3, 1],
    ]  # the published COCO model
    assert timm.create_model("dinat_mini", dilations=1, device="meta").dilations == [[1] * d for d in (3, 4, 6, 5)]
    explicit = [[1, 2, 3], [1, 1, 1, 1], [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, (1, 2)]]
    model = timm.create_model("dinat_mini", dilations=explicit, device="meta")
    assert model.dilations == explicit
    assert model.levels[3].blocks[4].attn.dilation == [1, 2]
    assert timm.create_model("dinat_tiny", img_size=(192, 448), device="meta").dilations[0] == [1, 6, 1]
    flat = timm.create_model("dinat_isotropic_small", dilations=[1, 2, 1] * 4, device="meta")
    assert [level.blocks[0].attn.dilation[0] for level in flat.levels] == [1, 2, 1] * 4


def test_set_input_size_recomputes_dilations_and_forward_does_not():
    model = timm.create_model("dinat_pico", num_classes=3).eval()
    before = [list(level) for level in model.dilations]
    model(torch.randn(1, 3, 96, 64))
    assert model.dilations == before
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.set_input_size(img_size=(96, 96))
    assert model.dilations == [[1, 16], [1, 8], [1, 4] * 3]
    assert [block.attn.dilation[0] for block in model.levels[0].blocks] == [1, 16]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    model.set_input_size(dilations=1)
    assert model.img_size == (96, 96)
    model.set_input_size(img_size=64)
    assert model.dilations == [[1, 1], [1, 1], [1] * 6]  # the policy stays
    assert [block.attn.dilation for block in model.levels[0].blocks] == [[1, 1], [1, 1]]


@pytest.mark.parametrize("value", [0, -7, "7", 7.0, (7, 0), (7, 7, 7)])
@pytest.mark.parametrize("name", ["img_size", "kernel_size"])
def test_impossible_sizes_are_named(name, value):
    argument = [value] * 3 if name == "kernel_size" and isinstance(value, tuple) else value  # one for each level
    with pytest.raises(
        ValueError, match=rf"{name} must be a positive int or two of them, .* got {re.escape(repr(value))}"
    ):
        timm.create_model("dinat_pico", device="meta", **{name: argument})


def test_a_refused_input_size_changes_nothing():
    model = timm.create_model("dinat_pico", device="meta")
    before = model.img_size, model.dilations
    with pytest.raises(ValueError, match="dilations must be"):
        model.set_input_size(img_size=64, dilations="foo")
    assert (model.img_size, model.dilations) == before
    model.set_input_size(img_size=64)


@pytest.mark.parametrize("name", ["dinat_pico", "dinat_isotropic_small"])
def test_resolved_dilations_are_a_valid_argument(name):
    model = timm.create_model(name, device="meta")
    again = timm.create_model(name, dilations=model.dilations, device="meta")
    assert again.dilations == model.dilations
    again.prune_intermediate_layers([1])
    again.set_input_size(img_size=64)


def test_set_input_size_resizes_bias_tables():
    model = timm.create_model("dinat_pico", num_classes=3).eval()
    for parameter in model.parameters():
        if parameter.dim() == 3:
            torch.nn.init.constant_(parameter, 0.25)
    block = model.levels[0].blocks[1]
    block.attn.rpb.requires_grad_(False)
    model.set_input_size(img_size=64, kernel_size=5)
    assert [other.attn.rpb.requires_grad for other in model.levels[0].blocks] == [True, False]
    assert block.attn.kernel_size == [5, 5]
    assert block.attn.dilation == [6, 6]
    torch.testing.assert_close(block.attn.rpb, torch.full((1, 9, 9), 0.25))
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_full_attention_is_full_and_asks_for_its_size():
    model = timm.create_model("vitrpb_small", img_size=(64, 96), num_classes=5).eval()
    image = torch.randn(1, 3, 64, 96)
    layer, x = model.levels[0].blocks[0].attn, torch.randn(2, 4, 6, 384)
    with torch.no_grad():
        assert model(image).shape == (1, 5)
        q, k, v = layer.qkv(x).view(2, 24, 3, 12, 32).permute(2, 0, 3, 1, 4)
        rows = torch.arange(4)[None, :] - torch.arange(4)[:, None] + 3
        columns = torch.arange(6)[None, :] - torch.arange(6)[:, None] + 5
        bias = layer.rpb[:, rows[:, None, :, None], columns[None, :, None, :]].reshape(12, 24, 24)
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        torch.testing.assert_close(layer(x), layer.proj(dense.transpose(1, 2).reshape(2, 4, 6, 384)))
    for size in ((96, 96), (64, 64)):
        with pytest.raises(AssertionError, match="set_input_size"):
            model(torch.randn(1, 3, *size))
    model.set_input_size(img_size=(90, 96))  # 6 x 6 tokens, of a padded image
    assert layer.kernel_size == [6, 6]
    assert model(torch.randn(1, 3, 90, 96)).shape == (1, 5)


@pytest.mark.parametrize("name", ["dinat_pico", "dinat_s_tiny", "dinat_isotropic_small"])
def test_features_are_channels_last(name):
    model = timm.create_model(name, device="meta")
    image = torch.empty(2, 3, 64, 96, device="meta").to(memory_format=torch.channels_last)
    final, features = model.forward_intermediates(image)
    for feature in [final, *features]:
        assert feature.is_contiguous(memory_format=torch.channels_last)


def test_features_only():
    backbone = timm.create_model("dinat_mini", features_only=True, out_indices=(-3, -1), device="meta")
    features = backbone(torch.empty(2, 3, 96, 160, device="meta"))
    assert [tuple(f.shape) for f in features] == [(2, 128, 12, 20), (2, 512, 3, 5)]
    assert backbone.feature_info.reduction() == [8, 32]
    isotropic = timm.create_model("nat_isotropic_small", features_only=True, out_indices=(2, 5, 8, 11), device="meta")
    features = isotropic(torch.empty(1, 3, 64, 96, device="meta"))
    assert [tuple(f.shape) for f in features] == [(1, 384, 4, 6)] * 4
    isotropic = timm.create_model("nat_isotropic_small", features_only=True, device="meta")
    assert isotropic.feature_info.module_name() == ["levels.9", "levels.10", "levels.11"]  # the last three, as ViTs


def test_intermediate_features():
    model, image = timm.create_model("dinat_pico", num_classes=4).eval(), torch.randn(2, 3, 32, 32)
    ran = []
    for i, level in enumerate(model.levels):
        level.register_forward_hook(lambda *_, i=i: ran.append(i))
    with torch.no_grad():
        features = model.forward_features(image)
        final, raw = model.forward_intermediates(image)
        *lower, normed = model.forward_intermediates(image, norm=True, intermediates_only=True)
        del ran[:]
        stopped, (first,) = model.forward_intermediates(image, indices=[0], stop_early=True)
    assert ran == [0]
    assert torch.equal(final, features)
    assert torch.equal(normed, features)
    assert not torch.equal(raw[-1], features)
    for actual, expected in zip([*lower, stopped, first], [*raw[:2], raw[0], raw[0]], strict=True):
        assert torch.equal(actual, expected)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
    with pytest.raises(ValueError, match="output_fmt must be \"NCHW\", got 'NLC'"):
        model.forward_intermediates(image, output_fmt="NLC")


def test_pruned_to_intermediate_features():
    model, image = timm.create_model("dinat_pico", num_classes=4).eval(), torch.randn(1, 3, 32, 32)
    expected, logits = model.forward_intermediates(image, intermediates_only=True), model(image)
    assert model.prune_intermediate_layers([-1], prune_head=False) == [2]
    assert torch.equal(model(image), logits)
    assert model.prune_intermediate_layers([1]) == [1]
    for actual, before in zip(model.forward_intermediates(image, intermediates_only=True), expected, strict=False):
        assert torch.equal(actual, before)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"patch_embed", "levels"}
    assert (len(model.levels), len(model.feature_info), len(model.dilations), model.num_features) == (2, 2, 2, 64)
    assert model(image).shape == (1, 64, 8, 8)


def test_stage_norm():
    """Each feature map is normed; the next level still receives the raw one."""
    plain = timm.create_model("dinat_pico", features_only=True).eval()
    normed = timm.create_model("dinat_pico", features_only=True, stage_norm=True).eval()
    missing = normed.model.load_state_dict(
        {key.replace("levels_", "levels."): value for key, value in plain.state_dict().items()}, strict=False
    )
    assert not missing.unexpected_keys
    assert {key.split(".")[0] for key in missing.missing_keys} == {"norm0", "norm1", "norm2"}
    image = torch.randn(1, 3, 32, 32)
    for raw, out in zip(plain(image), normed(image), strict=True):
        torch.testing.assert_close(
            out, torch.nn.functional.layer_norm(raw.movedim(1, -1), raw.shape[1:2]).movedim(-1, 1)
        )


@pytest.mark.parametrize(
    ("name", "options"),
    [("dinat_pico", dict(out_indices=(0, 2))), ("dinat_pico", dict(out_indices=(1,))), ("nat_isotropic_small", {})],
)
def test_every_stage_norm_that_is_kept_gets_a_gradient(name, options):
    """A parameter without one stops DistributedDataParallel."""
    model = timm.create_model(name, features_only=True, stage_norm=True, **options)
    sum(feature.sum() for feature in model(torch.randn(1, 3, 32, 32))).backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []
    model.model.prune_intermediate_layers(model.feature_info.out_indices)  # nothing more to remove


def test_stage_norm_with_weights_of_a_classifier(tmp_path):
    torch.save(timm.create_model("dinat_pico").state_dict(), tmp_path / "classifier.pth")
    overlay = dict(file=str(tmp_path / "classifier.pth"))
    model = timm.create_model("dinat_pico", pretrained=True, pretrained_cfg_overlay=overlay, stage_norm=True)
    assert model.norm2.weight.eq(1).all()
    with pytest.raises(ValueError, match="stage_norm needs feature_cls=\"getter\", got 'list'"):
        timm.create_model("dinat_pico", features_only=True, stage_norm=True, feature_cls="list")


@pytest.mark.parametrize("name", ["dinat_pico", "nat_isotropic_small"])
def test_impossible_output_stride(name):
    with pytest.raises(ValueError, match=r"output_stride must be (8|16), the natural one of this model, got 4"):
        timm.create_model(name, output_stride=4, device="meta")


def test_wrong_dilations():
    with pytest.raises(ValueError, match=r"one list per level with one entry per block, \[2, 2, 6\] entries"):
        timm.create_model("dinat_pico", dilations=[[1, 1]], device="meta")
    with pytest.raises(ValueError, match='"max", "gradual" or a list of lists, got \'large\''):
        timm.create_model("dinat_pico", dilations="large", device="meta")
    with pytest.raises(ValueError, match="one list per level"):
        timm.create_model("dinat_pico", dilations=[1, 2, 3], device="meta")
    with pytest.raises(ValueError, match="kernel_size must be one int or one per level, 3, got"):
        timm.create_model("dinat_pico", kernel_size=(3, 3), device="meta")
    with pytest.raises(ValueError, match="num_heads must have one entry per level, 3"):
        timm.create_model("dinat_pico", num_heads=(1, 2), device="meta")


def test_windows_from_configuration_files_and_arrays():
    """Lists of OmegaConf, integers of numpy."""
    expected = timm.create_model("dinat_pico", kernel_size=(3, 5, 3), dilations=[[1, 2], [1, 2], [1] * 6])
    configured = OmegaConf.create(dict(kernel_size=[3, 5, 3], dilations=[[1, 2], [1, 2], [1] * 6]))
    model = timm.create_model("dinat_pico", kernel_size=configured.kernel_size, dilations=configured.dilations)
    assert [m.extra_repr() for m in model.modules()] == [m.extra_repr() for m in expected.modules()]
    model = timm.create_model("dinat_pico", kernel_size=np.int64(3), dilations=np.int64(2), device="meta")
    windows = {(*m.kernel_size, *m.dilation) for m in model.modules() if isinstance(m, NeighborhoodAttention2d)}
    assert windows == {(3, 3, 2, 2)}


def test_layer_decay_and_weight_decay_groups():
    """Ten blocks one by one, between the stem and what follows them."""
    model = timm.create_model("dinat_pico", num_classes=10, device="meta")
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    scale = {names[id(p)]: g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    blocks = [f"levels.{i}.blocks.{j}" for i, depth in enumerate((2, 2, 6)) for j in range(depth)]
    assert scale["head.fc.weight"] == 1
    assert scale["norm.weight"] == 0.5  # timm's grouping puts the last norm to the last block
    assert [scale[f"{block}.mlp.fc1.weight"] for block in blocks] == [0.5 ** (10 - i) for i in range(10)]
    assert scale["patch_embed.proj.0.weight"] == 0.5**11
    assert scale["levels.1.downsample.reduction.weight"] == scale["levels.1.blocks.0.mlp.fc1.weight"]
    assert decay["levels.0.blocks.0.attn.rpb"] == 0
    assert decay["levels.0.blocks.0.attn.qkv.weight"] == 0.05
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert [len(names) for names in coarse.values()] == [6, 26, 29, 81, 4]  # 13 of a block, 3 of a downsampler


def test_gradient_checkpointing_and_drop_path_change_nothing_but_memory():
    model = timm.create_model("dinat_pico", drop_path_rate=0.3, num_classes=4)
    image, calls = torch.randn(4, 3, 32, 32), []
    model.levels[1].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        model(image).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    assert len(calls) == 1
    model.set_grad_checkpointing()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == 1 + 2  # computed again
    model.set_grad_checkpointing(False)
    gradients()
    assert len(calls) == 1 + 2 + 1


def test_options_reach_their_modules():
    model = timm.create_model(
        "dinat_pico",
        in_chans=1,
        num_classes=7,
        global_pool="max",
        mlp_ratio=2.0,
        qkv_bias=False,
        drop_rate=0.1,
        proj_drop_rate=0.2,
        attn_drop_rate=0.3,
        ls_init_value=1e-4,
        act_layer="relu",
        norm_layer=nn.RMSNorm,
        backend="torch",
    )
    last = model.levels[-1].blocks[-1]
    assert (last.attn.proj_drop.p, last.mlp.drop1.p, last.mlp.drop2.p, last.attn.attn_drop.p) == (0.2, 0.2, 0.2, 0.3)
    assert last.ls1.gamma[0].item() == last.ls2.gamma[0].item() == pytest.approx(1e-4)
    assert (last.mlp.fc1.out_features, last.attn.qkv.bias, last.attn.backend) == (256, None, "torch")
    assert (type(last.mlp.act), type(last.norm1), type(last.norm2)) == (nn.ReLU, nn.RMSNorm, nn.RMSNorm)
    assert model.head.drop.p == 0.1
    assert model(torch.randn(2, 1, 32, 48)).shape == (2, 7)


def test_drop_path_rates_grow_from_block_to_block():
    model = timm.create_model("dinat_pico", drop_path_rate=0.45, device="meta")
    blocks = [block for level in model.levels for block in level.blocks]
    for name in ("drop_path1", "drop_path2"):
        rates = [getattr(block, name).drop_prob for block in blocks[1:]]
        assert rates == pytest.approx([0.05 * i for i in range(1, 10)])
        assert getattr(blocks[0], name) is None


@pytest.mark.parametrize("option", ["drop_path", "proj_drop", "ls_init_value"])
def test_a_block_whose_branches_are_off_is_the_identity(option):
    value, x = float(option != "ls_init_value"), torch.randn(2, 5, 5, 8)
    assert torch.equal(NATBlock(8, 1, 3, **{option: value})(x), x)


def test_gelu_is_exact_and_overwrites_in_inference_mode_alone():
    x = torch.linspace(-4, 4, 33)
    before, expected = x.clone(), x * (1 + torch.erf(x / 2**0.5)) / 2
    with torch.no_grad():
        torch.testing.assert_close(GELU()(x), expected)
    torch.testing.assert_close(GELU()(x.clone().requires_grad_()), expected)
    with torch.inference_mode():
        torch.testing.assert_close(GELU()(x), expected)  # not made in inference mode
        y = x.clone()
        torch.testing.assert_close(GELU()(y), expected)
    assert torch.equal(x, before)
    torch.testing.assert_close(y, expected)


def test_initial_weights():
    """Linear layers and bias tables 0.02, truncated at 2 of them or more; PyTorch's default elsewhere."""
    model = timm.create_model("dinat_nano")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert module.bias.eq(0).all(), name
        elif isinstance(module, nn.Conv2d):
            bound = (module.in_channels * 9) ** -0.5  # uniform
            assert module.weight.abs().max().item() == pytest.approx(bound, rel=0.01), name
    tables = torch.cat([block.attn.rpb.flatten() for level in model.levels for block in level.blocks])
    assert tables.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_new_classifier():
    model, image = timm.create_model("dinat_pico", num_classes=4, drop_rate=0.1).eval(), torch.randn(1, 3, 32, 32)
    model.reset_classifier(500, "catavgmax")
    assert (model.num_classes, model.head_hidden_size, model.head.drop.p) == (500, 2 * 128, 0.1)
    assert not model.head.training
    assert model.get_classifier().weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.get_classifier().bias.eq(0).all()
    model.reset_classifier(3)
    assert (model(image).shape, model.head.global_pool.pool_type) == ((1, 3), "catavgmax")  # the pooling stays
    model.reset_classifier(0)
    assert model(image).shape == (1, 2 * 128)


def test_timm_switches_fused_kernels_off():
    def layer(**options) -> tuple[bool, str | None]:
        attn = timm.create_model("dinat_pico", **options).levels[0].blocks[0].attn
        return attn.fused, attn.backend

    assert layer() == (True, None)
    try:
        timm.layers.set_fused_attn(False)
        assert layer() == (False, "torch")
        assert layer(backend="reference") == (True, "reference")
    finally:
        timm.layers.set_fused_attn(True)
    with timm.layers.set_exportable(True):
        assert layer() == (False, "torch")


def test_reference_and_torch_backends_agree():
    torch.manual_seed(0)
    model = timm.create_model("dinat_pico", num_classes=10, backend="torch")
    other = timm.create_model("dinat_pico", num_classes=10, backend="reference")
    other.load_state_dict(model.state_dict())
    image = torch.randn(2, 3, 40, 32)
    for m in (model, other):
        torch.nn.functional.cross_entropy(m(image), torch.tensor([1, 2])).backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)
