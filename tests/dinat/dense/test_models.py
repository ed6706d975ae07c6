"""What holds for all methods: names, arguments, gradients, sizes, batches; what importing costs; export."""

import subprocess
import sys
from fnmatch import fnmatch

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torchvision import tv_tensors

import dinat.dense
from dinat.errors import UserError
from dinat.export import TOLERANCE, export

PICO = dict(stem_stride=4, depths=(1, 1, 1), kernel_size=3, dilations=[[2], [1], [1]])
RCNN = dict(fpn_channels=16, box_channels=16, mask_channels=8, roi_samples=16, rpn_samples=32)
QUERIES = dict(
    width=32, heads=4, queries=5, encoder_layers=1, decoder_layers=2, encoder_mlp=32, decoder_mlp=32, points=64
)
HEADS = {
    "mask_rcnn": RCNN,
    "cascade_mask_rcnn": RCNN,
    "upernet": dict(channels=16, auxiliary_channels=8),
    "mask2former": QUERIES,
    "oneformer": QUERIES,
}


@pytest.fixture(params=HEADS)
def method(request):
    return request.param


def tiny(method, **kwargs):
    arguments = dict(backbone="dinat_pico", backbone_kwargs=PICO, num_classes=3) | HEADS[method]
    return dinat.dense.create_model(method, **arguments | kwargs)


def target(height, width, *boxes):
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    return {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), format="XYXY", canvas_size=(height, width)
        ),
        "labels": torch.arange(len(boxes)) % 3,
        "masks": tv_tensors.Mask(masks),
        "semantic": tv_tensors.Mask(torch.full((height, width), 255, dtype=torch.uint8)),
    }


IMAGES = [torch.randn(3, 40, 64), torch.randn(3, 64, 33)]


@pytest.mark.parametrize("boxes", [[], [(2, 3, 30, 33), (5, 5, 25, 30)]], ids=["empty", "objects"])
def test_every_parameter_has_a_gradient(method, boxes):
    torch.manual_seed(0)
    model = tiny(method)
    losses = model(IMAGES, [target(40, 64, *boxes), target(64, 33)])
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_predictions_have_the_size_asked_for(method):
    model = tiny(method).eval()
    for sizes in (None, [(50, 80), (20, 10)]):
        for result, (height, width) in zip(model.predict(IMAGES, sizes), sizes or [(40, 64), (64, 33)], strict=True):
            if "masks" in result:
                count = len(result["boxes"])
                assert result["masks"].shape == (count, height, width)
                assert result["masks"].dtype == torch.bool
                assert result["scores"].shape == result["labels"].shape == (count,)
                assert result["labels"].dtype == torch.int64
                assert (result["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()
            else:
                (name,) = result.keys() - {"segments"}
                assert result[name].shape == (height, width)
                assert result[name].dtype == {"semantic": torch.int64, "panoptic": torch.int32}[name]


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance", "detection"])
@pytest.mark.parametrize("universal", ["mask2former", "oneformer"])
def test_tasks_of_universal_models(universal, task):
    model = tiny(universal).eval()
    assert model.task == "panoptic"
    (result,) = model.predict(IMAGES[:1], task=task)
    expected = {"panoptic": {"panoptic", "segments"}, "semantic": {"semantic"}}
    assert result.keys() == expected.get(task, {"boxes", "scores", "labels", "masks"})


def test_company_makes_no_difference(method):
    torch.manual_seed(0)
    model = tiny(method).eval()
    if method.endswith("rcnn"):
        model.score_threshold = 0.0
    images = [torch.randn(3, *size) for size in ((40, 64), (96, 50), (64, 33), (64, 64))]
    together = model.predict(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = model.predict([image])
        assert alone.keys() == found.keys()
        for name, value in alone.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)
            elif name != "segments":
                assert found[name].shape == value.shape
                assert (found[name] != value).float().mean() < 1e-3 if value.numel() else True


@pytest.mark.parametrize("backbone", ["convnext_atto", "resnet10t", "swin_tiny_patch4_window7_224"])
def test_other_backbones(backbone):
    arguments = {"swin_tiny_patch4_window7_224": dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))}
    model = tiny("mask_rcnn", backbone=backbone, backbone_kwargs=arguments.get(backbone))
    assert model.strides == [4, 8, 16, 32]
    losses = model(IMAGES, [target(40, 64, (2, 3, 30, 33)), target(64, 33)])
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.eval().predict(IMAGES)[1]["masks"].shape[1:] == (64, 33)


