"""Two epochs on a generated set of each task, and the figures against the formulas on the model's own predictions."""

import csv
import hashlib
import json
import logging

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from dinat.data import medmnist
from dinat.engine import evaluate, report, train, training
from dinat.errors import UserError

SETS = ("bloodmnist", "breastmnist", "retinamnist", "chestmnist", "fracturemnist3d")
COUNTS = {"train": 30, "val": 40, "test": 50}
PLANE = "++model.kwargs={img_size: 16, embed_dim: 8, depths: [1, 1], num_heads: [1, 1]}"
SPACE = "++model.kwargs={embed_dim: 8, depths: [1, 1], num_heads: [1, 1], stem_stride: 4, vol_size: 28}"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Digits of 8x8 pixels in the middle of each picture, and the like of volumes; labels by what digit it is."""
    folder = tmp_path_factory.mktemp("medmnist")
    digits = load_digits()
    before = {}
    for name in SETS:
        facts = medmnist.known_sets()[name]
        classes, start, content = len(facts["classes"]), 0, {}
        for part, count in COUNTS.items():
            rows = slice(start, start := start + count)
            pixels = np.pad((digits.images[rows] * 15).astype(np.uint8), ((0, 0), (10, 10), (10, 10)))
            if facts["channels"] == 3:
                pixels = pixels[..., None].repeat(3, -1)
            if facts["channels"] == 0:
                pixels = pixels[:, None].repeat(28, 1)
            numbers = digits.target[rows]
            columns = (
                (numbers[:, None] + np.arange(14)) % 3 == 0 if name == "chestmnist" else numbers[:, None] % classes
            )
            content |= {f"{part}_images": pixels, f"{part}_labels": columns.astype(np.uint8)}
        np.savez(folder / f"{name}.npz", **content)
        before[name] = facts["md5"][28]
        facts["md5"][28] = hashlib.md5((folder / f"{name}.npz").read_bytes()).hexdigest()
    yield folder
    for name, digest in before.items():
        medmnist.known_sets()[name]["md5"][28] = digest


@pytest.fixture
def configure(compose, root, monkeypatch):
    monkeypatch.setattr(report, "draw_curves", lambda *_: None)  # a third of the time

    def configure(name: str, *overrides: str):
        recipe = (
            ["experiment=medmnist_3d", SPACE] if name.endswith("3d") else ["data=medmnist", PLANE, "data.img_size=16"]
        )
        return compose(
            *recipe, f"data.name=medmnist/{name}", f"data.root={root}", "batch_size=10",
            "scheduler.epochs=2", "scheduler.warmup_epochs=0", "runtime.device=cpu", *overrides,
        )  # fmt: skip

    return configure


def reference(scores: np.ndarray, labels: np.ndarray, task: str) -> dict[str, float]:
    """MedMNIST's formulas, in percent; labels as in the file."""
    if task.startswith("multi-label"):
        pairs = list(zip(labels.T, scores.T, strict=True))
        auc = np.mean([roc_auc_score(truth, column) for truth, column in pairs])
        acc = np.mean([accuracy_score(truth, column > 0.5) for truth, column in pairs])
    elif task == "binary-class":
        auc, acc = roc_auc_score(labels[:, 0], scores[:, -1]), accuracy_score(labels[:, 0], scores[:, -1] > 0.5)
    else:
        auc = np.mean([roc_auc_score(labels[:, 0] == i, column) for i, column in enumerate(scores.T)])
        acc = accuracy_score(labels[:, 0], scores.argmax(1))
    return {"auc": pytest.approx(100 * auc, abs=1e-3), "acc": pytest.approx(100 * acc, abs=1e-3)}


