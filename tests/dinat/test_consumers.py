"""The models where people use timm's: transformers, torchvision, segmentation_models_pytorch, compile, export."""

import json
import math
import re
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from timm.utils import AttentionExtract
from torch._dynamo.testing import CompileCounterWithBackend

import dinat  # noqa: F401  registers the models


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96)


@pytest.fixture
def without_fused_attention() -> Iterator[None]:
    """As TIMM_FUSED_ATTN=0."""
    timm.layers.set_fused_attn(False)
    yield
    timm.layers.set_fused_attn(True)


@pytest.fixture
def fresh_dynamo() -> None:
    """Sizes that other tests compiled would make these sizes symbolic (and Inductor 2.14 cannot order such strides)."""
    torch._dynamo.reset()


def test_transformers_timm_backbone(image):
    from transformers import TimmBackbone, TimmBackboneConfig

    config = TimmBackboneConfig(backbone="dinat_mini", out_indices=(0, 3), use_pretrained_backbone=False)
    backbone = TimmBackbone(config).eval()
    features = backbone(image).feature_maps
    assert [tuple(f.shape) for f in features] == [(2, 64, 16, 24), (2, 512, 2, 3)]


def test_transformers_timm_wrapper(image, tmp_path):
    from timm.models._hub import save_for_hf
    from transformers import AutoModelForImageClassification

    model = timm.create_model("dinat_pico", num_classes=4).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("model_args", None)  # timm >= 1.0.30 writes it, transformers 5.23 then passes num_classes twice
    (tmp_path / "config.json").write_text(json.dumps(config))
    wrapper = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(wrapper(image).logits, model(image))


def test_torchvision_feature_pyramid(image):
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    model = timm.create_model("dinat_pico")
    levels = {"levels_0": "0", "levels_1": "1", "levels_2": "2"}
    flat = timm.create_model("dinat_pico", features_only=True)
    flat.load_state_dict({key.replace("levels.", "levels_"): v for key, v in model.state_dict().items()}, strict=False)
    pyramid = BackboneWithFPN(flat, levels, [32, 64, 128], 256)
    shapes = {name: tuple(feature.shape) for name, feature in pyramid(image).items()}
    assert shapes == {"0": (2, 256, 32, 48), "1": (2, 256, 16, 24), "2": (2, 256, 8, 12), "pool": (2, 256, 4, 6)}


def test_segmentation_models_pytorch(image):
    import segmentation_models_pytorch as smp

    model = smp.Unet("tu-dinat_mini", encoder_weights=None, classes=5).eval()
    assert model(image).shape == (2, 5, 64, 96)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dinat_pico", dict(depths=(2, 2, 1), num_heads=(1, 2, 4))),
        ("dinat_isotropic_small", dict(depths=(1, 1), num_heads=(3, 3), embed_dim=24)),
    ],
)
def test_timm_attention_extract(name, options, without_fused_attention):
    """The weights of every block; the model's outputs and state dict are those with fused attention."""
    images = torch.randn(2, 3, 224, 224)
    model = timm.create_model(name, **options).eval()
    timm.layers.set_fused_attn(True)
    fused = timm.create_model(name, **options).eval()
    fused.load_state_dict(model.state_dict())
    with torch.no_grad():
        maps = AttentionExtract(model, method="hook")(images)
        torch.testing.assert_close(model(images), fused(images))
    sides = [math.ceil(224 / info["reduction"]) for info in model.feature_info]
    blocks = [(i, j) for i, level in enumerate(model.levels) for j in range(len(level.blocks))]
    assert list(maps) == [f"levels.{i}.blocks.{j}.attn.attn_drop" for i, j in blocks]
    for (i, j), weights in zip(blocks, maps.values(), strict=True):
        attn = model.levels[i].blocks[j].attn
        assert weights.shape == (2, attn.num_heads, sides[i], sides[i], math.prod(attn.kernel_size))
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def stand_in(monkeypatch, name, **content):
    module = ModuleType(name)
    vars(module).update(content)
    for depth in range(1, name.count(".") + 1):
        monkeypatch.setitem(sys.modules, name.rsplit(".", depth)[0], ModuleType(name.rsplit(".", depth)[0]))
    monkeypatch.setitem(sys.modules, name, module)


