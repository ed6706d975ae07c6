"""NATTEN's interfaces: golden outputs through the old and the new ones, gradients, and how known projects call them."""

import importlib
import importlib.util
import inspect
import json
import sys
import types
from pathlib import Path

import dinat_kernels
import pytest
import torch
from dinat_kernels import explicit, natten
from dinat_kernels.natten import functional, v0_14, v0_15, v0_17
from safetensors.torch import load_file
from torch import nn

GOLDEN = Path(__file__).parents[2] / "golden"
RPB_CASES = json.loads((GOLDEN / "ops_rpb.json").read_text())
GNA_CASES = json.loads((GOLDEN / "ops_gna.json").read_text())


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "ops_rpb.safetensors") | load_file(GOLDEN / "ops_gna.safetensors")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Several chunks of work even at the size of tests."""
    monkeypatch.setattr(explicit, "_CHUNK", 3000)


@pytest.fixture
def uninstalled():
    yield
    natten.uninstall()


def inputs(case: dict, fill) -> dict[str, torch.Tensor]:
    prefix = case.get("seed_prefix", case["name"])
    shape = (case["batch"], *case["spatial"], case["heads"], case["head_dim"])
    x = {name: fill.tensor_for_input(f"{prefix}/{name}", shape) for name in ("q", "k", "v", "dout")}
    if case["rpb"]:
        table = (case["heads"], *[2 * case["kernel_size"] - 1] * case["rank"])
        x["rpb"] = fill.tensor_for_input(f"{prefix}/rpb", table)
    return {name: tensor.requires_grad_() for name, tensor in x.items()}


def heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(-2, 1)


def old_style(rank: int, q, k, v, kernel_size, dilation, rpb=None, is_causal=None) -> torch.Tensor:
    """NATTEN 0.14 (or 0.17 with `is_causal`): scaled query, logits, softmax, average."""
    q, k, v = (heads_first(x) for x in (q, k, v))
    q = q * q.shape[-1] ** -0.5
    if is_causal is None:
        window = [kernel_size, kernel_size, dilation, dilation] if rank == 3 else [kernel_size, dilation]
        attn = getattr(functional, f"natten{rank}dqkrpb")(q, k, rpb, *window).softmax(-1)
        out = getattr(functional, f"natten{rank}dav")(attn, v, *window)
    else:
        attn = getattr(functional, f"na{rank}d_qk")(q, k, kernel_size, dilation, is_causal=is_causal, rpb=rpb)
        out = getattr(functional, f"na{rank}d_av")(attn.softmax(-1), v, kernel_size, dilation, is_causal=is_causal)
    return out.movedim(1, -2)


def new_style(rank: int, q, k, v, kernel_size, dilation, rpb=None, is_causal=False, stride=1) -> torch.Tensor:
    """NATTEN 0.21, positionally."""
    return getattr(natten, f"na{rank}d")(q, k, v, kernel_size, stride, dilation, is_causal or False, None, rpb=rpb)


@pytest.mark.parametrize("style", [old_style, new_style])
@pytest.mark.parametrize("case", RPB_CASES, ids=lambda case: case["name"])
def test_golden_with_bias(case, style, golden, fill):
    x = inputs(case, fill)
    out = style(case["rank"], x["q"], x["k"], x["v"], case["kernel_size"], case["dilation"], x["rpb"])
    torch.testing.assert_close(out, golden[f"{case['name']}/out"], atol=2e-5, rtol=0)
    out.backward(x["dout"])
    for name in ("q", "k", "v", "rpb"):
        tolerance = 2e-4 if name == "rpb" else 2e-5
        torch.testing.assert_close(x[name].grad, golden[f"{case['name']}/d{name}"], atol=tolerance, rtol=0)


@pytest.mark.parametrize("case", GNA_CASES, ids=lambda case: case["name"])
def test_golden_strided_and_causal(case, golden, fill):
    x = inputs(case, fill)
    arguments = (case["rank"], x["q"], x["k"], x["v"], case["kernel_size"], case["dilation"])
    out = new_style(*arguments, is_causal=case["is_causal"], stride=case["stride"])
    torch.testing.assert_close(out, golden[f"{case['name']}/out"], atol=2e-5, rtol=0)
    if set(case["stride"]) == {1}:
        out = old_style(*arguments, is_causal=case["is_causal"])
        torch.testing.assert_close(out, golden[f"{case['name']}/out"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradients(rank):
    """Of both functions, once and twice."""
    spatial, kernel_size = {1: ((9,), 3), 2: ((5, 6), (3, 2)), 3: ((3, 4, 2), (3, 2, 1))}[rank]
    dilation = {1: 2, 2: (1, 3), 3: (1, 2, 1)}[rank]
    q, k, v = (torch.randn(2, 1, *spatial, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    table = [2 * s - 1 for s in ([kernel_size] if rank == 1 else kernel_size)]
    rpb = torch.randn(1, *table, dtype=torch.float64, requires_grad=True)
    qk, av = getattr(functional, f"na{rank}d_qk"), getattr(functional, f"na{rank}d_av")

    def attend(q, k, v, rpb):
        return av(qk(q, k, kernel_size, dilation, rpb=rpb).tanh(), v, kernel_size, dilation)

    assert torch.autograd.gradcheck(attend, (q, k, v, rpb))
    assert torch.autograd.gradgradcheck(attend, (q, k, v, rpb), fast_mode=True)


def test_half_precision():
    q, k, v = (torch.randn(1, 2, 8, 9, 16).bfloat16().requires_grad_() for _ in range(3))
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    attn = functional.natten2dqkrpb(q, k, rpb, 3, 2)
    out = functional.natten2dav(attn.float().softmax(-1), v, 3, 2)
    assert attn.dtype == out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.dtype == k.grad.dtype == v.grad.dtype == torch.bfloat16
    q, k, v = (x.detach().float().movedim(1, -2) for x in (q, k, v))
    exact = dinat_kernels.na2d(q, k, v, 3, dilation=2, rpb=rpb, scale=1.0).movedim(-2, 1)
    torch.testing.assert_close(out.float(), exact, atol=5e-2, rtol=5e-2)


def test_autocast():
    q, k, v = (torch.randn(1, 2, 8, 9, 16) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        attn = functional.na2d_qk(q, k, 3).softmax(-1)
        out = functional.na2d_av(attn, v, 3)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.float(), functional.na2d_av(functional.na2d_qk(q, k, 3).softmax(-1), v, 3), atol=3e-2, rtol=0
    )


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.7, 0.0])
def test_additional_tokens(kv_heads, scale):
    """Against dense attention where the window is the map; grouped queries, unlike sizes of keys and values."""
    q, k, v = torch.randn(2, 3, 5, 4, 8), torch.randn(2, 3, 5, kv_heads, 8), torch.randn(2, 3, 5, kv_heads, 6)
    more_k, more_v = torch.randn(2, 7, kv_heads, 8), torch.randn(2, 7, kv_heads, 6)
    inputs = [x.requires_grad_() for x in (q, k, v, more_k, more_v)]
    keys, values = (torch.cat([x.flatten(1, 2), more], 1).transpose(1, 2) for x, more in ((k, more_k), (v, more_v)))
    expected = nn.functional.scaled_dot_product_attention(
        q.flatten(1, 2).transpose(1, 2), keys, values, scale=scale, enable_gqa=True
    )
    expected = expected.transpose(1, 2).unflatten(1, (3, 5))
    factor = 8**-0.5 if scale is None else scale
    logits = factor * q.flatten(1, 2).transpose(1, 2) @ keys.repeat_interleave(4 // kv_heads, 1).mT
    expected_lse = logits.logsumexp(-1).transpose(1, 2).unflatten(1, (3, 5))
    arguments = dict(scale=scale, additional_keys=more_k, additional_values=more_v)
    out, lse = natten.na2d(q, k, v, (3, 5), **arguments, return_lse=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(v0_17.na2d(q, k, v, (3, 5), **arguments), expected)
    weights = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), inputs, weights)
    expected_grads = torch.autograd.grad((expected, expected_lse), inputs, weights)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_additional_tokens_of_functions_with_weights(rank):
    spatial = {1: (15,), 2: (3, 5), 3: (3, 5, 2)}[rank]
    q, k, v = (torch.randn(2, 2, *spatial, 8) for _ in range(3))
    more_k, more_v = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8)
    keys, values = (torch.cat([x.flatten(2, -2), more], 2) for x, more in ((k, more_k), (v, more_v)))
    dense = nn.functional.scaled_dot_product_attention(q.flatten(2, -2), keys, values).unflatten(2, spatial)
    qk, av = getattr(functional, f"na{rank}d_qk"), getattr(functional, f"na{rank}d_av")
    attn = qk(q * 8**-0.5, k, spatial, additional_keys=more_k).softmax(-1)
    torch.testing.assert_close(av(attn, v, spatial, additional_values=more_v), dense)


def test_one_causal_axis_of_functions_with_weights():
    """In a window of all tokens, keys in later rows are hidden, those in later columns are not."""
    q, k, v = (torch.randn(1, 2, 3, 5, 8) for _ in range(3))
    row = torch.arange(15) // 5
    flat = (x.flatten(2, 3) for x in (q, k, v))
    dense = nn.functional.scaled_dot_product_attention(*flat, attn_mask=row[:, None] >= row).unflatten(2, (3, 5))
    attn = functional.na2d_qk(q * 8**-0.5, k, (3, 5), is_causal=(True, False)).softmax(-1)
    torch.testing.assert_close(functional.na2d_av(attn, v, (3, 5), is_causal=(True, False)), dense)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(6, 6), (5, 8), (8, 5)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention(is_causal, lengths, kv_heads):
    q, k, v = (
        torch.randn(2, n, h, d)
        for n, h, d in zip((*lengths, lengths[1]), (4, kv_heads, kv_heads), (8, 8, 6), strict=True)
    )
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    logits = 0.3 * q.transpose(1, 2) @ k.transpose(1, 2).repeat_interleave(4 // kv_heads, 1).mT
    if is_causal:
        later = torch.arange(lengths[1]) > torch.arange(lengths[0])[:, None]
        logits = logits.masked_fill(later, -torch.inf)
    expected = (logits.softmax(-1) @ v.transpose(1, 2).repeat_interleave(4 // kv_heads, 1)).transpose(1, 2)
    expected_lse = logits.logsumexp(-1).transpose(1, 2)
    out, lse = natten.attention(q, k, v, is_causal, 0.3, return_lse=True, backend="cutlass-fmha", q_tile_size=64)
    torch.testing.assert_close(natten.attention(q, k, v, is_causal, 0.3), expected)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    weights = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), (q, k, v), weights)
    torch.testing.assert_close(grads, torch.autograd.grad((expected, expected_lse), (q, k, v), weights))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merged_parts_are_the_whole(dtype):
    """Three unequal parts of the keys, one of which dwarfs the others."""
    q, k, v = torch.randn(1, 4, 2, 8, dtype=dtype), *torch.randn(2, 1, 9, 2, 8, dtype=dtype)
    k[:, 2:5] *= 12
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    parts = [natten.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 2), (2, 5), (5, 9))]
    out, lse = natten.merge_attentions(*map(list, zip(*parts, strict=True)))
    expected = natten.attention(q, k, v, return_lse=True)
    tolerance = dict(atol=2e-2, rtol=2e-2) if dtype == torch.bfloat16 else {}
    torch.testing.assert_close((out, lse), expected, **tolerance)
    assert (out.dtype, lse.dtype) == (dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype != torch.bfloat16:
        weights = torch.randn_like(out), torch.randn_like(lse)
        grads, expected_grads = (torch.autograd.grad(x, (q, k, v), weights) for x in ((out, lse), expected))
        torch.testing.assert_close(grads, expected_grads)


def test_autocast_of_full_attention():
    q, k, v = torch.randn(3, 1, 6, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = natten.attention(q, k, v, return_lse=True)
        near = natten.na1d(q, k, v, 3, additional_keys=k, additional_values=v)
    assert (out.dtype, near.dtype, lse.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.float(), natten.attention(q, k, v), atol=3e-2, rtol=0)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_na_with_weights_has_unlike_windows_per_axis(rank):
    """Against the operator, which is held to the definition: dilation (1, 2, 2) and others that differ."""
    spatial, kernel_size, dilation = (5, 8, 7)[:rank], (4, 3, 2)[:rank], (1, 2, 3)[:rank]
    q, k, v = (torch.randn(1, *spatial, 2, 4) for _ in range(3))
    expected = getattr(dinat_kernels, f"na{rank}d")(q, k, v, kernel_size, dilation=dilation)
    torch.testing.assert_close(old_style(rank, q, k, v, kernel_size, dilation, is_causal=False), expected)
    torch.testing.assert_close(getattr(natten, f"na{rank}d")(q, k, v, kernel_size, None, dilation, None), expected)
    torch.testing.assert_close(getattr(v0_17, f"na{rank}d")(q, k, v, kernel_size, dilation, None), expected)


def test_volumes_whose_first_axis_has_its_own_window():
    """natten3d* and 0.15's na3d_*: kernel sizes and dilations are (depth, other axes)."""
    q, k, v = torch.randn(3, 1, 2, 5, 8, 8, 4)
    rpb = torch.randn(2, 9, 5, 5)
    more_k, more_v = torch.randn(2, 1, 2, 3, 4)
    window = (5, 3, 3), (1, 2, 2)
    scores = functional.na3d_qk(q, k, *window, rpb=rpb)
    plain = functional.na3d_qk(q, k, *window)
    more = functional.na3d_qk(q, k, *window, more_k)
    out = functional.na3d_av(more, v, *window, more_v)
    apart = (5, 3, 1, 2)
    equal = dict(atol=0, rtol=0)
    torch.testing.assert_close(functional.natten3dqkrpb(q, k, rpb, *apart), scores, **equal)
    torch.testing.assert_close(v0_15.na3d_qk_with_bias(q, k, rpb, *apart), scores, **equal)
    torch.testing.assert_close(functional.natten3dqk(q, k, *apart), plain, **equal)
    torch.testing.assert_close(v0_15.na3d_qk(q, k, *apart, additional_keys=more_k), more, **equal)
    torch.testing.assert_close(v0_15.na3d_qk_with_bias(q, k, None, *apart, more_k), more, **equal)
    torch.testing.assert_close(functional.natten3dav(more, v, *apart, more_v), out, **equal)
    torch.testing.assert_close(v0_15.na3d_av(more, v, *apart, additional_values=more_v), out, **equal)
    expected = dinat_kernels.na3d(*(x.movedim(1, -2) for x in (q, k, v)), *window[:1], dilation=window[1], rpb=rpb)
    scaled = functional.natten3dqkrpb(q * 0.5, k, rpb, *apart).softmax(-1)
    torch.testing.assert_close(functional.natten3dav(scaled, v, *apart).movedim(1, -2), expected)


