"""Code that was written against NATTEN: files of packages on PyPI, unmodified, and others' way of calling in words of
our own.  `pip install --no-deps allin1 flocoder nvidia-physicsnemo einops` brings the packages; .ci/run does.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import dinat_kernels
import pytest
import torch
from dinat_kernels import natten
from torch import nn
from torch.nn import functional as F


@pytest.fixture
def install() -> Iterator[Callable]:
    yield natten.install
    natten.uninstall()


@pytest.fixture
def installed_file(monkeypatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports one module of an installed package without what its packages' __init__ files need."""
    before = set(sys.modules)

    def import_file(name: str, *packages: str) -> ModuleType:
        root = name.split(".")[0]
        spec = importlib.util.find_spec(root)
        if spec is None:
            pytest.skip(f"{root} is not installed, see the top of the file")
        for package in (root, *packages):
            module = ModuleType(package)
            module.__path__ = [str(Path(spec.submodule_search_locations[0], *package.split(".")[1:]))]
            monkeypatch.setitem(sys.modules, package, module)
        return importlib.import_module(name)

    yield import_file
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("allin1", "flocoder", "physicsnemo"):
            del sys.modules[name]


@pytest.mark.parametrize("version", ["0.14", "0.15", "0.17", "0.21"])
@pytest.mark.parametrize("rank", [1, 2])
def test_allin1(version, rank, install, installed_file):
    """The attention of allin1, which is that of transformers in one and two dimensions."""
    install(version)
    dinat = installed_file("allin1.models.dinat", "allin1.models")
    config = SimpleNamespace(qkv_bias=True, drop_attention=0.0)
    layer = getattr(dinat, f"NeighborhoodAttention{rank}d")(config, 16, 2, 3, 2)
    nn.init.normal_(layer.rpb)
    x = torch.randn(2, *(9, 7)[:rank], 16)
    q, k, v = (getattr(layer, name)(x).unflatten(-1, (2, 8)) for name in ("query", "key", "value"))
    expected = getattr(dinat_kernels, f"na{rank}d")(q, k, v, 3, dilation=2, rpb=layer.rpb).flatten(-2)
    torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.parametrize("version", ["0.15", "0.17", "0.21"])
def test_flocoder(version, install, installed_file, monkeypatch):
    """Its hourglass transformer, after k-diffusion's: where the window is the map, the block is its own full one."""
    pytest.importorskip("einops")
    monkeypatch.setenv("K_DIFFUSION_USE_COMPILE", "0")
    install(version)
    transformer = installed_file("flocoder.hdit.image_transformer_v2", "flocoder.hdit")
    block, full = transformer.NeighborhoodSelfAttentionBlock(32, 16, 8, 7), transformer.SelfAttentionBlock(32, 16, 8)
    nn.init.normal_(block.out_proj.weight)
    full.load_state_dict(block.state_dict())
    position = importlib.import_module("flocoder.hdit.axial_rope").make_axial_pos(7, 7).view(7, 7, 2)
    x, condition = torch.randn(2, 7, 7, 32), torch.randn(2, 8)
    torch.testing.assert_close(block(x, position, condition), full(x, position, condition))


