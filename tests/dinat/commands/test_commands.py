"""What the page docs/command_line.md does not show of the commands: results in detail, and wrong arguments."""

import csv
import importlib.util
import io
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from dinat import published as published_figures
from dinat.checkpoints import Shape, to_huggingface, to_native
from dinat.commands import weights
from dinat.commands.catalogue import ours

ROOT = Path(__file__).parents[3]


@pytest.fixture
def pico(tmp_path):
    """A checkpoint of dinat_pico with 7 classes, none of which takes all of the softmax, and its state dict."""
    state = {
        key: torch.randn_like(value) * (0.1 if key.startswith("head.fc") else 1)
        for key, value in timm.create_model("dinat_pico", num_classes=7).state_dict().items()
    }
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "pico.pth.tar")
    return tmp_path / "pico.pth.tar", state


@pytest.fixture
def photo(tmp_path):
    Image.effect_noise((40, 50), 90).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def tensor_of(image):
    """An image as the models see it."""
    scaled = (np.asarray(image.convert("RGB")) / 255 - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
    return torch.from_numpy(scaled).float().permute(2, 0, 1)


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
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [1, 32, 32]
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
    assert (config.kernel_size, config.num_labels) == (7, 3)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dilations"] == model.dilations  # no default
    assert (config.layer_norm_eps, config.layer_scale_init_value, config.mlp_ratio) == (1e-5, 0.0, 3.0)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert state.keys() == to_huggingface(model.state_dict(), "dinat.").keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in to_native(state).items())


def test_layer_scale_tells_architectures_apart(monkeypatch):
    names = ["nat_small", "dinat_small"]
    monkeypatch.setattr(weights, "ours", lambda: names)  # all take a second
    for name in names:
        shape = Shape.of(timm.create_model(name, device="meta").state_dict())
        assert weights.architecture_of(shape, Path("file")) == name


def test_a_backbone_for_huggingface(tmp_path):
    """NAT, with layer scale, without a classifier, of one channel."""
    options = dict(embed_dim=8, num_heads=(1, 2, 4, 8), num_classes=0, in_chans=1)
    model = timm.create_model("nat_mini", depths=(1, 2, 1, 1), ls_init_value=1e-5, stage_norm=True, **options)
    weights.write_huggingface(model, "nat_mini", Shape.of(model.state_dict()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["model_type"], config["num_channels"]) == (["NatBackbone"], "nat", 1)
    assert (config["depths"], config["num_heads"]) == ([1, 2, 1, 1], [1, 2, 4, 8])
    assert (config["layer_scale_init_value"], config["id2label"], "dilations" in config) == (1e-5, {}, False)
    assert config["out_features"] == ["stage1", "stage2", "stage3", "stage4"]
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"hidden_states_norms.stage4.weight", "encoder.levels.1.layers.1.layer_scale_parameters"} <= names
    assert not [name for name in names if name.startswith(("layernorm", "nat.", "classifier"))]


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
    for name in ("secret.txt", "README.md"):
        (tmp_path / "out" / name).write_text("mine")
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
    assert done[1][1]["repo_id"] == "me/model"
    assert sorted(done[1][1]["allow_patterns"]) == ["README.md", "config.json", "model.safetensors"]
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    dinat("push", tmp_path / "out", "me/model", "--yes")
    assert done[2] == ("create", ("me/model",), dict(private=False, exist_ok=True))


def test_push_writes_the_card_that_is_not_there(dinat, hub, pico, tmp_path, monkeypatch):
    for layout, library in (("timm", "timm"), ("huggingface", "transformers")):
        folder = tmp_path / layout
        assert dinat("convert", pico[0], folder, "--to", layout)[0] == 0
        (folder / "README.md").unlink(missing_ok=True)
        assert "states no licence" in dinat("push", folder, "me/model")[1]
        assert not (folder / "README.md").exists()
        assert "would upload README.md" in dinat("push", folder, "me/model", "--license", "mit")[1]
        dinat("push", folder, "not a name", "--yes", "--license", "mit")
        card = ModelCard.load(folder / "README.md").data
        assert (card.library_name, card.license, card.pipeline_tag) == (library, "mit", "image-classification")


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