@pytest.mark.parametrize("rank", [1, 2])
def test_bias_in_the_words_of_0_15(rank):
    q, k = torch.randn(2, 1, 2, *(7, 9)[:rank], 4)
    bias, more = torch.randn(2, *[5] * rank), torch.randn(1, 2, 3, 4)
    scores = getattr(v0_15, f"na{rank}d_qk_with_bias")(q, k, bias=bias, kernel_size=3, dilation=2, additional_keys=more)
    expected = getattr(functional, f"na{rank}d_qk")(q, k, 3, 2, more, rpb=bias)
    torch.testing.assert_close(scores, expected, atol=0, rtol=0)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_layers_of_all_versions(rank):
    """The same parameters and, where the arguments mean the same, the same output."""
    x = torch.randn(2, *{1: (11,), 2: (7, 9), 3: (4, 5, 6)}[rank], 16)
    name = f"NeighborhoodAttention{rank}D"
    ours = getattr(dinat_kernels, f"NeighborhoodAttention{rank}d")
    plain = getattr(natten, name)(embed_dim=16, num_heads=2, kernel_size=3, stride=2, is_causal=True)
    assert "rpb" not in plain.state_dict()
    same = ours(16, 2, 3, stride=2, is_causal=True, rel_pos_bias=False)
    same.load_state_dict(plain.state_dict())
    torch.testing.assert_close(plain(x), same(x))
    biased = getattr(v0_17, name)(16, num_heads=2, kernel_size=3, dilation=None, rel_pos_bias=True)
    for old in (getattr(v0_14, name)(16, 2, 3), getattr(v0_14, name)(16, 2, 3, bias=True), ours(16, 2, 3)):
        old.load_state_dict(biased.state_dict())
        torch.testing.assert_close(old(x), biased(x))
    assert getattr(v0_17, name)(16, 2, 3).rpb is None
    assert getattr(v0_14, name)(16, 2, 3, bias=False).rpb is None


