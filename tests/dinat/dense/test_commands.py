"""`dinat` with published models for dense prediction, made small: every command, and folders of transformers."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dinat.dense
from dinat.dense import PUBLISHED
from dinat.dense.huggingface import save_pretrained
from dinat.dense.texts import TASK_TOKENS

DETECTOR, SEMANTIC = "mask_rcnn_dinat_mini.coco", "upernet_nat_small.ade20k"
INSTANCES, PANOPTIC = "mask2former_dinat_large.cityscapes_instance", "oneformer_dinat_large.cityscapes"
NAMES = [DETECTOR, SEMANTIC, INSTANCES, PANOPTIC]


@pytest.fixture
def weights(monkeypatch, tiny, as_published, tmp_path):
    """Makes a file in its published layout, and the model; the commands make models of that size."""
    create = dinat.dense.create_model
    small = lambda name, *args, **kwargs: (tiny if name in PUBLISHED else create)(name, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(dinat.dense, "create_model", small)

    def weights(name):
        model = tiny(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        torch.save({"model": as_published(model)}, tmp_path / "weights.pth")
        return tmp_path / "weights.pth", model.eval()

    return weights


def test_list(dinat, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    status, out, _ = dinat("list", "*.ade20k")
    lines = out.splitlines()
    assert (status, len(lines)) == (0, 1 + 13 + 3)
    assert " ".join(lines[1].split()) == "upernet_nat_mini.ade20k 512 150 mIoU 45.1 publisher"
    _, out, _ = dinat("list", "oneformer*cityscapes")
    assert " ".join(out.splitlines()[1].split()[3:]) == "PQ 67.6, mask AP 45.6, mIoU 83.1 hub, publisher"


@pytest.mark.parametrize("name", NAMES)
def test_info(name, dinat):
    status, out, err = dinat("info", name)
    assert status == 0, err
    row, lines = PUBLISHED[name], dict(line.split(maxsplit=1) for line in out.splitlines() if line[:5] != "     ")
    assert (lines["model"], lines["method"], lines["task"]) == (name, row.method, row.task)
    assert lines["classes"] == f"{len(row.classes)} of {row.data}"
    assert lines["dilations"] == " | ".join(" ".join(map(str, level)) for level in row.dilations)


def test_info_in_words(dinat):
    _, out, _ = dinat("info", "upernet_dinat_s_tiny.ade20k")
    for line in (
        "parameters       59.9 M", "backbone         dinat_s_tiny.shi_in1k", "layer scale      no",
        "dilations        1 16 | 1 8 | 1 2 1 3 1 4 | 1 2", "published        mIoU 46.0, mIoU of several scales 47.4",
        "test image       512 / 2048 (shortest / longest side), bilinear, as OpenCV does",
        "several scales   256 / 1024, 384 / 1536, 512 / 2048, 640 / 2560, 768 / 3072, 896 / 3584, each mirrored too",
        "weights          https://shi-labs.com/projects/dinat/checkpoints/ade20k/upernet_dinat_s_tiny.pth",
    ):  # fmt: skip
        assert line in out.splitlines()
    status, _, err = dinat("info", "mask_rcnn_dinat_tiny.coko")
    assert (status, "no such model. Did you mean mask_rcnn_dinat_tiny.coco" in err) == (2, True)
    status, _, err = dinat("info", "mask_rcnn_dinat_tiny")  # of which data, the name must say
    assert (status, "no such model. Did you mean mask_rcnn_dinat_tiny.coco" in err) == (2, True)


def test_download_and_verify(dinat, hub, weights, monkeypatch, tmp_path):
    file, model = weights(DETECTOR)
    monkeypatch.setattr(type(PUBLISHED[DETECTOR]), "host", hub.url)
    hub.files = {f"/projects/{PUBLISHED[DETECTOR].path}": file.read_bytes()}
    status, out, err = dinat("download", DETECTOR)
    assert (status, "maskrcnn_dinat_mini.pth\nsha256 " in out) == (0, True), err
    status, out, err = dinat("verify", DETECTOR)
    assert status == 0, err
    assert f"structure  ok, {len(model.state_dict())} tensors, 80 classes\nlogits     none are known" in out
    status, _, err = dinat("verify", "mask_rcnn_dinat_tiny.coco")
    assert (status, "no source has the weights" in err) == (2, True)


@pytest.mark.parametrize("name", NAMES)
def test_convert(name, dinat, weights, tmp_path):
    """To a folder of ours, with all that a run's folder has."""
    file, model = weights(name)
    status, out, err = dinat("convert", file, tmp_path / "out", "--model", name)
    assert status == 0, err
    assert out == f"{name}: {len(model.state_dict())} tensors, {model.num_classes} classes, in {tmp_path / 'out'}\n"
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    row = PUBLISHED[name]
    assert (described["task"], described["label_names"]) == (row.task, list(row.classes.names))
    assert described["category_ids"] == list(row.classes.ids)
    assert described["preprocessing"]["transform"] == [{"resize": row.resize}]
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_convert_says_what_it_leaves_out_and_what_it_cannot(dinat, weights, tmp_path):
    file, _ = weights(DETECTOR)
    status, _, err = dinat("convert", file, tmp_path / "out", "--model", DETECTOR, "--to", "huggingface")
    assert (status, f"--to huggingface: {DETECTOR}: transformers has no MaskRCNN; it has UPerNet" in err) == (2, True)
    status, _, err = dinat("convert", file, tmp_path / "out", "--model", SEMANTIC)
    assert (status, "the checkpoint is of the method mask_rcnn, the model is of the method upernet" in err) == (2, True)
    assert not (tmp_path / "out" / "config.json").exists()