def test_names_are_shown_as_they_are(dinat, photo, tmp_path, pico):
    """Neither markup nor the names of emoji."""
    for name in ("[red]a.png", ":cat:.png", "[bold]bad.png"):
        Image.open(photo).save(tmp_path / name)
    (tmp_path / "[bold]bad.png").write_bytes(b"no image")
    paths = [tmp_path / name for name in ("[red]a.png", ":cat:.png", "[bold]bad.png")]
    _, out, err = dinat("predict", *paths, "--model", "dinat_pico", "--checkpoint", pico[0], "--top", 1)
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(map(str, paths[:2]))  # nor are they cut
    assert err.splitlines()[0] == f"{paths[2]}: cannot identify image file"


def test_predict_shows_the_softmax_of_the_model(dinat, tmp_path):
    """In evaluation mode, of each image its own, under the names that the model has for its classes."""
    images = [Image.effect_noise((32, 32), sigma) for sigma in (30, 90, 60)]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    model = timm.create_model("dinat_pico", num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "pico.pth")
    dinat("convert", tmp_path / "pico.pth", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = [f"class {letter}" for letter in "abcdefg"]
    config |= {"label_names": names, "model_args": {"drop_rate": 0.9}}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        probabilities = model(torch.stack(list(map(tensor_of, images)))).softmax(1)
    files = [tmp_path / f"{i}.png" for i in range(3)]
    options = ("--model", f"local-dir:{tmp_path}/out", "--format", "json", "--top", 2, "--batch-size", 2)
    rows = json.loads(dinat("predict", *files, *options)[1])
    for i, row in enumerate(rows):
        index = probabilities[i // 2].argsort(descending=True)[i % 2].item()
        assert (row["image"], row["rank"]) == (str(files[i // 2]), i % 2 + 1)
        assert (row["index"], row["label"]) == (index, names[index])
        assert row["probability"] == pytest.approx(probabilities[i // 2, index].item(), abs=1e-5)


def test_predict_refuses(dinat, photo, tmp_path, pico):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    with_weights = ("--model", "dinat_pico", "--checkpoint", pico[0])
    refused(dinat("predict", bad, *with_weights), f"{bad}: cannot identify image file")
    refused(dinat("predict", tmp_path / "empty"), "the folder holds no images")
    refused(dinat("predict", photo, "--model", "dinat_pica"), "no such model. Did you mean dinat_pico")
    refused(dinat("predict", photo, "--model", "local-dir:/nowhere"), "--model local-dir:/nowhere: ")
    (tmp_path / "empty" / "config.json").write_text("{")
    refused(dinat("predict", photo, "--model", f"local-dir:{tmp_path}/empty"), "config.json: not JSON, perhaps cut")
    refused(dinat("predict", photo, "--model", "dinat_pico", "--checkpoint", "/nowhere"), "/nowhere: no such file")
    refused(dinat("predict", photo, "--model", "dinat_pico", "--checkpoint", tmp_path), "a folder, not a file")
    refused(dinat("predict", photo, "--model", "dinat_nano", "--checkpoint", pico[0]), "is of another architecture")
    refused(
        dinat("predict", photo, "--multi-scale"), "--multi-scale: not with --model dinat_mini, only with models for"
    )
    refused(dinat("predict", photo, "--format", "xml"), "Invalid value for '--format'")
    refused(dinat("predict"), "Missing argument 'IMAGE...'")


def test_list_and_info_refuse(dinat):
    refused(dinat("list", "resnet*"), "PATTERN resnet*: no model has such a name")
    refused(dinat("info", "resnet50"), "MODEL resnet50: no such model")
    refused(dinat("info", "dinat_mini.shi_in2k"), "Did you mean dinat_mini.shi_in1k")
    refused(dinat("lst"), "No such command 'lst'")


def test_info_of_every_model(dinat):
    """Tags and full attention included."""
    for name in ("dinat_large.shi_in22k", "vitrpb_small", "dinat_pico", "dinat_3d_pico"):
        status, out, err = dinat("info", name)
        assert status == 0, err
        assert out.splitlines()[0].split()[1].startswith(name)
    assert "0.2 G at 28 x 28 x 28 voxels" in out
    assert "1x1x1 4x4x4 | 1x1x1 2x2x2 |" in out


def test_download_refuses(dinat, hub):
    refused(dinat("download", "dinat_mini", "--sha256", "abc"), "--sha256 abc: not 64 hexadecimal digits")
    hub.files["/shi-labs/dinat-mini-in1k-224/resolve/main/pytorch_model.bin"] = b"<html>"
    refused(dinat("download", "dinat_mini"), "a web page, not a checkpoint")


def test_options_of_download_reach_it(dinat, monkeypatch, photo, tmp_path):
    calls = []
    monkeypatch.setattr(weights.checkpoints, "download", lambda *arguments: (calls.append(arguments[1:]), photo)[1])
    dinat("download", "dinat_mini", "--cache-dir", tmp_path, "--sha256", "A" * 64, "--force")
    dinat("download", "dinat_mini")
    assert calls == [(tmp_path, "A" * 64, True), (None, None, False)]


def test_known_logits_are_those_of_the_squashed_image(photo):
    options = dict(img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2))
    model = timm.create_model("dinat_mini", pretrained_cfg_overlay=dict(input_size=(3, 32, 32)), **options).eval()
    seen = []
    model.register_forward_pre_hook(lambda _, images: seen.append(images[0]))
    logits = weights.known_image_logits(model, photo)
    squashed = Image.open(photo).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    torch.testing.assert_close(seen[0][0], tensor_of(squashed))
    with torch.no_grad():
        torch.testing.assert_close(logits, model(seen[0])[0])


def test_no_command_runs_code_of_a_checkpoint(dinat, photo, tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    torch.save({"state_dict": timm.create_model("dinat_pico").state_dict(), "hook": Touch()}, tmp_path / "bad.pth")
    refused(dinat("convert", tmp_path / "bad.pth", tmp_path / "out"), "bad.pth: not a readable checkpoint")
    command = ("predict", photo, "--model", "dinat_pico", "--checkpoint", tmp_path / "bad.pth")
    refused(dinat(*command), "bad.pth: not a readable checkpoint")
    assert not (tmp_path / "touched").exists()


def test_verify_refuses_other_logits_and_infinite_weights(dinat, hub, monkeypatch, photo):
    small = dict(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **small))
    model = timm.create_model("dinat_mini")
    address = "/shi-labs/dinat-mini-in1k-224/resolve/main/pytorch_model.bin"
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    hub.files[address] = file.getvalue()
    known = weights.known_image_logits(model.eval(), photo)[:3]
    for deviation in (0.1, -0.1):
        figures = {"dinat_mini.shi_in1k": tuple((known + torch.tensor([0, deviation, 0])).tolist())}
        monkeypatch.setattr(weights, "LOGITS", figures)
        status, _, err = dinat("verify", "dinat_mini", "--image", photo)
        assert status == 2
        assert "the logits begin [" in err
    status, _, err = dinat("verify", "dinat_mini", "--image", "/nowhere.jpg")
    assert (status, "/nowhere.jpg: no such file" in err) == (2, True)
    monkeypatch.setattr(weights, "LOGITS_IMAGE", "http://127.0.0.1:9/cats.jpg")
    status, _, err = dinat("verify", "dinat_mini")
    assert (status, "Give a copy of it with --image" in err) == (2, True)
    model.norm.weight.data[3] = -float("inf")
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
