"""DiNAT on volumes: hand arithmetic, the definition, and the 2-D models whose weights it takes."""

import re

import pytest
import timm
import torch
from dinat_kernels import NeighborhoodAttention3d
from PIL import Image
from timm.layers import LayerNorm2d
from timm.optim import create_optimizer_v2
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dinat import dense
from dinat.checkpoints import resize_rpb
from dinat.errors import CheckpointError, UserError
from dinat.export import TOLERANCE, export
from dinat.models.layers import LayerNorm3d
from dinat.models.volumes import VolumeNAT, checkpoint_filter_fn
from dinat.tasks.models import export as export_folder

SMALL = dict(embed_dim=16, depths=(2, 2), num_heads=(1, 2), num_classes=3)


def small(**options) -> nn.Module:
    """Two levels, with bias tables that matter: at their initial values they hardly show."""
    model = timm.create_model("dinat_3d_pico", **dict(SMALL, **options)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("rpb"):
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        # stem, downsamplers, blocks of 10 d^2 + 12 d + 125 heads, norm and classifier; 14^3, 7^3 and 4^3 tokens, each
        # with 10 d^2 in its linear layers and 2 * 27 d in its window
        (
            "dinat_3d_pico",
            (27 * 16 + 16) + (27 * 16 * 32 + 32) + 64
            + (27 * 32 * 64 + 128) + (27 * 64 * 128 + 256)
            + 2 * (10_240 + 384 + 125) + 2 * (40_960 + 768 + 250) + 6 * (163_840 + 1_536 + 500)
            + 256 + (2 * 128 + 2),
            2744 * (27 * 16 + 27 * 16 * 32) + 343 * 27 * 32 * 64 + 64 * 27 * 64 * 128
            + 2 * 2744 * (10_240 + 1_728) + 2 * 343 * (40_960 + 3_456) + 6 * 64 * (163_840 + 6_912) + 2 * 128,
        ),
        (
            "dinat_3d_nano",
            (27 * 32 + 32) + (27 * 32 * 64 + 64) + 128
            + (27 * 64 * 128 + 256) + (27 * 128 * 256 + 512)
            + 2 * (40_960 + 768 + 250) + 2 * (163_840 + 1_536 + 500) + 4 * (655_360 + 3_072 + 1_000)
            + 512 + (2 * 256 + 2),
            2744 * (27 * 32 + 27 * 32 * 64) + 343 * 27 * 64 * 128 + 64 * 27 * 128 * 256
            + 2 * 2744 * (40_960 + 3_456) + 2 * 343 * (163_840 + 6_912) + 4 * 64 * (655_360 + 13_824) + 2 * 256,
        ),
    ],
)  # fmt: skip
def test_size_by_hand(name, parameters, multiply_adds):
    model = timm.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter:
        assert model(torch.empty(1, 1, 28, 28, 28, device="meta")).shape == (1, 2)
    assert counter.get_total_flops() == 2 * multiply_adds


def test_dilations_go_by_each_axis():
    model = timm.create_model("dinat_3d_pico", vol_size=(16, 28, 64), device="meta")
    one = (1, 1, 1)
    assert model.dilations == [[one, (2, 4, 10)], [one, (1, 2, 5)], [one, (1, 1, 2)] * 3]
    assert model.levels[0].blocks[1].attn.dilation == [2, 4, 10]
    options = dict(vol_size=(16, 28, 64), depths=(6, 2), num_heads=(1, 2), device="meta")
    gradual = timm.create_model("dinat_3d_pico", dilations="gradual", **options)
    assert gradual.dilations == [[one, (1, 2, 5), one, (1, 3, 7), one, (2, 4, 10)], [one, (1, 2, 5)]]  # halves first
    assert timm.create_model("dinat_3d_pico", dilations=2, device="meta").dilations == [[2, 2], [2, 2], [2] * 6]
    again = timm.create_model("dinat_3d_pico", dilations=model.dilations, device="meta")
    assert again.dilations == model.dilations