def test_convert_of_a_backbone_says_that_the_head_is_left_out(dinat, tmp_path, published_weights):
    backbone = {f"backbone.{key}": value for key, value in published_weights("dinat_mini").items() if "head" not in key}
    torch.save(backbone | {"decode_head.conv_seg.weight": torch.ones(1)}, tmp_path / "weights.pth")
    status, out, err = dinat("convert", tmp_path / "weights.pth", tmp_path / "out", "--model", "dinat_mini")
    assert status == 0, err
    assert "the head, of the method upernet, is left out: --model upernet_dinat_mini.DATA keeps it" in out


READ = """
import sys, torch, dinat.integrations.transformers, transformers
for folder in sys.argv[1:]:
    if folder.endswith("dinat"):
        dinat.integrations.transformers.enable()
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        found = model.eval()(*torch.load(f"{folder}/inputs.pt"))
    names = ("logits",) if "logits" in found else ("class_queries_logits", "masks_queries_logits")
    torch.save([config.id2label[1], *(found[name] for name in names)], f"{folder}/outputs.pt")
"""


def test_transformers_and_back(dinat, weights, tmp_path):
    """`from_pretrained` in a fresh process gives the same outputs, and its file the same model."""
    names = (SEMANTIC, INSTANCES, PANOPTIC)
    cases = [*((name, "huggingface") for name in names), *((name, "huggingface-dinat") for name in names)]
    folders, outputs, states = [], [], []
    for name, to in cases:
        (file, model), inputs = weights(name), [torch.randn(1, 3, 64, 96)]
        folders.append(tmp_path / f"{PUBLISHED[name].method}-{to}")
        status, _, err = dinat("convert", file, folders[-1], "--model", name, "--to", to)
        assert status == 0, err
        hook = model.network.register_forward_pre_hook(lambda _, args, seen=inputs: seen.extend(args[1:]))
        with torch.no_grad():
            found = model(inputs[0])
        hook.remove()
        outputs.append([found] if isinstance(found, torch.Tensor) else list(found))
        torch.save(inputs, folders[-1] / "inputs.pt")
        states.append({key: value.clone() for key, value in model.state_dict().items()})
    run = subprocess.run([sys.executable, "-c", READ, *map(str, folders)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    for folder, expected, state, (name, _) in zip(folders, outputs, states, cases, strict=True):
        label, *found = torch.load(folder / "outputs.pt")
        assert label == PUBLISHED[name].classes.names[1]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        status, _, err = dinat("convert", folder / "model.safetensors", tmp_path / "back", "--model", name)
        assert status == 0, err
        back = load_file(tmp_path / "back" / "model.safetensors")
        assert all(torch.equal(value, back[key]) for key, value in state.items())


def test_folders_of_transformers_read_no_texts(tiny, tmp_path):
    """There, a OneFormer with a text encoder demands texts for every image, and cannot predict."""
    from transformers import OneFormerForUniversalSegmentation

    names = PUBLISHED[PANOPTIC].classes.names
    model = tiny(PANOPTIC, width=64, queries=17, tokenizer="clip", class_names=names, text_layers=1).eval()
    save_pretrained(model, tmp_path, names)
    again, info = OneFormerForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    image, task = torch.randn(1, 3, 64, 96), torch.zeros(1, 77)
    task[0, :7] = torch.tensor(TASK_TOKENS["panoptic"])
    with torch.no_grad():
        logits, _ = model(image)
        torch.testing.assert_close(again.eval()(image, task).class_queries_logits, logits)


def test_transformers_has_no_dinat_s(dinat, weights, tmp_path):
    name = "upernet_dinat_s_tiny.ade20k"
    file, _ = weights(name)
    command = ("convert", file, tmp_path / "out", "--model", name, "--to", "huggingface-dinat")
    status, _, err = dinat(*command)
    assert (status, "has no DiNAT_s. Use --to huggingface." in err) == (2, True)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        (DETECTOR, {"photo.png", "detections.json"}),
        (SEMANTIC, {"photo.png", "photo_labels.png"}),
        (PANOPTIC, {"photo.png", "panoptic.json", "panoptic"}),
    ],
)
def test_predict(name, files, dinat, weights, monkeypatch, tmp_path):
    """With a file in its published layout."""
    row, (file, model) = PUBLISHED[name], weights(name)
    resize = {"shortest": 48, "resample": row.resize["resample"]}  # the image's size: nothing is resized
    monkeypatch.setitem(PUBLISHED, name, replace(row, resize=resize))
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    folder = tmp_path / "found"
    status, _, err = dinat("predict", tmp_path / "photo.png", "--model", name, "--checkpoint", file, "--output", folder)
    assert status == 0, err
    assert {path.name for path in folder.iterdir()} == files
    if name == SEMANTIC:
        mean, std = (np.array(row.preprocessing[key]) for key in ("mean", "std"))
        image = torch.from_numpy((pixels / 255 - mean) / std).float().permute(2, 0, 1)
        expected = model.predict([image])[0]["semantic"]
        assert np.array_equal(np.array(Image.open(folder / "photo_labels.png")), expected.numpy())