def test_3d_layer_of_0_15_has_its_own_window_in_depth():
    layer = v0_15.NeighborhoodAttention3D(16, 2, 3, kernel_size_d=5, dilation=2, dilation_d=1)
    assert (layer.kernel_size, layer.dilation) == ([5, 3, 3], [1, 2, 2])
    assert (layer.window_size, layer.window_size_d) == (6, 5)
    assert layer.rpb.shape == (2, 9, 5, 5)
    layer = v0_15.NeighborhoodAttention3D(16, 2, 3, 5, 2)
    assert (layer.kernel_size, layer.dilation) == ([5, 3, 3], [2, 2, 2])


LAYERS = [getattr(v, f"NeighborhoodAttention{rank}D") for v in (v0_14, v0_17, natten) for rank in (1, 2, 3)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.__module__[-5:]}-{layer.__name__[-2:]}")
def test_a_dilation_of_none_is_1_and_0_is_refused(layer):
    assert set(layer(16, 2, 3, dilation=None).dilation) == {1}
    with pytest.raises(ValueError, match="dilation must be at least 1, got 0 on axis"):
        layer(16, 2, 3, dilation=0)
    with pytest.raises(ValueError, match="kernel_size must be at least 1, got 0 on axis"):
        layer(16, 2, 0)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.__module__[-5:]}-{layer.__name__[-2:]}")