@pytest.mark.parametrize("name", SETS)
def test_two_epochs(name, configure, evaluation, root, tmp_path):
    """Predictions are of the exported model, on pixels as they are in the file (28 voxels), or resized by Pillow."""
    run = tmp_path / "run"
    trained = train(configure(name), run)
    facts = medmnist.known_sets()[name]
    several = facts["task"].startswith("multi-label")
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    mean, std = (
        model.pretrained_cfg[key][0] if name.endswith("3d") else model.pretrained_cfg[key] for key in ("mean", "std")
    )
    found = {}
    for part in ("val", "test"):
        content = np.load(root / f"{name}.npz")
        images, labels = content[f"{part}_images"], content[f"{part}_labels"]
        if name.endswith("3d"):
            batch = (torch.from_numpy(images)[:, None].float() / 255 - mean) / std
        else:
            transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
            opened = medmnist.MedMNIST(f"medmnist/{name}", root, part)
            batch = torch.stack([transform(image.convert("RGB")) for image, _ in opened])
        with torch.no_grad():
            logits = model(batch)
        scores = (logits.sigmoid() if several else logits.softmax(1)).numpy()
        found[part] = reference(scores, labels, facts["task"])
    assert trained == found["val"]["auc"]
    (row,) = csv.DictReader((run / "test.csv").open())
    assert {key: float(row[key]) for key in ("auc", "acc")} == found["test"]
    result = evaluate(evaluation(f"checkpoint={run}", "data.val_split=test"))
    assert {key: result[key] for key in ("auc", "acc")} == found["test"]
    assert result["count"] == COUNTS["test"]


def test_the_test_split_is_evaluated_once(configure, root, tmp_path, monkeypatch, caplog):
    """After training, with the epoch that is best on the validation split; with none, never."""
    caplog.set_level(logging.INFO, "dinat")
    counted = []

    def note(task, model, batches, **options):
        scores = measure(task, model, batches, **options)
        weights = torch.cat([parameter.flatten() for parameter in model.parameters()]).clone()
        counted.append((scores.count, scores.figures["auc"], weights))
        return scores

    measure = training.measure
    monkeypatch.setattr(training, "measure", note)
    best = train(
        configure("bloodmnist", "checkpoint.export=best", "scheduler.epochs=3", "optimizer.lr=0.02"), tmp_path / "a"
    )
    assert [count for count, _, _ in counted] == [40, 40, 40, 50]
    of_best = max(counted[:3], key=lambda entry: entry[1])
    assert of_best[1] == best
    assert torch.equal(counted[3][2], of_best[2])
    assert "test split, 50 images: loss" in caplog.text
    del counted[:]
    train(configure("bloodmnist", "data.test_split=null", "scheduler.epochs=1"), tmp_path / "b")
    assert [count for count, _, _ in counted] == [40]
    assert not (tmp_path / "b" / "test.csv").exists()


