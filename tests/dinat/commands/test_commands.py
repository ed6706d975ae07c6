"""What the page docs/command_line.md does not show of the commands: results in detail, and wrong arguments."""

import csv
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from dinat import published as published_figures
from dinat.checkpoints import to_huggingface, to_native
from dinat.commands import weights
from dinat.commands.catalogue import ours

ROOT = Path(__file__).parents[3]


@pytest.fixture
def pico(tmp_path):
    """A checkpoint of dinat_pico with 7 classes, and its state dict."""
    state = {
        key: torch.randn_like(value)
        for key, value in timm.create_model("dinat_pico", num_classes=7).state_dict().items()
    }
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "pico.pth.tar")
    return tmp_path / "pico.pth.tar", state


@pytest.fixture
def photo(tmp_path):
    Image.effect_noise((40, 50), 90).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def refused(result, message):
    status, out, err = result
    assert (status, out) == (2, "")
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err


def test_convert_finds_the_architecture_and_keeps_the_weights(dinat, pico, tmp_path):
    file, state = pico
    status, out, _ = dinat("convert", file, tmp_path / "out")
    assert status == 0
    assert out.startswith("dinat_pico: ")
    model = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True)
    assert model.num_classes == 7
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_convert_keeps_window_channels_and_norms(dinat, tmp_path):
    options = dict(kernel_size=5, in_chans=1, stage_norm=True, num_classes=0)
    model = timm.create_model("dinat_pico", **options)
    around = {f"backbone.{key}": value for key, value in model.state_dict().items() if key[:5] != "norm."}
    torch.save(around | {"neck.weight": torch.ones(1)}, tmp_path / "detector.pth")
    assert dinat("convert", tmp_path / "detector.pth", tmp_path / "out")[0] == 0
    again = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True, stage_norm=True, features_only=True)
    image = torch.randn(1, 1, 32, 32)
    expected = model.eval().forward_intermediates(image, intermediates_only=True)
    for a, b in zip(again.eval()(image), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_convert_to_huggingface(dinat, tmp_path):
    from transformers import AutoConfig

    model = timm.create_model("dinat_mini", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "mini.pth")
    command = ("convert", tmp_path / "mini.pth", tmp_path / "out", "--model", "dinat_mini", "--to", "huggingface")
    assert dinat(*command)[0] == 0
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, config.embed_dim, config.depths) == ("dinat", 64, [3, 4, 6, 5])
    assert (config.dilations, config.kernel_size, config.num_labels) == (model.dilations, 7, 3)
    assert (config.layer_norm_eps, config.layer_scale_init_value, config.mlp_ratio) == (1e-5, 0.0, 3.0)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert state.keys() == to_huggingface(model.state_dict(), "dinat.").keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in to_native(state).items())


def test_convert_to_huggingface_has_limits(dinat, tmp_path):
    state = timm.create_model("nat_isotropic_small").state_dict()
    torch.save(state, tmp_path / "x.pth")
    result = dinat(
        "convert", tmp_path / "x.pth", tmp_path / "out", "--model", "nat_isotropic_small", "--to", "huggingface"
    )
    refused(result, "transformers has NAT and DiNAT, no such model as nat_isotropic_small")
    result = dinat("convert", tmp_path / "x.pth", tmp_path / "out")
    refused(
        result, "by its shapes this may be any of dinat_isotropic_small, nat_isotropic_small. Say which with --model."
    )


def test_push(dinat, pico, tmp_path, monkeypatch):
    dinat("convert", pico[0], tmp_path / "out")
    (tmp_path / "out" / "secret.txt").write_text("mine")
    done = []
    info = SimpleNamespace(commit_url="https://hub/commit")
    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "create_repo", lambda self, *a, **k: done.append(("create", a, k)))
    monkeypatch.setattr(api, "upload_folder", lambda self, **k: (done.append(("upload", k)), info)[1])
    assert "would upload" in dinat("push", tmp_path / "out", "me/model")[1]
    assert not done
    status, out, _ = dinat("push", tmp_path / "out", "me/model", "--yes", "--private")
    assert status == 0
    assert "https://hub/commit" in out
    assert done[0] == ("create", ("me/model",), dict(private=True, exist_ok=True))
    assert sorted(done[1][1]["allow_patterns"]) == ["config.json", "model.safetensors"]


def test_push_that_the_hub_refuses(dinat, hub, pico, tmp_path):
    dinat("convert", pico[0], tmp_path / "out")
    status, _, err = dinat("push", tmp_path / "out", "not a name", "--yes")
    assert (status, "error: REPO not a name: " in err) == (2, True)