def test_patches_and_windows_of_each_axis():
    model = small(stem_stride=(1, 2, 4), kernel_size=[(3, 5, 7), 3], vol_size=(6, 20, 40))
    assert [info["strides"] for info in model.feature_info] == [(1, 2, 4), (2, 4, 8)]
    assert [info["reduction"] for info in model.feature_info] == [4, 8]
    assert model.levels[0].blocks[1].attn.kernel_size == [3, 5, 7]
    assert model.levels[0].blocks[1].attn.dilation == [2, 2, 1]
    volume = torch.randn(2, 1, 6, 20, 40)
    final, features = model.forward_intermediates(volume)
    assert [tuple(x.shape) for x in features] == [(2, 16, 6, 10, 10), (2, 32, 3, 5, 5)]
    assert all(x.is_contiguous(memory_format=torch.channels_last_3d) for x in [final, *features])
    torch.testing.assert_close(model.forward_head(final, pre_logits=True), final.mean((2, 3, 4)))
    torch.testing.assert_close(model(volume), model.head.fc(final.mean((2, 3, 4))))


@pytest.mark.parametrize("size", [(5, 9, 12), (3, 4, 20)])
def test_backends_agree(size):
    """Odd sizes, and maps that are shorter than their windows."""
    torch.manual_seed(0)
    model = small(backend="torch", kernel_size=(3, 5), dilations=[[1, 2], [1, (1, 2, 1)]])
    other = small(backend="reference", kernel_size=(3, 5), dilations=[[1, 2], [1, (1, 2, 1)]])
    other.load_state_dict(model.state_dict())
    volume = torch.randn(2, 1, *size)
    torch.testing.assert_close(model(volume), other(volume), atol=1e-6, rtol=1e-5)
    for m in (model, other):
        F.cross_entropy(m(volume), torch.tensor([1, 2])).backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def test_norm_of_volumes_is_that_of_maps():
    norm, volume = LayerNorm3d(8), torch.randn(2, 8, 3, 4, 5)
    nn.init.normal_(norm.weight)
    flat = LayerNorm2d(8, eps=norm.eps)
    flat.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(volume), flat(volume.flatten(2, 3)).unflatten(2, (3, 4)))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_repeated_image_gives_the_features_of_the_image(channels, tmp_path):
    """Centred weights of a classifier: everywhere, also of RGB for grey, and in deeper windows."""
    flat = timm.create_model("dinat_pico", img_size=40, **SMALL).eval()
    for parameter in flat.parameters():
        nn.init.normal_(parameter, std=0.1)
    torch.save(flat.state_dict(), tmp_path / "flat.pth")
    options = dict(vol_size=(24, 40, 40), kernel_size=[(5, 3, 3), 3], in_chans=channels)
    overlay = dict(file=str(tmp_path / "flat.pth"))
    model = timm.create_model(
        "dinat_3d_pico", pretrained=True, pretrained_cfg_overlay=overlay, **options, **SMALL
    ).eval()
    image = torch.randn(2, channels, 40, 40)
    with torch.no_grad():
        expected, maps = flat.forward_intermediates(image.expand(-1, 3, -1, -1))
        final, volumes = model.forward_intermediates(image[:, :, None].expand(-1, -1, 24, -1, -1))
        for a, e in zip([final, *volumes], [expected, *maps], strict=True):
            torch.testing.assert_close(a, e[:, :, None].expand_as(a), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.forward_head(final), flat.forward_head(expected), atol=1e-5, rtol=1e-4)