def test_images_and_volumes_are_not_confused(configure, tmp_path):
    other = ["experiment=digits", "data=medmnist", "++model.kwargs.vol_size=null", PLANE, "augment=none"]
    with pytest.raises(
        UserError, match=r"model\.name=dinat_pico takes images, data\.name=medmnist/fracturemnist3d has vol"
    ):
        train(configure("fracturemnist3d", *other), tmp_path / "run")
    other = ["experiment=medmnist_3d", SPACE, "data.img_size=null", "model.kwargs.img_size=null"]
    with pytest.raises(UserError, match=r"takes volumes, .* has images\. Choose a model of images, such as dinat_pico"):
        train(configure("bloodmnist", *other), tmp_path / "run")
    with pytest.raises(UserError, match=r"augment\.transform=.*: for volumes there are flip"):
        train(configure("fracturemnist3d", "augment=light"), tmp_path / "run")
    with pytest.raises(UserError, match="augment: no cutmix and no erasing of volumes"):
        train(configure("fracturemnist3d", "augment.erasing.prob=0.5"), tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.img_size=\[28, 28\]: give one number, or 3 for VolumeNAT"):
        train(configure("fracturemnist3d", "data.img_size=[28,28]"), tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.test_split=test: digits has none"):
        train(configure("bloodmnist", "data=digits", "data.test_split=test", "data.name=digits"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_volumes_of_another_size_mixed_and_channels_last(configure, tmp_path):
    """Resized to 14 voxels for a model of that size; mixup, channels last and recomputation as for images."""
    overrides = ["data.img_size=14", "model.kwargs.vol_size=14", "augment.mixup.mixup_alpha=0.2"]
    overrides += ["runtime.channels_last=true", "runtime.grad_checkpointing=true", "scheduler.epochs=1"]
    assert 0 <= train(configure("fracturemnist3d", *overrides), tmp_path / "run") <= 100
    assert (tmp_path / "run" / "test.csv").exists()


def test_weights_of_images_for_volumes(configure, tmp_path):
    """A run on images is where one on volumes starts; which inflation is an argument of the model."""
    from dinat.engine.checkpoint import read_checkpoint

    flat = "++model.kwargs={img_size: 16, embed_dim: 8, depths: [1, 1], num_heads: [1, 1], stem_stride: 4}"
    train(configure("bloodmnist", flat, "scheduler.epochs=1"), tmp_path / "flat")
    overrides = [f"model.checkpoint={tmp_path / 'flat'}", "model.reset_head=true", "++model.kwargs.inflation=mean"]
    train(configure("fracturemnist3d", *overrides, "optimizer.lr=0", "scheduler.epochs=1"), tmp_path / "deep")
    flat, deep = (read_checkpoint(tmp_path / run / "last.pt")["state_dict"] for run in ("flat", "deep"))
    key = "levels.1.downsample.reduction.weight"
    torch.testing.assert_close(deep[key], flat[key][:, :, None].expand_as(deep[key]) / 3)
    assert deep["head.fc.weight"].shape[0] == 3


def test_corrupted_images_of_a_run(configure, evaluation, tmp_path):
    """Balanced accuracy of five severities at once is their mean: 100 minus MedMNIST-C's balanced error."""
    run = tmp_path / "run"
    train(configure("breastmnist", "scheduler.epochs=1", "optimizer.lr=0.05"), run)
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (30, 224, 224)).astype(np.uint8), np.tile([0, 0, 1, 1, 1, 1], 5)
    (tmp_path / "breastmnist").mkdir()
    np.savez(
        tmp_path / "breastmnist" / "pixelate.npz", test_images=images, test_labels=labels[:, None].astype(np.uint8)
    )
    data = ["data=medmnist_c", "data.name=medmnist_c/breastmnist/pixelate", f"data.root={tmp_path}"]
    result = evaluate(evaluation(f"checkpoint={run}", *data, "data.img_size=16", f"output={tmp_path}"))
    assert result["count"] == 30
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with torch.no_grad():
        batch = torch.stack([transform(Image.fromarray(image).convert("RGB")) for image in images])
        found = model(batch).argmax(1).numpy()
    by_severity = [balanced_accuracy_score(labels[i : i + 6], found[i : i + 6]) for i in range(0, 30, 6)]
    assert result["balanced_acc"] == pytest.approx(100 * np.mean(by_severity), abs=1e-3)


def test_predictions_of_several_labels(configure, dinat, root, tmp_path):
    """Each label by itself."""
    train(configure("chestmnist", "scheduler.epochs=1"), tmp_path / "run")
    Image.fromarray(np.load(root / "chestmnist.npz")["val_images"][0]).save(tmp_path / "chest.png")
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with torch.no_grad():
        logits = model(transform(Image.open(tmp_path / "chest.png").convert("RGB"))[None])[0]
    _, out, errors = dinat(
        "predict", tmp_path / "chest.png", "--model", f"local-dir:{tmp_path / 'run'}", "--format", "json"
    )
    rows = json.loads(out)
    assert [row["probability"] for row in rows] == pytest.approx(logits.sigmoid().topk(5).values.tolist(), abs=1e-5), (
        errors
    )


def test_recipe_for_images(compose, root, tmp_path, caplog, monkeypatch):
    """Weights of another number of classes, a head of its own; the best epoch on the validation split is exported."""
    caplog.set_level(logging.INFO, "dinat")
    monkeypatch.setattr(report, "draw_curves", lambda *_: None)
    size = dict(img_size=32, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    for name in ("dinat_mini", "dinat_tiny"):
        torch.save(timm.create_model(name, **size).state_dict(), tmp_path / "in1k.pth")
        cfg = compose(
            "experiment=medmnist", f"model.name={name}", "data.name=medmnist/bloodmnist", f"data.root={root}",
            "model.pretrained=false", f"model.checkpoint={tmp_path / 'in1k.pth'}", "model.reset_head=true",
            "+model.kwargs={img_size: 32, embed_dim: 8, depths: [1, 1, 1, 1], num_heads: [1, 1, 1, 1]}",
            "data.img_size=32", "batch_size=10", "scheduler.epochs=2", "scheduler.warmup_epochs=0",
            "runtime.device=cpu",
        )  # fmt: skip
        best = train(cfg, tmp_path / name)
        rows = list(csv.DictReader((tmp_path / name / "summary.csv").open()))
        assert best == max(float(row["val_auc"]) for row in rows)
        assert (tmp_path / name / "test.csv").exists()
    assert caplog.text.count("best weights, epoch") == 2
