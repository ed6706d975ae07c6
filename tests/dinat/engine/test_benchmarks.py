"""ImageNet's evaluation sets, on random images and models, against plain loops; and tables of many models."""

import csv
import importlib.resources
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from dinat.data.imagenet import BENCHMARKS
from dinat.engine import evaluate
from dinat.errors import UserError
from dinat.tasks import classification as evaluation_module

SYNSETS = ImageNetInfo().label_names()
INFO = importlib.resources.files("timm.data") / "_info"
REAL = json.loads((INFO / "imagenet_real_labels.json").read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random classifier of 1000 classes that tells images apart, and its checkpoint."""
    torch.manual_seed(3)
    model = timm.create_model("dinat_pico", num_classes=1000).eval()
    torch.nn.init.normal_(model.head.fc.weight, std=1.0)
    path = tmp_path_factory.mktemp("model") / "weights.pth"
    torch.save(model.state_dict(), path)
    return model, path


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path, "PNG")
    return path


def logits(model, path):
    transform = create_transform(**resolve_data_config(model=model))
    with torch.inference_mode():
        return model(transform(Image.open(path).convert("RGB"))[None])[0]


@pytest.fixture
def scores(model, evaluation, tmp_path):
    def scores(benchmark, *overrides):
        cfg = evaluation(
            f"checkpoint={model[1]}", "model.name=dinat_pico", f"data={benchmark}", f"data.root={tmp_path}",
            f"output={tmp_path}/out", *overrides,
        )  # fmt: skip
        return evaluate(cfg)

    return scores


@pytest.mark.parametrize("benchmark", ["imagenet_a", "imagenet_r"])
def test_only_the_200_classes_compete(model, scores, tmp_path, benchmark):
    allowed = [int(line) for line in (INFO / f"{benchmark}_indices.txt").read_text().split()]
    assert [SYNSETS[index] for index in allowed] == (INFO / f"{benchmark}_synsets.txt").read_text().split()
    top1 = top5 = loss = 0
    for seed in range(12):
        path = draw(tmp_path / "x.png", seed)
        row = logits(model[0], path)
        ranked = sorted(allowed, key=lambda index: -row[index])
        target = ranked[(0, 3, 60)[seed % 3]]
        draw(tmp_path / SYNSETS[target] / f"{seed}.png", seed)
        top1 += ranked[0] == target
        top5 += target in ranked[:5]
        loss += torch.logsumexp(row[allowed], 0) - row[target]
        path.unlink()
    result = scores(benchmark)
    assert (result["count"], result["top1"], result["top5"]) == (
        12,
        round(100 * top1 / 12, 4),
        round(100 * top5 / 12, 4),
    )
    assert result["loss"] == pytest.approx(float(loss) / 12, abs=1e-4)
    assert 0 < top1 < top5 < 12


def test_reassessed_labels(model, scores, tmp_path):
    top1 = top5 = counted = 0
    for image in (0, 1, 2, 3, 4, 5, 6, 49999):
        path = draw(tmp_path / "val" / SYNSETS[0] / f"ILSVRC2012_val_{image + 1:08d}.JPEG", image)
        ranked = logits(model[0], path).argsort(descending=True).tolist()
        counted += bool(REAL[image])
        top1 += ranked[0] in REAL[image]
        top5 += any(index in REAL[image] for index in ranked[:5])
    for name in SYNSETS[1:]:
        (tmp_path / "val" / name).mkdir()
    result = scores("imagenet_real", f"data.class_map={write_map(tmp_path)}")
    assert counted == 7  # the first image has no label
    assert (result["count"], result["top1"], result["top5"]) == (7, round(100 * top1 / 7, 4), round(100 * top5 / 7, 4))


def write_map(folder):
    (folder / "classes.txt").write_text("\n".join(SYNSETS))
    return folder / "classes.txt"


@pytest.mark.parametrize(("benchmark", "names"), [("imagenet_v2", map(str, range(1000))), ("imagenet_sketch", SYNSETS)])
def test_class_folders(model, scores, tmp_path, benchmark, names):
    """Also where classes are missing, which must not move the others."""
    names = list(names)
    right = 0
    for seed in range(6):
        path = draw(tmp_path / "x.png", seed)
        best = int(logits(model[0], path).argmax())
        target = best if seed < 4 else (best + 1) % 1000
        draw(tmp_path / names[target] / f"{seed}.png", seed)
        right += best == target
        path.unlink()
    assert scores(benchmark)["top1"] == round(100 * right / 6, 4)
    assert right == 4


def test_refusals(scores, tmp_path):
    draw(tmp_path / "val" / SYNSETS[0] / "cat.png", 0)
    with pytest.raises(UserError, match=r"cat\.png is not named as in ImageNet, ILSVRC2012_val_"):
        scores("imagenet_real", f"data.class_map={write_map(tmp_path)}")
    with pytest.raises(UserError, match="need one label per image"):
        scores("imagenet_real", "per_class=true")
    with pytest.raises(UserError, match=r"data\.benchmark=imagenet_b: not known.* Did you mean imagenet_"):
        scores("imagenet_a", "data.benchmark=imagenet_b")


def test_configurations(evaluation):
    for benchmark in BENCHMARKS:
        assert evaluation(f"data={benchmark}").data.benchmark == benchmark


def test_a_sweep_fills_one_table(python, tmp_path):
    draw(tmp_path / "v2" / "7" / "x.png", 1)
    table = tmp_path / "results" / "table.csv"
    command = (
        "eval.py", "-m", "model.name=dinat_pico,dinat_nano", "data=imagenet_v2",
        f"data.root={tmp_path}/v2", f"table={table}", f"output={tmp_path}", "runtime.device=cpu",
        f"hydra.sweep.dir={tmp_path}/sweep",
    )  # fmt: skip
    done = python(*command)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(table.open()))
    assert {row["model"] for row in rows} == {"dinat_pico", "dinat_nano"}
    assert [float(row["top1"]) for row in rows] == sorted((float(row["top1"]) for row in rows), reverse=True)
    assert [*rows[0]][:4] == ["data", "model", "top1", "top1_err"]
    assert [*rows[0]][-2:] == ["published", "difference"]


def test_published_figure_and_difference(evaluation, tmp_path, monkeypatch):
    """Of published weights on ImageNet's validation images only; a repeated evaluation replaces its row."""
    state = timm.create_model("dinat_pico", num_classes=1000).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    create_model = timm.create_model
    overlay = dict(file=str(tmp_path / "weights.pth"), num_classes=1000)
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: create_model(*a, **k | dict(pretrained_cfg_overlay=overlay))
    )
    monkeypatch.setattr(evaluation_module, "TOP1", {"dinat_pico.untrained": 71.25})
    for name in SYNSETS[::300]:
        draw(tmp_path / "val" / name / "x.png", 1)
    common = (
        f"data.class_map={write_map(tmp_path)}",
        f"data.root={tmp_path}",
        f"output={tmp_path}",
        f"table={tmp_path}/table.csv",
        "model.name=dinat_pico",
    )
    for overrides in (
        ("data=imagenet", "model.pretrained=true"),
        ("data=imagenet", "model.pretrained=true"),
        ("data=imagenet_sketch", "data.val_split=val", "model.pretrained=true"),
    ):
        result = evaluate(evaluation(*common, *overrides))
    rows = {row["data"]: row for row in csv.DictReader((tmp_path / "table.csv").open())}
    assert list(rows) == ["imagenet", "imagenet_sketch"]
    assert rows["imagenet"]["published"] == "71.25"
    assert float(rows["imagenet"]["difference"]) == pytest.approx(result["top1"] - 71.25)
    assert (rows["imagenet_sketch"]["published"], rows["imagenet_sketch"]["difference"]) == ("", "")