def test_arguments_of_layers_reach_their_place(layer):
    """All that the generation has, each with a value of its own, by name and in NATTEN's order."""
    names = list(inspect.signature(layer).parameters)
    if "args" in names:  # volumes of 0.15: what follows is as in other ranks
        names[names.index("args") :] = "bias", "qkv_bias", "qk_scale", "attn_drop", "proj_drop"
    values = dict(kernel_size=3, dilation=2, stride=3, is_causal=True, bias=False, rel_pos_bias=False, qkv_bias=False)
    values |= dict(qk_scale=0.25, attn_drop=0.125, proj_drop=0.5, kernel_size_d=5, dilation_d=1)
    values |= dict(use_experimental_ops=True)
    first = ([5], [1]) if "kernel_size_d" in names else ([3], [2])
    for made in (layer(16, 2, **{n: values[n] for n in names[2:]}), layer(16, 2, *[values[n] for n in names[2:]])):
        others = made.rank - 1
        assert (made.kernel_size, made.dilation) == (first[0] + [3] * others, first[1] + [2] * others)
        assert set(made.stride) == {3 if "stride" in names else 1}
        assert set(made.is_causal) == {"is_causal" in names}
        assert made.qkv.bias is made.rpb is None
        assert (made.scale, made.proj_drop.p) == (0.25, 0.5)
        assert made.attn_drop.p == (0.125 if "attn_drop" in names else 0)


