"""DiNAT and NAT of transformers against our timm models, on the same weights."""

import importlib
import re
import sys
import types

import pytest
import timm
import torch

import dinat  # noqa: F401  registers the models

transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")

from dinat.integrations import transformers as integration  # noqa: E402

SMALL = dict(depths=(2, 2, 2, 2), dilations=[[1, 8], [1, 4], [1, 2], [1, 1]])


@pytest.fixture(autouse=True)
def enabled():
    integration.enable()
    yield
    integration.disable()


def strong(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that matter: at their initial values neither bias tables nor layer scale show in the output."""
    for name, p in model.named_parameters():
        if name.endswith(("rpb", "gamma")):
            torch.nn.init.normal_(p)
    return model.eval()


def to_hugging_face(state_dict: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Our names to those of transformers."""
    renames = [
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^patch_embed\.", "embeddings."),
        (r"^levels\.(\d)\.downsample", lambda m: f"encoder.levels.{int(m[1]) - 1}.downsample"),
        (r"^levels\.(\d)\.blocks", r"encoder.levels.\1.layers"),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.", ".attention.self."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"^norm\.", "layernorm."),
        (r"^norm(\d)\.", lambda m: f"hidden_states_norms.stage{int(m[1]) + 1}."),
    ]
    out = {}
    for key, value in state_dict.items():
        for pattern, name in renames:
            key = re.sub(pattern, name, key)
        if ".qkv." in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[prefix + key.replace("qkv", name)] = part
        elif ".ls" in key:
            key = re.sub(r"\.ls\d\.gamma", ".layer_scale_parameters", key)
            out[prefix + key] = torch.stack([out[prefix + key], value]) if prefix + key in out else value
        elif key.startswith("head.fc."):
            out[key.replace("head.fc.", "classifier.")] = value
        else:
            out[prefix + key] = value
    return out


def config_of(model: torch.nn.Module, cls=None, **kwargs):
    blocks = [level.blocks for level in model.levels]
    arguments = dict(
        embed_dim=model.feature_info[0]["num_chs"],
        depths=[len(b) for b in blocks],
        num_heads=[b[0].attn.num_heads for b in blocks],
        kernel_size=blocks[0][0].attn.kernel_size[0],
        mlp_ratio=blocks[0][0].mlp.fc1.out_features / blocks[0][0].attn.dim,
        layer_scale_init_value=1.0 if hasattr(blocks[0][0].ls1, "gamma") else 0.0,
        **kwargs,
    )
    if cls is not None:
        return cls(**arguments)
    return transformers.DinatConfig(dilations=[[block.attn.dilation[0] for block in b] for b in blocks], **arguments)


@pytest.mark.parametrize("options", [SMALL, dict(SMALL, ls_init_value=1.0)])
@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
def test_classifier(options, size):
    """Square, and not square on maps that are padded on both axes, on one, and on none."""
    ours = strong(timm.create_model("dinat_mini", num_classes=10, **options))
    theirs = transformers.AutoModelForImageClassification.from_config(config_of(ours, num_labels=10)).eval()
    theirs.load_state_dict(to_hugging_face(ours.state_dict(), "dinat."))
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(theirs(image).logits, ours(image), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
def test_backbone(size):
    """Feature maps with the norm of each, as detection and segmentation use them."""
    ours = strong(timm.create_model("dinat_mini", stage_norm=True, num_classes=0, **SMALL))
    config = config_of(ours, out_features=["stage1", "stage2", "stage3", "stage4"])
    theirs = transformers.AutoBackbone.from_config(config).eval()
    state_dict = to_hugging_face(ours.state_dict(), "")
    theirs.load_state_dict({key: x for key, x in state_dict.items() if not key.startswith("layernorm.")})
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = ours.forward_intermediates(image, intermediates_only=True)
        for a, e in zip(theirs(image).feature_maps, expected, strict=True):
            torch.testing.assert_close(a, e, atol=1e-4, rtol=0)


def test_saved_and_loaded(tmp_path):
    """The way of published weights."""
    ours = strong(timm.create_model("dinat_mini", num_classes=10, **SMALL))
    model = transformers.DinatForImageClassification(config_of(ours, num_labels=10)).eval()
    model.load_state_dict(to_hugging_face(ours.state_dict(), "dinat."))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    image = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        torch.testing.assert_close(loaded(image).logits, ours(image), atol=1e-4, rtol=0)


def test_nat():
    try:
        from transformers.models.deprecated.nat.modeling_nat import NatConfig, NatForImageClassification
    except ImportError:
        pytest.skip(f"transformers {transformers.__version__} has no NAT")
    ours = strong(timm.create_model("nat_mini", num_classes=10, depths=(1, 1, 1, 1)))
    theirs = NatForImageClassification(config_of(ours, NatConfig, num_labels=10)).eval()
    theirs.load_state_dict(to_hugging_face(ours.state_dict(), "nat."))
    image = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        torch.testing.assert_close(theirs(image).logits, ours(image), atol=1e-4, rtol=0)


def test_attention_weights_and_dropout():
    ours = strong(timm.create_model("dinat_mini", num_classes=10, **SMALL))
    theirs = transformers.DinatForImageClassification(config_of(ours, num_labels=10)).eval()
    image = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        plain, verbose = theirs(image), theirs(image, output_attentions=True)
    torch.testing.assert_close(verbose.logits, plain.logits)
    for weights in verbose.attentions:
        assert weights.shape[-1] == 49
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    attention = theirs.dinat.encoder.levels[0].layers[0].attention.self.train()
    x = torch.randn(1, 8, 9, 64)
    attention.dropout.p = 1.0
    assert not attention(x)[0].any()
    attention.dropout.p = 0.0
    torch.testing.assert_close(attention(x)[0], attention.eval()(x)[0])


def test_oneformer():
    """A OneFormer of random weights: all losses forward and backward, down to the bias tables."""
    backbone = transformers.DinatConfig(
        embed_dim=16,
        depths=[2, 2, 2, 2],
        num_heads=[1, 2, 4, 8],
        kernel_size=5,
        dilations=[[1, 3], [1, 2], [1, 1], [1, 1]],
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.OneFormerConfig(
        backbone_config=backbone,
        num_queries=8,
        num_labels=3,
        is_training=True,
        train_num_points=64,
        text_encoder_width=64,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=50,
        text_encoder_n_ctx=2,
        conv_dim=64,
        mask_dim=64,
        hidden_dim=64,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
    )
    model = transformers.OneFormerForUniversalSegmentation(config).train()
    outputs = model(
        pixel_values=torch.randn(2, 3, 64, 96),
        task_inputs=torch.randint(50, (2, 77)),
        text_inputs=torch.randint(50, (2, 6, 77)),
        mask_labels=[(torch.rand(3, 64, 96) > 0.5).float() for _ in range(2)],
        class_labels=[torch.arange(3) for _ in range(2)],
    )
    outputs.loss.backward()
    assert outputs.masks_queries_logits.shape == (2, 8, 16, 24)
    gradients = {name: p.grad for name, p in model.model.pixel_level_module.encoder.named_parameters()}
    assert sum(name.endswith("rpb") for name in gradients) == 8
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in gradients.values())


def test_disable_restores_everything():
    module = sys.modules["transformers.models.dinat.modeling_dinat"]
    patched = module.NeighborhoodAttention.forward, module.requires_backends
    integration.enable()  # a second time changes nothing
    integration.disable()
    assert module.NeighborhoodAttention.forward.__module__ == module.__name__
    assert module.requires_backends is transformers.utils.requires_backends
    assert transformers.utils.is_natten_available.__module__.startswith("transformers.")
    if not transformers.utils.is_natten_available():
        with pytest.raises(ImportError, match="natten"):
            transformers.DinatModel(transformers.DinatConfig())
    integration.disable()  # nor does this
    integration.enable()
    assert module.NeighborhoodAttention.forward is patched[0]


def test_nothing_but_natten_is_not_required():
    required = []
    check = integration._without_natten(lambda _, backends: required.append(backends))
    check(None, ["natten", "timm"])
    check(None, "natten")
    check(None, "timm")
    assert required == [["timm"], [], ["timm"]]


def test_a_newer_natten_is_no_obstacle(monkeypatch):
    """One that lacks what transformers imports from it."""
    name = "transformers.models.dinat.modeling_dinat"
    monkeypatch.setattr(sys.modules[name.rpartition(".")[0]], "modeling_dinat", sys.modules[name])  # for afterwards
    monkeypatch.delitem(sys.modules, name)
    for package in ("natten", "natten.functional"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setattr(transformers.utils, "is_natten_available", lambda: True)
    with pytest.raises(ImportError, match="natten2dav"):
        importlib.import_module(name)
    assert integration._import(name).DinatModel
    assert transformers.utils.is_natten_available()


@pytest.mark.parametrize("version", ["4.53.3", "6.0.0"])
def test_unknown_versions_are_refused(version, monkeypatch):
    integration.disable()
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(RuntimeError, match=f"transformers {version} is unknown to dinat, which knows 4.54 up to"):
        integration.enable()


def test_a_changed_attention_is_refused(monkeypatch):
    integration.disable()
    module = sys.modules["transformers.models.dinat.modeling_dinat"]
    before = module.requires_backends
    monkeypatch.setattr(module.NeighborhoodAttention, "forward", lambda self, hidden_states, mask: None)
    with pytest.raises(RuntimeError, match="is unknown to dinat"):
        integration.enable()
    assert module.requires_backends is before