def test_medvitv2(install):
    """Omid-Nejati/MedViTV2: channels first, *reshaped* to channels last and back, so that neighbors are scrambled."""
    install("0.17")
    module = importlib.import_module("natten")
    assert hasattr(module, "context")  # by which it tells 0.17, and asks for the bias in its words
    layer = module.NeighborhoodAttention2D(
        32, kernel_size=7, dilation=None, num_heads=2, qkv_bias=True, qk_scale=None, attn_drop=0, proj_drop=0.0,
        rel_pos_bias=True,
    )  # fmt: skip
    nn.init.normal_(layer.rpb)
    x = torch.randn(2, 32, 9, 11)
    batch, channels, height, width = x.shape
    scrambled = x.reshape(batch, height, width, channels)
    out = layer(scrambled).reshape(batch, channels, height, width)

    layer.double()
    q, k, v = layer.qkv(scrambled.double()).view(batch, height * width, 3, 2, 16).permute(2, 0, 3, 1, 4)
    rows, columns = torch.arange(height), torch.arange(width)
    place = torch.cartesian_prod(rows, columns)
    first = torch.stack([(place[:, 0] - 3).clamp(0, height - 7), (place[:, 1] - 3).clamp(0, width - 7)], 1)
    offset = place[None, :] - first[:, None]  # of every key in the window of every query
    seen = ((offset >= 0) & (offset < 7)).all(-1)
    index = (place[None, :] - place[:, None] + 6).clamp(0, 12)
    bias = layer.rpb[:, index[..., 0], index[..., 1]].masked_fill(~seen, -torch.inf)
    y = ((q @ k.mT) * 16**-0.5 + bias).softmax(-1) @ v
    expected = layer.proj(y.transpose(1, 2).reshape(batch, height, width, channels)).reshape(x.shape)
    torch.testing.assert_close(out, expected.float(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("version", ["0.17", "0.21"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_physicsnemo(version, rank, install, installed_file):
    """A function that finds NATTEN when it is called."""
    install(version)
    functions = installed_file(
        "physicsnemo.nn.functional.natten", "physicsnemo.core", "physicsnemo.nn", "physicsnemo.nn.functional"
    )
    q, k, v = torch.randn(3, 1, *(6, 7, 8)[:rank], 2, 4)
    function, expected = getattr(functions, f"na{rank}d"), getattr(dinat_kernels, f"na{rank}d")
    arguments = dict(is_causal=True, scale=0.3)
    torch.testing.assert_close(
        function(q, k, v, 3, dilation=2, **arguments), expected(q, k, v, 3, dilation=2, **arguments)
    )


@pytest.mark.parametrize("version", ["0.15", "0.17"])
def test_hourglass_diffusion(version, install):
    """crowsonkb/k-diffusion, image_transformer_v2: fused where NATTEN says that it is, else in two steps."""
    install(version)
    module = importlib.import_module("natten")
    qkv = torch.randn(2, 8, 8, 3, 2, 16)
    fused = hasattr(module, "has_fused_na") and module.has_fused_na()
    assert fused == (version == "0.17")
    if fused:
        q, k, v = qkv.unbind(3)
        out = module.functional.na2d(q, k, v, 3, scale=1.0)
    else:
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)
        weights = torch.softmax(module.functional.natten2dqk(q, k, 3, 1), dim=-1).to(v.dtype)
        out = module.functional.natten2dav(weights, v, 3, 1).movedim(1, -2)
    torch.testing.assert_close(out, dinat_kernels.na2d(*qkv.unbind(3), 3, scale=1.0))


@pytest.mark.parametrize("version", ["0.14", "0.15", "0.17"])
def test_a_subclass_with_its_own_forward(version, install):
    """As forks of NAT's detectors write it: the original's forward with a change, on attributes of the base class."""
    install(version)
    module = importlib.import_module("natten")
    functional = importlib.import_module("natten.functional")

    class Attention(module.NeighborhoodAttention2D):
        def forward(self, x):
            batch, height, width, dim = x.shape
            qkv = self.qkv(x).reshape(batch, height, width, 3, self.num_heads, self.head_dim).permute(3, 0, 4, 1, 2, 5)
            q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
            attn = functional.natten2dqkrpb(q, k, self.rpb, self.kernel_size, self.dilation)
            out = functional.natten2dav(self.attn_drop(attn.softmax(-1)), v, self.kernel_size, self.dilation)
            return self.proj_drop(self.proj(out.permute(0, 2, 3, 1, 4).reshape(batch, height, width, dim)))

    bias = {} if version != "0.17" else dict(rel_pos_bias=True)
    layer = Attention(16, num_heads=2, kernel_size=3, dilation=2, **bias)
    expected = dinat_kernels.NeighborhoodAttention2d(16, 2, 3, 2)
    expected.load_state_dict(layer.state_dict())
    x = torch.randn(2, 7, 9, 16)
    torch.testing.assert_close(layer(x), expected(x))
    layer = Attention(16, num_heads=2, kernel_size=3, attn_drop=0.999, proj_drop=0.5, **bias).train()
    x = torch.ones(1, 6, 6, 16)
    assert (layer(x) == 0).float().mean().item() == pytest.approx(0.5, abs=0.15)
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("experimental", [True, False])
def test_a_layer_that_asks_for_experimental_operators(experimental, install):
    """As in NATTEN 0.17's documents: the same layer, compiled."""
    install("0.17")
    module = importlib.import_module("natten")
    module.use_fused_na(True, kv_parallel=False)
    layer = module.NeighborhoodAttention3D(
        16, 2, (3, 5, 5), is_causal=(True, False, False), use_experimental_ops=experimental
    )
    expected = dinat_kernels.NeighborhoodAttention3d(
        16, 2, (3, 5, 5), is_causal=(True, False, False), rel_pos_bias=False
    )
    expected.load_state_dict(layer.state_dict())
    x = torch.randn(1, 4, 6, 7, 16)
    torch.testing.assert_close(layer(x), expected(x))


def test_video_models(install):
    """nvidia-cosmos, neighborhood_attn.py (which runs on CUDA alone): switches at import, tuned kernels by name."""
    install("0.21")
    exec("import natten\nfrom natten.functional import neighborhood_attention_generic", scope := {})
    scope["natten"].use_kv_parallelism_in_fused_na(True)
    scope["natten"].set_memory_usage_preference("unrestricted")
    q, k, v = (torch.randn(1, 4 * 6 * 8, 2, 16).view(1, 4, 6, 8, 2, 16) for _ in range(3))
    window = dict(kernel_size=(4, 3, 4), stride=(1, 2, 4), dilation=(1, 2, 1), is_causal=(False, False, False))
    tuned = dict(backend="hopper-fna", q_tile_shape=(4, 4, 8), kv_tile_shape=(4, 4, 8), run_persistent_kernel=True)
    out = scope["neighborhood_attention_generic"](query=q, key=k, value=v, **window, **tuned)
    torch.testing.assert_close(out, dinat_kernels.na3d(q, k, v, **window))


def test_neighborhood_and_text(install):
    """Cross attention as NATTEN's documents do it by hand: neighbors and a prompt apart, then merged."""
    install("0.21")
    module = importlib.import_module("natten")
    q, k, v = torch.randn(3, 2, 6, 6, 2, 8)
    text_k, text_v = torch.randn(2, 2, 5, 2, 8)
    near, near_lse = module.na2d(q, k, v, kernel_size=6, return_lse=True)
    far, far_lse = module.attention(q.flatten(1, 2), text_k, text_v, return_lse=True)
    out, _ = module.merge_attentions([near.flatten(1, 2), far], [near_lse.flatten(1, 2), far_lse])
    keys, values = (torch.cat([x.flatten(1, 2), text], 1).transpose(1, 2) for x, text in ((k, text_k), (v, text_v)))
    expected = F.scaled_dot_product_attention(q.flatten(1, 2).transpose(1, 2), keys, values).transpose(1, 2)
    torch.testing.assert_close(out, expected)


def test_the_publishers_flop_script(install):
    """SHI-Labs/Neighborhood-Attention-Transformer adds NATTEN's handles to a counter of its own."""
    install("0.14")
    exec("from natten.flops import add_natten_handle", scope := {})
    added = {}
    counter = SimpleNamespace(set_op_handle=lambda **handles: added.update(handles) or counter)
    assert scope["add_natten_handle"](counter) is counter
    assert "dinat_kernels::attention" in added