def test_oneformer(uninstalled):
    """SHI-Labs/OneFormer, backbone/dinat.py: keywords, dilation None, published weights that have a bias."""
    natten.install("0.14")
    source = "from natten import NeighborhoodAttention2D as NeighborhoodAttention"
    exec(source, scope := {})
    assert not hasattr(sys.modules["natten"], "context")
    layer = scope["NeighborhoodAttention"](
        32, kernel_size=7, dilation=None, num_heads=2, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0
    )
    expected = dinat_kernels.NeighborhoodAttention2d(32, 2, 7)
    expected.load_state_dict(layer.state_dict())
    x = torch.randn(1, 5, 9, 32)  # padded
    torch.testing.assert_close(layer(x), expected(x))


def test_stylenat(uninstalled):
    """SHI-Labs/StyleNAT, models/stylenat.py: heads in groups, each with its own window, switches of NATTEN."""
    natten.install("0.17")
    source = "from natten.functional import natten2dqkrpb, natten2dav\nfrom natten import use_fused_na, use_autotuner"
    exec(source, scope := {})
    scope["use_fused_na"](True)
    scope["use_autotuner"](True)
    qkv = torch.randn(2, 12, 12, 3, 4, 8)
    rpb = [torch.randn(2, 13, 13), torch.randn(2, 5, 5)]
    windows = [(7, 1), (3, 4)]
    q, k, v = (x.squeeze(0).chunk(2, dim=1) for x in qkv.permute(3, 0, 4, 1, 2, 5).chunk(3, dim=0))
    attention = [scope["natten2dqkrpb"](a, b, r, *w).softmax(-1) for a, b, r, w in zip(q, k, rpb, windows, strict=True)]
    out = [scope["natten2dav"](a, b, *w) for a, b, w in zip(attention, v, windows, strict=True)]
    out = torch.cat(out, dim=1).permute(0, 2, 3, 1, 4)
    for group, (bias, (kernel_size, dilation)) in enumerate(zip(rpb, windows, strict=True)):
        heads = slice(2 * group, 2 * group + 2)
        q, k, v = qkv[..., heads, :].unbind(3)
        expected = dinat_kernels.na2d(q, k, v, kernel_size, dilation=dilation, rpb=bias, scale=1.0)
        torch.testing.assert_close(out[..., heads, :], expected)