def test_predict_names_and_formats(dinat, photo, tmp_path, pico):
    status, out, _ = dinat(
        "predict", photo, "--model", "dinat_pico", "--checkpoint", pico[0], "--format", "json", "--top", 9
    )
    rows = json.loads(out)
    assert status == 0
    assert [row["label"] for row in rows] == [str(row["index"]) for row in rows]  # seven classes without names
    assert sorted(row["index"] for row in rows) == list(range(7))
    assert sum(row["probability"] for row in rows) == pytest.approx(1, abs=1e-4)
    (tmp_path / "more" / "below").mkdir(parents=True)
    for name in ("a.PNG", "below/b.png"):
        Image.open(photo).save(tmp_path / "more" / name)
    (tmp_path / "more" / "notes.txt").write_text("no image")
    command = ("predict", tmp_path / "more", photo, "--model", "dinat_pico", "--checkpoint", pico[0], "--format", "csv")
    for batch_size in (1, 2, 16):
        table = list(csv.DictReader(io.StringIO(dinat(*command, "--top", 1, "--batch-size", batch_size)[1])))
        assert [Path(row["image"]).name for row in table] == ["a.PNG", "b.png", "photo.jpg"]


def test_predict_refuses(dinat, photo, tmp_path, pico):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    with_weights = ("--model", "dinat_pico", "--checkpoint", pico[0])
    refused(dinat("predict", bad, *with_weights), f"{bad}: cannot identify image file")
    refused(dinat("predict", tmp_path / "empty"), "the folder holds no images")
    refused(dinat("predict", photo, "--model", "dinat_pica"), "no such model. Did you mean dinat_pico")
    refused(dinat("predict", photo, "--model", "local-dir:/nowhere"), "--model local-dir:/nowhere: ")
    refused(dinat("predict", photo, "--model", "dinat_pico", "--checkpoint", "/nowhere"), "/nowhere: no such file")
    refused(dinat("predict", photo, "--model", "dinat_nano", "--checkpoint", pico[0]), "is of another architecture")
    refused(dinat("predict", photo, "--format", "xml"), "Invalid value for '--format'")
    refused(dinat("predict"), "Missing argument 'IMAGE...'")


def test_list_and_info_refuse(dinat):
    refused(dinat("list", "resnet*"), "PATTERN resnet*: no model has such a name")
    refused(dinat("info", "resnet50"), "MODEL resnet50: no such model")
    refused(dinat("info", "dinat_mini.shi_in2k"), "Did you mean dinat_mini.shi_in1k")
    refused(dinat("lst"), "No such command 'lst'")


def test_info_of_every_model(dinat):
    """Tags and full attention included."""
    for name in ("dinat_large.shi_in22k", "vitrpb_small", "dinat_pico"):
        status, out, err = dinat("info", name)
        assert status == 0, err
        assert out.splitlines()[0].split()[1].startswith(name)


def test_download_refuses(dinat, hub):
    refused(dinat("download", "dinat_mini", "--sha256", "abc"), "--sha256 abc: not 64 hexadecimal digits")
    hub.files["/shi-labs/dinat-mini-in1k-224/resolve/main/pytorch_model.bin"] = b"<html>"
    refused(dinat("download", "dinat_mini"), "a web page, not a checkpoint")


def test_verify_refuses_other_logits_and_infinite_weights(dinat, hub, monkeypatch, photo):
    model = timm.create_model("dinat_mini")
    address = "/shi-labs/dinat-mini-in1k-224/resolve/main/pytorch_model.bin"
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    hub.files[address] = file.getvalue()
    status, _, err = dinat("verify", "dinat_mini", "--image", photo)
    assert status == 2
    assert "the logits begin [" in err
    status, _, err = dinat("verify", "dinat_mini", "--image", "/nowhere.jpg")
    assert (status, "/nowhere.jpg: no such file" in err) == (2, True)
    monkeypatch.setattr(weights, "LOGITS_IMAGE", "http://127.0.0.1:9/cats.jpg")
    status, _, err = dinat("verify", "dinat_mini")
    assert (status, "Give a copy of it with --image" in err) == (2, True)
    model.norm.weight.data[3] = float("inf")
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    hub.files[address] = file.getvalue()
    for path in Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("*"):
        if path.is_file():
            path.unlink()
    status, _, err = dinat("verify", "dinat_mini", "--image", photo)
    assert (status, "norm.weight holds values that are not finite" in err) == (2, True)


def test_published_figures(published):
    tags = {None: "shi_in1k", "in22k": "shi_in22k_ft_in1k"}
    assert {
        f"{name}.{tags[facts['published']['pretraining']]}": facts["published"]["imagenet1k_top1"]
        for name, facts in published["models"].items()
        if facts["published"]["imagenet1k_top1"]
    } == published_figures.TOP1


def test_torch_hub(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = torch.hub.load(str(ROOT), "dinat_pico", source="local", num_classes=4)
    assert model.num_classes == 4
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    assert {name for name in vars(hubconf) if "nat_" in name or "vitrpb" in name} == {
        name.split(".")[0] for name in ours()
    }
    assert "32 to 96 pixels" in hubconf.dinat_pico.__doc__  # what torch.hub.help prints
