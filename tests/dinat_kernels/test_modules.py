"""The layers: parameters, small-map padding, dropout, scripting."""

import math
import re
import warnings

import pytest
import torch
from dinat_kernels import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d, modules, na2d
from dinat_kernels.geometry import make_neighborhood
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

LAYERS = {1: NeighborhoodAttention1d, 2: NeighborhoodAttention2d, 3: NeighborhoodAttention3d}


@pytest.mark.parametrize("rank", LAYERS)
def test_parameters_have_the_published_names(rank):
    layer = LAYERS[rank](16, 2, 3)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "rpb": (2, *[5] * rank),
        "qkv.weight": (48, 16),
        "qkv.bias": (48,),
        "proj.weight": (16, 16),
        "proj.bias": (16,),
    }


@pytest.mark.parametrize("qk_scale", [None, 0.4])
def test_layer_is_projection_attention_projection(qk_scale):
    layer, x = NeighborhoodAttention2d(16, 2, 3, 2, qk_scale=qk_scale, proj_drop=0.3).eval(), torch.randn(2, 7, 8, 16)
    torch.nn.init.normal_(layer.qkv.weight)  # so that the scale matters
    q, k, v = F.linear(x, layer.qkv.weight, layer.qkv.bias).view(2, 7, 8, 3, 2, 8).unbind(3)
    out = na2d(q, k, v, 3, dilation=2, rpb=layer.rpb, scale=qk_scale or 8**-0.5, backend="reference")
    torch.testing.assert_close(layer(x), layer.proj(out.flatten(-2)))
    assert layer.proj_drop.p == 0.3


def test_initial_bias_tables():
    """As published: truncated normal, 0.02."""
    assert NeighborhoodAttention2d(64, 16, 13).rpb.std().item() == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize("rank", LAYERS)
def test_small_maps_are_padded_before_the_projection(rank):
    layer = LAYERS[rank](16, 2, 3, 3)
    x = torch.randn(2, *[5, 12, 7][:rank], 16)
    padded = torch.zeros(2, *[9, 12, 9][:rank], 16)
    inside = (slice(None), *(slice(n) for n in x.shape[1:-1]))
    padded[inside] = x
    torch.testing.assert_close(layer(x), layer(padded)[inside])


@pytest.mark.parametrize(
    ("window", "spatial"),
    [
        (dict(kernel_size=3, dilation=4), (12,)),
        (dict(kernel_size=3, dilation=2), (6, 6)),
        (dict(kernel_size=(3, 2), dilation=(1, 5)), (3, 10)),
        (dict(kernel_size=4, dilation=2, stride=(2, 3), is_causal=(True, False), rel_pos_bias=False), (8, 8)),
        (dict(kernel_size=3, dilation=3), (9, 5)),  # padded
        (dict(kernel_size=2, dilation=(3, 1, 2)), (6, 2, 4)),
    ],
)
def test_where_a_dilation_group_is_one_window_it_is_an_image(window, spatial, monkeypatch):
    """Values and gradients against the reference, which knows nothing of it."""
    rank = len(spatial)
    layers = [LAYERS[rank](16, 2, **window, backend=backend) for backend in (None, "reference")]
    layers[1].load_state_dict(layers[0].state_dict())
    neighborhood = make_neighborhood(rank, *(getattr(layers[0], n) for n in ("kernel_size", "dilation")))
    sizes = [k * d for k, d in zip(*neighborhood[:2], strict=True)]
    assert modules._is_split(torch.empty(2, *sizes, 16), neighborhood)
    for axis in range(rank):
        longer = [n + (a == axis) for a, n in enumerate(sizes)]
        assert not modules._is_split(torch.empty(2, *longer, 16), neighborhood)

    x, results = torch.randn(2, *spatial, 16), []
    for layer in layers:
        inputs = [x.clone().requires_grad_(), *layer.parameters()]
        out = layer(inputs[0])
        results.append([out, *torch.autograd.grad(out.sin().sum(), inputs)])
        monkeypatch.setattr(modules, "_is_split", lambda *args: False)  # for the reference
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