def block_of(library):
    page = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()
    (block,) = (
        code for code in re.findall(r"```python no-run\n(.*?)```", page, re.DOTALL) if f"from {library}" in code
    )
    return block


class Registry:
    """Of mmengine and fvcore: a decorator that is called."""

    def register(self):
        return lambda thing: thing

    register_module = register


def test_mmdetection(image, monkeypatch):
    """The page's wrapper, on a stand-in for mmdetection."""
    stand_in(monkeypatch, "mmdet.registry", MODELS=Registry())
    exec(block_of("mmdet"), namespace := {})
    backbone = namespace["NeighborhoodAttention"](name="dinat_mini", depths=(1, 1, 1, 1))
    backbone.init_weights()
    assert [tuple(x.shape[1:]) for x in backbone(image)] == [(64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3)]


def test_detectron2(image, monkeypatch):
    """The page's wrapper, on a stand-in for detectron2."""
    spec = namedtuple("ShapeSpec", "channels height width stride")
    stand_in(monkeypatch, "detectron2.layers", ShapeSpec=spec)
    stand_in(monkeypatch, "detectron2.modeling", BACKBONE_REGISTRY=Registry(), Backbone=torch.nn.Module)
    exec(block_of("detectron2"), namespace := {})
    backbone = namespace["NeighborhoodAttention"](pretrained=False, depths=(1, 1, 1, 1))
    shapes = {name: (shape.channels, shape.stride) for name, shape in backbone.output_shape().items()}
    assert shapes == {"res2": (64, 4), "res3": (128, 8), "res4": (256, 16), "res5": (512, 32)}
    assert {name: (x.shape[1], 64 // x.shape[2]) for name, x in backbone(image).items()} == shapes


def test_compile_whole_model(image, fresh_dynamo):
    model = timm.create_model("dinat_pico", num_classes=3, depths=(1, 2, 1)).eval()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), model(image), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dinat_pico", dict(depths=(1, 2, 1))),
        ("dinat_s_tiny", dict(depths=(2, 2, 2, 2))),
        ("dinat_isotropic_small", dict(depths=(1, 1), num_heads=(12, 12))),
        ("vitrpb_small", dict(img_size=(64, 96), depths=(1, 1), num_heads=(12, 12))),
    ],
)
def test_one_compiled_model_serves_all_batch_sizes(name, options, image, fresh_dynamo):
    """No graph break; compiled for the first size, for any other size, and for batch 1, which is special to PyTorch."""
    model = timm.create_model(name, num_classes=3, **options).eval()
    counter = CompileCounterWithBackend("aot_eager")  # Inductor takes minutes for the second size
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (image, image[:1], image.repeat(4, 1, 1, 1), image.repeat(2, 1, 1, 1), image):
            torch.testing.assert_close(compiled(batch), model(batch), atol=1e-4, rtol=1e-4)
    assert counter.frame_count <= 3


def test_compile_training_step(image, fresh_dynamo):
    model = timm.create_model("dinat_pico", num_classes=3, depths=(1, 1, 1))  # the backward takes long to compile
    expected = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True)
    actual = torch.autograd.grad(compiled(image).square().sum(), list(model.parameters()))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["dinat_mini", "dinat_s_tiny", "dinat_isotropic_small"])
def test_export_whole_model(name, image):
    """Plain ATen operations, any batch size."""
    model = timm.create_model(name).eval()
    program = torch.export.export(model, (image,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert not [node for node in program.graph.nodes if "dinat" in str(node.target)]
    with torch.no_grad():
        wider = torch.cat([image, image, image])
        torch.testing.assert_close(program.module()(wider), model(wider), atol=1e-5, rtol=1e-5)