@pytest.mark.parametrize("version", ["0.14", "0.17"])
def test_medvitv2(version, uninstalled):
    """Omid-Nejati/MedViTV2: asks for the bias in the words of the version that it finds."""
    natten.install(version)
    module = importlib.import_module("natten")
    extra = {"rel_pos_bias": True} if hasattr(module, "context") else {"bias": True}
    layer = module.NeighborhoodAttention2D(
        32, kernel_size=7, dilation=None, num_heads=1, qkv_bias=True, qk_scale=None, attn_drop=0, proj_drop=0.0, **extra
    )
    assert layer.rpb.shape == (1, 13, 13)
    layer(torch.randn(2, 14, 14, 32)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_dilation_and_stride_change_places_between_versions(uninstalled):
    q, k, v = (torch.randn(1, 12, 2, 4) for _ in range(3))
    for version, keyword in (("0.17", "dilation"), ("0.21", "stride")):
        natten.install(version)
        na1d = importlib.import_module("natten.functional").na1d
        torch.testing.assert_close(na1d(q, k, v, 3, 2), dinat_kernels.na1d(q, k, v, 3, **{keyword: 2}))
    assert importlib.import_module("natten").na1d is na1d  # in 0.17, that is a module


@pytest.mark.skipif(importlib.util.find_spec("natten") is not None, reason="NATTEN is installed")
def test_install_is_reversible():
    natten.install()
    assert importlib.util.find_spec("natten") is not None
    natten.install("0.14")  # changes its mind
    natten.uninstall()
    natten.uninstall()
    with pytest.raises(ImportError):
        importlib.import_module("natten.functional")


def test_an_installed_natten_is_replaced_only_on_request(monkeypatch, uninstalled):
    theirs = types.ModuleType("natten")
    monkeypatch.setitem(sys.modules, "natten", theirs)
    monkeypatch.setitem(sys.modules, "natten.backends", types.ModuleType("natten.backends"))
    with pytest.raises(RuntimeError, match=r"NATTEN is installed; pass override=True"):
        natten.install()
    natten.install(override=True)
    assert importlib.import_module("natten").na2d is natten.na2d
    assert "natten.backends" not in sys.modules
    natten.uninstall()
    assert importlib.import_module("natten") is theirs
    assert "natten.backends" in sys.modules


Q = torch.randn(1, 2, 6, 7, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: natten.install("0.13"), "version must be one of '0.14', '0.15', '0.17', '0.21', got '0.13'"),
        (lambda: functional.na2d_qk(Q[0], Q[0], 3), r"query must be 5-dimensional, \(batch, heads, X, Y, dim\)"),
        (lambda: functional.na2d_qk(Q, Q[..., :5, :], 3), "key must have the batch, heads and spatial sizes of query"),
        (lambda: functional.na2d_qk(Q, Q[..., :2], 3), "key must have the head_dim of query, 4, got 2"),
        (lambda: functional.na2d_qk(Q, Q, 3, 3), r"kernel_size 3 \* dilation 3 = 9 > length 6 on axis 0"),
        (lambda: functional.natten2dqkrpb(Q, Q, Q[0], 3, 1), r"rpb must have shape .* = \(2, 5, 5\)"),
        (lambda: functional.na2d_qk(Q, Q, 3, rpb=Q[0], is_causal=True), "rpb cannot be combined with a causal axis"),
        (lambda: functional.na2d_av(Q, Q, 3), "attn must have 9 weights per token, got 4"),
        (lambda: natten.na2d(Q[0, 0, 0], Q, Q, 3), "query must have 4 to 6 dimensions"),
        (lambda: natten.na2d(Q, Q, Q, 3, additional_keys=Q), "must be given together"),
        (lambda: natten.na2d(Q, Q, Q, 1, dilation=0), "dilation must be at least 1, got 0"),
        (lambda: functional.na2d_qk(Q, Q, 3, 0), "dilation must be at least 1, got 0"),
        (lambda: functional.natten3dqk(Q[None], Q[None], 1, 1, 0, 1), "dilation must be at least 1, got 0 on axis 0"),
        (lambda: natten.na2d(Q, Q, Q, 1, backend="cutlas-fna"), "backend must be None or one of .* got 'cutlas-fna'"),
        (
            lambda: natten.na2d(Q, Q, Q, 1, additional_keys=Q[0, :, 0], additional_values=Q[0]),
            r"additional_keys must be \(batch, tokens, heads, dim\) = \(1, 7, 7, 4\), got \(2, 7, 4\)",
        ),
        (
            lambda: natten.na2d(Q, Q, Q, 1, additional_keys=Q[:, 0, :, :6], additional_values=Q[:, 0]),
            r"additional_keys must be .* = \(1, 6, 7, 4\)",
        ),
        (lambda: natten.attention(Q, Q, Q), r"query must be 4-dimensional, \(batch, tokens, heads, dim\)"),
        (lambda: natten.attention(Q[0], Q[0, :1], Q[0, :1]), "key must have the batch size of query, 2, got 1"),
        (lambda: natten.attention(Q[0], Q[0], Q[0], backend="fmha"), "backend must be None or one of .* got 'fmha'"),
        (lambda: natten.attention(Q[0], Q[0], Q[0, :, :3]), "value the tokens and heads of key"),
        (
            lambda: natten.attention(Q[0], Q[0], Q[0], seqlens_Q=Q),
            "seqlens_Q: sequences packed into one are not served",
        ),
        (lambda: natten.merge_attentions([Q], [Q[..., 0]]), "two or more, and as many, got 1 outputs"),
        (lambda: natten.merge_attentions([Q, Q], [Q[..., 0], Q]), "without dim, .* at 1"),
        (
            lambda: natten.merge_attentions([Q.clone().requires_grad_(), Q], [Q[..., 0]] * 2),
            r"lse_tensors\[0\] has no gradient",
        ),
        (lambda: v0_17.na2d(Q, Q, Q, 1, xformers_kwargs=dict(attn_bias=Q)), "xformers_kwargs .* got 'attn_bias'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tuning_arguments_are_ignored_and_unknown_ones_refused():
    q = torch.randn(1, 6, 7, 2, 4)
    tuned = natten.na2d(q, q, q, 3, backend="cutlass-fna", q_tile_shape=(8, 8), torch_compile=True)
    torch.testing.assert_close(tuned, natten.na2d(q, q, q, 3))
    with pytest.raises(TypeError, match="'tile'"):
        natten.na2d(q, q, q, 3, tile=1)
    with pytest.raises(TypeError, match="'tile'"):
        natten.attention(q[0], q[0], q[0], tile=1)
    more = dict(additional_keys=q[:, 0], additional_values=q[:, 0], attention_kwargs=dict(tile=1))
    with pytest.raises(TypeError, match="'tile'"):
        natten.na2d(q, q, q, 3, **more)


def test_memory_is_linear(monkeypatch):
    """No tensor holds more than the weights of the map, the neighbors of a chunk, or a row of the map."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return result

    monkeypatch.setattr(explicit, "_CHUNK", 1 << 16)
    for side in (32, 64):
        q = torch.randn(1, 1, side, side, 8, requires_grad=True)
        rpb = torch.randn(1, 13, 13, requires_grad=True)
        with Largest() as record:
            functional.na2d_av(functional.na2d_qk(q, q, 7, 2, rpb=rpb).softmax(-1), q, 7, 2).sum().backward()
        assert record.numel <= 64 * side**2