def test_predict_refuses(dinat, weights, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    status, _, err = dinat("predict", tmp_path / "photo.jpg", "--model", DETECTOR)
    assert (status, "--output is not set" in err) == (2, True)
    file, _ = weights(DETECTOR)
    dinat("convert", file, tmp_path / "out", "--model", DETECTOR)
    command = ("--model", f"local-dir:{tmp_path}/out", "--checkpoint", file, "--output", tmp_path / "found")
    status, _, err = dinat("predict", tmp_path / "photo.jpg", *command)
    assert (status, "has its weights already. Leave one of them out" in err) == (2, True)


def test_results_never_replace_an_image_or_each_other(dinat, tmp_path):
    names = ("a.png", "a.jpg", "a_labels.jpg", "below/a.jpg")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    png, jpg, labels, other = (tmp_path / name for name in names)
    found, at = tmp_path / "found", lambda folder: ("--model", SEMANTIC, "--output", folder)
    for arguments, message in (
        ((tmp_path, *at(tmp_path / "below" / "..")), "/a.png, a result of {jpg}, would replace an image. Give"),
        ((jpg, png, *at(tmp_path)), f"--output {tmp_path}: {png}, a result of {jpg}, would replace an image"),
        ((jpg, other, *at(found)), f"IMAGE {other}: its result {found}/a.png would be that of {jpg} too. Rename one"),
        ((jpg, labels, *at(found)), f"IMAGE {labels}: its result {found}/a_labels.png would be that of {jpg} too."),
    ):
        status, _, err = dinat("predict", *arguments)
        assert (status, message.format(jpg=jpg) in err) == (2, True), err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


@pytest.mark.parametrize("name", [DETECTOR, PANOPTIC])
def test_several_scales_are_for_semantic_maps(name, dinat, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    status, _, err = dinat("predict", tmp_path / "a.jpg", "--model", name, "--output", tmp_path / "x", "--multi-scale")
    message = f"error: --multi-scale: not with --model {name}, only with models for semantic segmentation.\n"
    assert (status, err) == (2, message)


def test_export_knows_them(dinat, weights):
    weights(DETECTOR)
    command = ("export", DETECTOR, "--no-pretrained", "--img-size", 64, 64)
    status, _, err = dinat(*command)
    assert (status, "MaskRCNN cannot be exported: how many proposals" in err) == (2, True)


def test_push(dinat, weights, monkeypatch, tmp_path):
    file, _ = weights(SEMANTIC)
    dinat("convert", file, tmp_path / "out", "--model", SEMANTIC)
    done = []
    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "create_repo", lambda self, *a, **k: done.append(a))
    answer = SimpleNamespace(commit_url="https://hub/commit")
    monkeypatch.setattr(api, "upload_folder", lambda self, **k: (done.append(k), answer)[1])
    status, out, _ = dinat("push", tmp_path / "out", "me/model", "--yes")
    assert (status, "https://hub/commit" in out) == (0, True)
    assert sorted(done[1]["allow_patterns"]) == ["README.md", "config.json", "model.safetensors"]
