"""Exported models run elsewhere and give the same result. Small ones here; .ci/export_suite.py has published ones."""

import subprocess
import sys

import pytest
import timm
import torch

import dinat  # noqa: F401  registers the models
from dinat.errors import UserError
from dinat.export import TOLERANCE, command, export

SIZE = (32, 44)  # 16 x 22 tokens, divided by dilation 5 with remainders


def small() -> torch.nn.Module:
    """One dilated block, with a bias table that matters: at its initial values it hardly shows; and with dropout."""
    options = dict(depths=(1,), num_heads=(1,), dilations=[[5]], drop_rate=0.5)
    model = timm.create_model("dinat_pico", num_classes=5, img_size=SIZE, **options)
    for key, p in model.named_parameters():
        if key.endswith("rpb"):
            torch.nn.init.normal_(p)
    return model


def test_onnx(tmp_path):
    pytest.importorskip("onnxscript", reason="the package onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    model = small().train()
    path = tmp_path / "model.onnx"
    assert export(model, torch.randn(1, 3, *SIZE), path) < TOLERANCE
    assert model.training
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape[1:] == [3, *SIZE]
    for batch in (1, 5):
        images = torch.randn(batch, 3, *SIZE)
        with torch.no_grad():
            expected = model.eval()(images)
        actual = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def test_onnx_of_features(tmp_path):
    pytest.importorskip("onnxscript", reason="the package onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    model = timm.create_model("dinat_pico", features_only=True, depths=(1, 1), num_heads=(1, 2))
    assert export(model, torch.randn(2, 3, 16, 24), tmp_path / "model.onnx", dynamic_batch=False) < TOLERANCE


def test_pt2_runs_without_this_package(tmp_path):
    model = small().eval()
    path = tmp_path / "model.pt2"
    assert export(model, torch.randn(2, 3, *SIZE), path) < TOLERANCE
    images = torch.randn(3, 3, *SIZE)
    with torch.no_grad():
        torch.save((images, model(images)), tmp_path / "expected.pt")
    script = (
        "import sys, torch, torch._inductor.codecache\n"  # which torch 2.10 does not import by itself
        "images, expected = torch.load(sys.argv[2])\n"
        "with torch.no_grad(): actual = torch._inductor.aoti_load_package(sys.argv[1])(images)\n"
        "assert 'dinat_kernels' not in sys.modules\n"
        "torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)"
    )
    subprocess.run([sys.executable, "-c", script, str(path), str(tmp_path / "expected.pt")], check=True)


@pytest.mark.parametrize("deviation", [0.5, -0.5])
def test_the_difference_is_the_largest_of_all_outputs(deviation, tmp_path, monkeypatch):
    def one_is_off(model, images, dynamic_shapes, path):
        outputs = model(images)
        outputs[1][-1, 3] += deviation
        return outputs

    monkeypatch.setattr("dinat.export._pt2", one_is_off)
    model = timm.create_model("dinat_pico", features_only=True)
    assert export(model, torch.randn(2, 3, 32, 32), tmp_path / "model.pt2") == pytest.approx(0.5)


def test_command(tmp_path, monkeypatch, capsys):
    calls, created = [], []
    create_model = timm.create_model

    def create(name, pretrained, **options):
        created.append((name, pretrained))
        return create_model("dinat_pico", **options)

    def fake(model, images, path, dynamic_batch):
        calls.append((tuple(model.img_size), tuple(images.shape), dynamic_batch))
        path.write_bytes(bytes(2_000_000))
        return 1e-3 if path.suffix == ".pt2" else 1e-6

    monkeypatch.setattr("dinat.export.export", fake)
    monkeypatch.setattr("timm.create_model", create)
    monkeypatch.chdir(tmp_path)
    command("dinat_pico", img_size=(48, 64), pretrained=False)
    assert capsys.readouterr().out == "dinat_pico.onnx: 2.0 MB, largest difference 1.0e-06\n"
    with pytest.raises(UserError, match=r"x.pt2 differs from dinat_pico by 1.0e-03, more than 0.0001"):
        command("dinat_pico", "pt2", tmp_path / "x.pt2", batch_size=4, pretrained=False)
    capsys.readouterr()
    command("local-dir:runs/mine")
    assert capsys.readouterr().out == "mine.onnx: 2.0 MB, largest difference 1.0e-06\n"
    assert calls == [
        ((48, 64), (2, 3, 48, 64), True),
        ((32, 32), (4, 3, 32, 32), False),
        ((32, 32), (2, 3, 32, 32), True),
    ]
    assert created == [("dinat_pico", False), ("dinat_pico", False), ("local-dir:runs/mine", True)]


def test_bad_input(tmp_path, monkeypatch):
    model, images = timm.create_model("dinat_pico"), torch.randn(2, 3, 32, 32)
    with pytest.raises(UserError, match=r"path=model.pb: must end in .onnx or .pt2"):
        export(model, images, "model.pb")
    with pytest.raises(UserError, match=r"path=nowhere/model.pt2: there is no folder nowhere\."):
        export(model, images, "nowhere/model.pt2")
    with pytest.raises(UserError, match=r"--img-size \(0, 0\): dinat_pico does not take it: img_size must be a"):
        command("dinat_pico", img_size=(0, 0), pretrained=False)
    with pytest.raises(UserError, match=r"dinat_mimi: no such model. Did you mean dinat_mini"):
        command("dinat_mimi")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(UserError, match=r'ONNX needs onnxruntime, not installed here: pip install "dinat\[onnx\]"'):
        export(model, images, tmp_path / "model.onnx")
