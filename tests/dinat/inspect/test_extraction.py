"""Attention weights give the outputs that the fused operator gives, and belong to the keys of the definition."""

import numpy as np
import pytest
import timm
import torch
from dinat_kernels.impl.reference import _axis_tables

from dinat import dense
from dinat.errors import UserError
from dinat.inspect import attention, blocks, write_npz

MODELS = [  # name, arguments, (height, width) of the images
    ("nat_mini", dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4)), (60, 76)),  # padded, the last ones
    ("dinat_mini", dict(embed_dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 2, 4)), (240, 224)),
    ("dinat_s_tiny", dict(embed_dim=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 4)), (90, 70)),
    ("dinat_isotropic_small", dict(embed_dim=32, depths=(1, 1), num_heads=(2, 4)), (224, 250)),
    ("vitrpb_small", dict(embed_dim=32, depths=(1, 1), num_heads=(2, 4), img_size=(80, 96)), (80, 96)),
]


def network(name, options):
    model = timm.create_model(name, num_classes=0, **options).eval()
    for key, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=2 if key.endswith("rpb") else 0.1)  # so that weights are far from even
    return model


@pytest.mark.parametrize(("name", "options", "size"), MODELS, ids=[model[0] for model in MODELS])
def test_weights_give_the_outputs(name, options, size):
    """Applied to a layer's own values, by the keys of the definition and padding as published."""
    model, images = network(name, options), torch.randn(1, 3, *size)
    layers, calls = attention(model, images), []
    for block in blocks(model):
        block.attn.register_forward_hook(lambda layer, inputs, out: calls.append((layer, inputs[0], out)))
    with torch.no_grad():
        model(images)
    for found, (layer, x, out) in zip(layers, calls, strict=True):
        padded = [max(n, k * d) for n, k, d in zip(found.size, layer.kernel_size, layer.dilation, strict=True)]
        whole = torch.zeros(1, *padded, x.shape[-1])
        whole[:, : x.shape[1], : x.shape[2]] = x
        v = layer.qkv(whole)[..., 2 * layer.dim :].unflatten(-1, (layer.num_heads, -1))[0]
        neighbors = v[torch.as_tensor(found.rows)[:, None, :, None], torch.as_tensor(found.columns)[None, :, None]]
        average = torch.einsum("nhwk,hwknd->hwnd", found.weights[0], neighbors.flatten(2, 3))
        with torch.no_grad():
            torch.testing.assert_close(layer.proj(average.flatten(2))[None], out, atol=1e-6, rtol=1e-6)
        for keys, axis in ((found.rows, 0), (found.columns, 1)):
            visible, _ = _axis_tables(padded[axis], layer.kernel_size[axis], layer.dilation[axis], 1, False)
            assert [set(row) for row in keys.tolist()] == [set(np.flatnonzero(row)) for row in visible[: len(keys)]]
            assert (np.diff(keys) == found.dilation[axis]).all()


def test_all_blocks_in_order_with_their_strides():
    mini, isotropic = (blocks(timm.create_model(name, device="meta")) for name in ("dinat_mini", "nat_isotropic_small"))
    assert [block.strides for block in mini] == [(4, 4)] * 3 + [(8, 8)] * 4 + [(16, 16)] * 6 + [(32, 32)] * 5
    assert [block.name for block in mini][2:5] == ["0.2", "1.0", "1.1"]
    assert [(block.name, block.strides) for block in isotropic] == [(f"{i}.0", (16, 16)) for i in range(12)]


@pytest.mark.parametrize("options", [dict(features_only=True), dict(features_only=True, stage_norm=True)])
def test_backbones_within_other_models(options):
    """timm's feature extractors, and heads for dense prediction, have the weights of the model itself."""
    images = torch.randn(1, 3, 64, 48)
    plain = timm.create_model("dinat_pico").eval()
    within = timm.create_model("dinat_pico", **options).eval()
    rename = (
        (lambda key: f"model.{key}") if "stage_norm" in options else (lambda key: key.replace("levels.", "levels_"))
    )
    within.load_state_dict({rename(key): value for key, value in plain.state_dict().items()}, strict=False)
    for a, b in zip(attention(within, images), attention(plain, images), strict=True):
        assert (a.block, a.strides) == (b.block, b.strides)
        torch.testing.assert_close(a.weights, b.weights)


def test_backbone_of_a_dense_model():
    model = dense.create_model("upernet", num_classes=3, backbone="dinat_pico_patch4", channels=8).eval()
    found = attention(model, torch.randn(1, 3, 64, 96))
    sizes = {layer.strides[0]: layer.size for layer in found}
    assert sizes == {4: (16, 24), 8: (8, 12), 16: (4, 6)}


def test_the_model_is_left_as_it_was():
    model, images = network("dinat_pico", {}), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        attention(model, images)
        torch.testing.assert_close(model(images), before, atol=0, rtol=0)
    assert all(block.attn.fused and not block.attn._forward_pre_hooks for block in blocks(model))


def test_file_of_weights(tmp_path):
    layers = attention(network("dinat_pico", {}), torch.randn(1, 3, 32, 32))
    write_npz(tmp_path / "weights.npz", layers)
    arrays = np.load(tmp_path / "weights.npz")
    assert len(arrays) == 4 * len(layers)
    for layer in layers:
        assert np.array_equal(arrays[f"{layer.block}.weights"], layer.weights)
        assert np.array_equal(arrays[f"{layer.block}.columns"], layer.columns)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.npz"]


def test_bad_input():
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(UserError, match=r"model=Linear: has no neighborhood attention"):
        attention(torch.nn.Linear(2, 2), images)
    volumes = timm.create_model("dinat_3d_pico", device="meta")
    with pytest.raises(UserError, match="is for volumes"):
        blocks(volumes)
    model = timm.create_model("dinat_pico")
    with pytest.raises(ValueError, match=r"call model\.eval"):
        attention(model, images)
    layers = attention(model.eval(), images)
    assert layers[0].token(31, 2) == (1, 15)
    with pytest.raises(UserError, match=r"at=32,5: outside of the image, whose pixels are 0,0 to 31,31"):
        layers[0].window(32, 5)
    assert layers[0].window(31, 31).shape == (layers[0].heads, *layers[0].kernel_size)