def test_backbone_holds_its_parameters_and_statistics(method):
    model = tiny(method)
    prefix = next(name for name, module in model.named_modules() if module is model.backbone)
    inside = [name for name, _ in model.named_parameters() if name.startswith(f"{prefix}.")]
    assert (
        sum("levels." in name for name, _ in model.named_parameters()) == sum("levels." in name for name in inside) > 0
    )
    assert any("norm0" in name for name in inside)  # LayerNorm on each map, as in the published models
    assert model.preprocessing == {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    assert model.method == method
    assert model.num_classes == 3


def test_half_precision(method):
    """Autocast to bfloat16, which knows no single pixels of larger images: boxes and losses stay in float32."""
    torch.manual_seed(0)
    model = tiny(method)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(IMAGES, [target(40, 64, (2, 3, 30, 33)), target(64, 33)])
        assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
        found = model.eval().predict(IMAGES)[0]
    assert all(value.dtype != torch.bfloat16 for value in found.values() if isinstance(value, torch.Tensor))


def test_names():
    names = dinat.dense.list_models()
    assert {"mask_rcnn_dinat_tiny", "cascade_mask_rcnn_dinat_s_large", "oneformer_dinat_large"} <= set(names)
    assert dinat.dense.list_models("upernet_nat_m*") == ["upernet_nat_mini"]
    model = dinat.dense.create_model("mask_rcnn_dinat_pico", num_classes=2, backbone_kwargs=PICO, **RCNN)
    assert (model.method, model.num_classes) == ("mask_rcnn", 2)
    assert (
        type(dinat.dense.create_model("cascade_mask_rcnn_dinat_pico", backbone_kwargs=PICO, **RCNN)).__name__
        == "CascadeMaskRCNN"
    )


@pytest.mark.parametrize(
    ("method", "published"),
    [("mask_rcnn", 39_623_094), ("cascade_mask_rcnn", 77_458_296), ("upernet", 49_779_698)],
)
def test_published_sizes(method, published):
    """Exact numbers of parameters of the published models with DiNAT-Mini."""
    with torch.device("meta"):
        model = dinat.dense.create_model(f"{method}_dinat_mini")
    assert sum(p.numel() for p in model.parameters()) == published


def test_bad_names_and_arguments():
    for arguments, message in (
        (("masc_rcnn",), r"masc_rcnn: no such model. Did you mean mask_rcnn"),
        (("upernet_dinat_tinny",), r"backbone=dinat_tinny: no such model. Did you mean dinat_tiny"),
        (
            ("upernet_dinat_tiny", False, None, "resnet18"),
            r"backbone=resnet18: the name upernet_dinat_tiny has a backbone",
        ),
        (("upernet_dinat_tiny", True), r"pretrained=True: no weights of upernet_dinat_tiny are known"),
        (("upernet", False, 0), r"num_classes=0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            dinat.dense.create_model(*arguments)
    with pytest.raises(UserError, match=r"chanels=3: upernet takes no such argument. Did you mean channels"):
        dinat.dense.create_model("upernet", chanels=3)
    with pytest.raises(UserError, match=r"backbone=dinat_mini with backbone_kwargs=.*'depth'"):
        dinat.dense.create_model("upernet", backbone_kwargs=dict(depth=3))


def test_bad_calls():
    model = tiny("upernet")
    with pytest.raises(ValueError, match=r"targets: 2 images in training mode need one each, got no targets"):
        model(IMAGES)
    with pytest.raises(RuntimeError, match=r"predict\(\) works in evaluation mode: call eval\(\) first"):
        model.predict(IMAGES)
    with pytest.raises(ValueError, match=r"sizes: 2 images need one \(height, width\) each, got 1"):
        model.eval().predict(IMAGES, [(3, 4)])


def test_missing_package_names_the_extra(monkeypatch):
    for module in [name for name in sys.modules if name.startswith("dinat.dense.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UserError, match=r'upernet needs transformers, not installed here: pip install "dinat\[dense\]"'
    ):
        dinat.dense.create_model("upernet")


def test_importing_is_light_and_rcnn_needs_no_transformers():
    script = (
        "import sys, timm; before = set(sys.modules)\n"  # timm imports all of torchvision
        "import dinat.dense\n"
        "print({name.split('.')[0] for name in set(sys.modules) - before} - {'dinat', 'dinat_kernels', 'torch'})\n"
        "dinat.dense.create_model('mask_rcnn_dinat_pico', backbone_kwargs=dict(depths=(1, 1, 1)), fpn_channels=8)\n"
        "print('transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["set()", "False"]


def test_upernet_exports_to_onnx(tmp_path):
    pytest.importorskip("onnxscript", reason="the package onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    small = dict(stem_stride=4, depths=(1, 1), num_heads=(1, 2))
    model = tiny("upernet", backbone_kwargs=small, auxiliary_channels=0, pool_scales=(1, 2))
    assert export(model, torch.randn(1, 3, 32, 64), tmp_path / "model.onnx", dynamic_batch=False) < TOLERANCE


@pytest.mark.parametrize("method", ["mask_rcnn", "cascade_mask_rcnn"])
def test_detectors_say_that_they_do_not_export(method, tmp_path):
    with pytest.raises(UserError, match=r"MaskRCNN cannot be exported: how many proposals and detections there are"):
        export(tiny(method), torch.randn(1, 3, 32, 64), tmp_path / "model.onnx")


def test_layers_and_decay_are_those_of_the_backbone(method):
    """As timm has them for the backbone as a classifier, whose head the dense one stands for."""
    model, plain = tiny(method), timm.create_model("dinat_pico", **PICO)
    prefix, inner = model.timm_model
    spared = {name for name, _ in model.named_parameters() for rule in model.no_weight_decay() if fnmatch(name, rule)}
    assert spared == {f"{prefix}levels.{level}.blocks.0.attn.rpb" for level in range(3)}

    def scales(of):
        names = {parameter: name for name, parameter in of.named_parameters()}
        groups = param_groups_layer_decay(of, layer_decay=0.5)
        return {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}

    expected, found = scales(plain), scales(model)
    backbone = {name for name, _ in inner.named_parameters()} & expected.keys()
    assert len({expected[name] for name in backbone}) > 3
    assert {name: found[prefix + name] for name in backbone} == {name: expected[name] for name in backbone}
    assert {scale for name, scale in found.items() if not name.startswith(prefix)} == {1.0}


def test_grad_checkpointing_changes_nothing_but_memory(method):
    model = tiny(method).train()
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d | torch.nn.Dropout):
            part.eval()
    objects = [target(40, 64, (2, 3, 30, 33)), target(64, 33, (5, 5, 25, 30))]
    losses = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert {level.grad_checkpointing for level in model.timm_model[1].levels} == {enable}
        torch.manual_seed(0)
        losses.append(sum(model(IMAGES, objects).values()))
        losses[-1].backward()
    torch.testing.assert_close(*losses)


def test_a_backbone_without_checkpointing_says_so(monkeypatch):
    monkeypatch.delattr(dinat.models.NAT, "set_grad_checkpointing")
    with pytest.raises(UserError, match=r"runtime\.grad_checkpointing=true: NAT has none\. Set it to false"):
        tiny("upernet").set_grad_checkpointing()


def test_a_backbone_that_timm_takes_apart_has_no_layers():
    with pytest.raises(UserError, match=r"optimizer\.layer_decay: timm tells no layers of FeatureListNet"):
        tiny("upernet", backbone="test_convnext", backbone_kwargs=None).group_matcher()