def test_a_dynamic_size_stays_dynamic():
    """Though at the size of the example, dilation groups could be images."""
    layer, x = NeighborhoodAttention2d(16, 2, 3, 2), torch.randn(2, 6, 6, 16)
    for axis in (1, 2):
        torch._dynamo.mark_dynamic(x, axis)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.compiler.set_stance("fail_on_recompile"):
        for sizes in ((7, 9), (6, 8), (12, 6)):
            x = torch.randn(2, *sizes, 16)
            torch.testing.assert_close(compiled(x), layer(x))
    layer.requires_grad_(False)
    traced = make_fx(layer, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.randn(2, 6, 6, 16))
    torch.testing.assert_close(traced(x), layer(x))


def test_attributes_are_what_counts():
    """Whether a layer is scripted or not."""
    layer, x = NeighborhoodAttention2d(16, 2, 3), torch.randn(1, 6, 7, 16)
    layer.dilation, layer.scale = [2, 1], 0.5
    expected = NeighborhoodAttention2d(16, 2, 3, (2, 1), qk_scale=0.5)
    expected.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), expected(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.script(layer)(x), expected(x))


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("shape", [(2, 6, 6, 6, 16), (6, 6, 16), (2, 16, 6, 6)], ids=["3-D", "no batch", "NCHW"])
def test_input_of_another_layout(dilation, shape):
    message = r"x must be \(batch, X, Y, dim\), channels last, with dim=16, got shape " + re.escape(str(shape))
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention2d(16, 2, 3, dilation)(torch.randn(shape))


def test_idle_dropout_is_there_and_not_called():
    """Subclasses call both; our `forward` calls neither while their probability is 0."""
    layer, x = NeighborhoodAttention2d(16, 2, 3), torch.randn(1, 6, 6, 16)
    for dropout in (layer.attn_drop, layer.proj_drop):
        torch.testing.assert_close(dropout(x), x, rtol=0, atol=0)
        dropout.forward = None
    layer(x)


def test_dropout_of_the_output():
    """About half of the numbers are zero, the others are twice those without dropout."""
    layer, x = NeighborhoodAttention2d(16, 2, 3, proj_drop=0.5), torch.randn(1, 20, 20, 16)
    dropped, whole = layer.train()(x), layer.eval()(x)
    kept = dropped != 0
    assert 0.45 < kept.float().mean() < 0.55
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])