def test_mean_inflation_differs_at_the_borders_alone():
    """Before anything attends: the outermost slices see the padding, which is a third of their weights."""
    flat = timm.create_model("dinat_pico", in_chans=1, **SMALL)
    model = timm.create_model("dinat_3d_pico", inflation="mean", **SMALL)
    model.load_state_dict(checkpoint_filter_fn(flat.state_dict(), model))
    image = torch.randn(1, 1, 20, 20)
    convolved = flat.patch_embed.proj[0](image)
    slices = model.patch_embed.proj[0](image[:, :, None].expand(-1, -1, 10, -1, -1))
    torch.testing.assert_close(slices[:, :, 1:], convolved[:, :, None].expand(-1, -1, 4, -1, -1))
    bias = flat.patch_embed.proj[0].bias[:, None, None]
    torch.testing.assert_close(slices[:, :, 0], (convolved - bias) * 2 / 3 + bias)


def test_weights_of_another_architecture_or_inflation():
    model = timm.create_model("dinat_3d_pico", **SMALL)
    with pytest.raises(CheckpointError, match="another architecture than this VolumeNAT"):
        checkpoint_filter_fn(timm.create_model("dinat_nano").state_dict(), model)
    with pytest.raises(ValueError, match='inflation must be "centre" or "mean", got \'middle\''):
        timm.create_model("dinat_3d_pico", inflation="middle")


def test_windows_are_resized():
    """A table that is a product of one along the depth and one within the slices: both as PyTorch resizes maps."""
    line, slices = torch.randn(1, 1, 5, 1), torch.randn(2, 1, 9, 7)
    resized = resize_rpb((line.view(5, 1, 1) * slices), (5, 4, 6))
    line, slices = (
        F.interpolate(x, size, mode="bicubic", align_corners=False) for x, size in ((line, (9, 1)), (slices, (7, 11)))
    )
    torch.testing.assert_close(resized, line.view(9, 1, 1) * slices)

    model = small()
    model.set_input_size(vol_size=(12, 24, 48), kernel_size=[(3, 5, 5), 3])
    assert model.img_size == (12, 24, 48)
    assert model.levels[0].blocks[1].attn.rpb.shape == (1, 5, 9, 9)
    assert model.dilations == [[(1, 1, 1), (2, 2, 4)], [(1, 1, 1), (1, 2, 4)]]
    model.set_input_size(dilations=1)
    assert model(torch.randn(1, 1, 12, 24, 48)).shape == (1, 3)


@pytest.mark.parametrize("name", ["vol_size", "kernel_size", "stem_stride"])
@pytest.mark.parametrize("value", [0, (7, 7), (7, 7, 7, 7), "7"])
def test_impossible_sizes_are_named(name, value):
    argument = [value] * 3 if name == "kernel_size" else value
    message = rf"{name} must be a positive int or three of them, \(depth, height, width\), got {re.escape(repr(value))}"
    with pytest.raises(ValueError, match=message):
        timm.create_model("dinat_3d_pico", device="meta", **{name: argument})
    with pytest.raises(
        ValueError, match=r"stem_stride must be 1, 2 or 4, or one of them for each axis, got \(1, 2, 3\)"
    ):
        timm.create_model("dinat_3d_pico", device="meta", stem_stride=(1, 2, 3))