@pytest.mark.parametrize("rank", LAYERS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_script_trace_and_compile(rank):
    layer = LAYERS[rank](16, 2, 3, 2)
    for sides in ([8, 7, 6], [4, 9, 5]):
        x = torch.randn(2, *sides[:rank], 16)
        expected = layer(x)
        for version in (
            torch.jit.script(layer),
            torch.jit.trace(layer, x),
            torch.compile(layer, fullgraph=True, backend="aot_eager"),
        ):
            torch.testing.assert_close(version(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_layer_ignores_nothing():
    x = torch.randn(1, 5, 5, 8)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run on cpu tensors"):
        torch.jit.script(NeighborhoodAttention2d(8, 1, 3, backend="triton"))(x)
    layer = torch.jit.script(NeighborhoodAttention2d(8, 1, 3, attn_drop=0.1))
    with pytest.raises(torch.jit.Error, match="attn_drop is not supported by TorchScript training"):
        layer(x)
    layer.eval()(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_layer_trains():
    layer, x = NeighborhoodAttention2d(16, 2, 3), torch.randn(2, 6, 6, 16)
    layer(x).sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    torch.jit.script(layer)(x).sum().backward()
    for p, grad in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_attention_dropout_acts_in_training_only():
    layer, x = NeighborhoodAttention2d(16, 2, 3, attn_drop=0.5), torch.randn(1, 6, 6, 16, requires_grad=True)
    assert not torch.equal(layer(x), layer(x))
    layer(x).sum().backward()
    assert x.grad.isfinite().all()
    assert layer.rpb.grad.isfinite().all()
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x), atol=0, rtol=0)


def test_attention_dropout_keeps_the_expectation():
    layer, x = NeighborhoodAttention2d(8, 1, 3, attn_drop=0.3), torch.randn(1, 5, 5, 8)
    with torch.no_grad():
        mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
        torch.testing.assert_close(mean, layer.eval()(x), atol=0.02, rtol=0)


def test_attention_dropout_does_not_replace_a_backend():
    layer = NeighborhoodAttention2d(8, 1, 3, attn_drop=0.3, backend="reference")
    with pytest.raises(RuntimeError, match=r"attn_drop needs backend None or \"torch\" in training, got .*'reference'"):
        layer(torch.randn(1, 5, 5, 8))


@pytest.mark.parametrize(
    ("rank", "window", "sides"),
    [
        (1, dict(kernel_size=4, dilation=2), (11,)),
        (2, dict(kernel_size=(3, 5), dilation=(2, 1)), (7, 4)),  # padded
        (2, dict(kernel_size=4, stride=2, is_causal=(True, False), rel_pos_bias=False), (6, 9)),
        (2, dict(kernel_size=3, dilation=2), (6, 6)),  # whose groups are images otherwise
        (3, dict(kernel_size=2), (3, 2, 4)),
    ],
)
def test_weights_as_a_tensor(rank, window, sides):
    """The outputs and gradients of the fused operator; all weights pass through `attn_drop`."""
    layer, x = LAYERS[rank](8, 2, **window, dtype=torch.float64), torch.randn(2, *sides, 8, dtype=torch.float64)
    plain = LAYERS[rank](8, 2, **window, fused=False, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    seen = []
    plain.attn_drop.register_forward_hook(lambda *call: seen.append(call[2]))
    torch.testing.assert_close(plain(x), layer(x))
    padded = [max(n, k * d) for n, k, d in zip(sides, layer.kernel_size, layer.dilation, strict=True)]
    assert seen[0].shape == (2, 2, *padded, math.prod(layer.kernel_size))
    torch.testing.assert_close(seen[0].sum(-1), torch.ones_like(seen[0][..., 0]))
    for version in (layer, plain):
        version(x).square().sum().backward()
    for (name, p), other in zip(plain.named_parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_weights_as_a_tensor_are_dropped_in_training_and_float32():
    layer, x = NeighborhoodAttention2d(8, 1, 3, attn_drop=0.5, fused=False), torch.randn(1, 6, 6, 8)
    seen = []
    layer.attn_drop.register_forward_hook(lambda *call: seen.append(call[2]))
    layer(x)
    assert 0.3 < (seen.pop() == 0).float().mean() < 0.7
    assert layer.eval().to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert seen[0].dtype == torch.float32
    assert (seen[0] > 0).all()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_no_weights_where_no_hook_sees_them():
    layer, x = NeighborhoodAttention2d(8, 1, 3, fused=False).eval(), torch.randn(1, 6, 6, 8)
    expected = layer(x)
    layer.attn_drop.forward = None
    traced = torch.jit.trace(layer, x, check_trace=False)  # the check calls the layer itself
    for version in (traced, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(version(x), expected)


def test_factory_arguments():
    layer = NeighborhoodAttention2d(16, 2, 3, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dim=10, num_heads=3, kernel_size=3), "num_heads must divide dim, got num_heads=3 with dim=10"),
        (
            dict(dim=8, num_heads=2, kernel_size=3, is_causal=(True, False)),
            "rel_pos_bias cannot be combined with a caus",
        ),
        (dict(dim=8, num_heads=2, kernel_size=3, stride=5), "stride must lie in"),
        (
            dict(dim=8, num_heads=2, kernel_size=3, fused=False, backend="triton"),
            'must be None or "torch" with fused=F',
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention2d(**arguments)


def test_inference_mode_first_and_training_later():
    """What is cached in inference mode may be saved by autograd afterwards."""
    layer, x = NeighborhoodAttention2d(8, 1, 3, attn_drop=0.1), torch.randn(1, 11, 13, 8)
    with torch.inference_mode():
        layer.eval()(x)
        layer.train()(x)
    layer(x).sum().backward()
    assert layer.rpb.grad.isfinite().all()