def test_timm_interfaces():
    model, volume = small(stage_norm=True), torch.randn(2, 1, 12, 16, 16)
    backbone = timm.create_model("dinat_3d_pico", features_only=True, out_indices=(0, 2))
    assert [tuple(x.shape) for x in backbone(volume)] == [(2, 32, 6, 8, 8), (2, 128, 2, 2, 2)]
    assert backbone.feature_info.reduction() == [2, 8]
    normed = model.forward_intermediates(volume, intermediates_only=True)
    torch.testing.assert_close(normed[0].mean(1), torch.zeros(2, 6, 8, 8), atol=1e-5, rtol=0)
    model.reset_classifier(5, "catavgmax")
    pooled = model.forward_head(model.forward_features(volume), pre_logits=True)
    features = model.forward_features(volume)
    torch.testing.assert_close(pooled, torch.cat([features.mean((2, 3, 4)), features.amax((2, 3, 4))], 1))
    assert model(volume).shape == (2, 5)
    model.reset_classifier(0, "")
    assert model(volume).shape == features.shape
    optimizer = create_optimizer_v2(small(), "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    assert sorted({group["lr_scale"] for group in optimizer.param_groups}) == [0.5**i for i in range(5, -1, -1)]
    assert all(isinstance(b.attn, NeighborhoodAttention3d) for level in model.levels for b in level.blocks)
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("dinat_3d_nano", pretrained=True)


def test_full_attention_asks_for_its_size():
    model = VolumeNAT(kernel_size=None, vol_size=(8, 12, 16), stem_stride=2, **SMALL)
    assert model.levels[1].blocks[0].attn.kernel_size == [2, 3, 4]
    assert model(torch.randn(1, 1, 8, 12, 16)).shape == (1, 3)
    with pytest.raises(AssertionError, match=r"\(8, 12, 16\); call set_input_size"):
        model(torch.randn(1, 1, 10, 12, 16))


def test_recomputed_gradients_are_the_same():
    model, volume, calls = small(drop_path_rate=0.3).train(), torch.randn(2, 1, 8, 12, 10), []
    model.levels[1].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        model(volume).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(), plain)
    assert len(calls) == 1 + 2


def test_compiled_without_a_break_for_any_batch_size():
    torch._dynamo.reset()
    model, volume = small(depths=(1,), num_heads=(1,), dilations=[[2]]), torch.randn(2, 1, 8, 12, 10)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (volume, volume.repeat(3, 1, 1, 1, 1), volume.repeat(2, 1, 1, 1, 1)):
            torch.testing.assert_close(compiled(batch), model(batch), atol=1e-5, rtol=1e-4)
    assert counter.frame_count <= 2


def test_exported_as_plain_operations(tmp_path):
    model, volume = small(depths=(1,), num_heads=(1,), dilations=[[2]]), torch.randn(2, 1, 10, 8, 14)
    program = torch.export.export(model, (volume,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert not [node for node in program.graph.nodes if "dinat" in str(node.target)]
    wider = torch.cat([volume, volume])
    torch.testing.assert_close(program.module()(wider), model(wider), atol=1e-5, rtol=1e-5)
    pytest.importorskip("onnxscript", reason="the package onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    assert export(model, volume[:1], tmp_path / "model.onnx") < TOLERANCE


def test_what_is_for_images_refuses_volumes(dinat, tmp_path):
    model = small(depths=(1,), num_heads=(1,))
    (tmp_path / "run").mkdir()
    export_folder(
        model,
        tmp_path / "run",
        {"input_size": (1, 28, 28, 28)},
        dict(SMALL, depths=(1,), num_heads=(1,), vol_size=28),
        [],
    )
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    status, _, errors = dinat("predict", tmp_path / "photo.png", "--model", f"local-dir:{tmp_path / 'run'}")
    assert status == 2
    assert "takes volumes, and these are images" in errors
    status, _, errors = dinat("export", "dinat_3d_pico", "--no-pretrained", "--img-size", "48", "64")
    assert status == 2
    assert "img_size is the size of images, volumes have vol_size, got img_size=(48, 64)" in errors
    with pytest.raises(UserError, match=r"backbone=dinat_3d_pico .* it takes volumes, not images"):
        dense.create_model("upernet", num_classes=3, backbone="dinat_3d_pico")


def test_weights_of_volumes_are_told_from_those_of_maps(dinat, tmp_path):
    """Converted by their shapes, also with another window than either model has."""
    for name in ("dinat_pico", "dinat_3d_pico"):
        torch.save(timm.create_model(name, num_classes=4, kernel_size=5).state_dict(), tmp_path / f"{name}.pth")
        status, out, errors = dinat("convert", tmp_path / f"{name}.pth", tmp_path / name)
        assert (status, out.split(":")[0]) == (0, name), errors
        loaded = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True)
        assert loaded.levels[0].blocks[0].attn.kernel_size == [5] * loaded.rank
