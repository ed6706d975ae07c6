"""Detection, semantic and panoptic segmentation in the loop: what a run leaves, that it repeats, that it resumes."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

import dinat.commands
import dinat.data.scenes
import dinat.dense
from dinat.dense.model import DenseModel
from dinat.distributed import ALONE
from dinat.engine import evaluate, train
from dinat.engine.checkpoint import read_checkpoint
from dinat.engine.training import Trainer
from dinat.errors import UserError
from dinat.tasks.dense import DenseTask

TASKS = ("detection", "semantic", "panoptic")
HEADLINES = {"detection": "box_ap", "semantic": "miou", "panoptic": "pq"}


@pytest.fixture(scope="module", params=TASKS)
def run(request, scenes, tmp_path_factory):
    """A finished run of each task: its folder, and the figure that training returned."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, train(scenes(request.param, "ema.decay=0.5"), folder)


def test_run_folder(run):
    task, folder, score = run
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md", "best.pt", "config.json", "config.yaml", "curves.png", "environment.json", "last.pt",
        "model.safetensors", "predictions.png", "summary.csv", "train.log",
    }  # fmt: skip
    first, last = csv.DictReader((folder / "summary.csv").open())
    assert first[f"val_{HEADLINES[task]}"] == ""
    assert float(last[f"val_{HEADLINES[task]}"]) == score
    parts = [float(value) for name, value in last.items() if name.startswith("train_loss_")]
    assert len(parts) > 1
    assert float(last["train_loss"]) == pytest.approx(sum(parts), rel=1e-5)
    assert Image.open(folder / "predictions.png").width == 3 * 328 - 8
    card = ModelCard.load(folder / "README.md").data
    assert round(score, 4) in {result.metric_value for result in card.eval_results}
    assert card.pipeline_tag == ("object-detection" if task == "detection" else "image-segmentation")


def test_evaluation_repeats_the_figure_of_training(run, evaluation, tmp_path):
    task, folder, score = run
    result = evaluate(evaluation(f"checkpoint={folder}", f"output={tmp_path}", "per_class=true"))
    assert (result["task"], result["count"], result["skipped"]) == (task, 128, 0)
    assert result[HEADLINES[task]] == round(score, 4)
    row = next(csv.DictReader((tmp_path / "results.csv").open()))
    assert float(row[HEADLINES[task]]) == round(score, 4)
    assert len((tmp_path / "per_class.csv").read_text().splitlines()) == (11 if task == "detection" else 12)
    json.dumps(result, allow_nan=False)


def test_a_run_is_evaluated_for_other_tasks(run, evaluation, tmp_path, monkeypatch):
    """`test.task`: the segments' map, and digits without the background; models of one task say so."""
    task, folder, _ = run
    other = {"detection": "semantic", "semantic": "detection", "panoptic": "semantic"}[task]
    cfg = evaluation(f"checkpoint={folder}", f"output={tmp_path}", f"test.task={other}")
    if task != "panoptic":
        with pytest.raises(UserError, match=rf"test\.task={other}: local-dir:.* is for {task}\."):
            evaluate(cfg)
    else:
        monkeypatch.setattr(dinat.data.scenes, "VALIDATION_SCENES", 3)
        result = evaluate(cfg)
        assert (result["task"], result["count"]) == ("semantic", 3)
        assert 0 <= result["miou"] <= 100
        result = evaluate(
            evaluation(f"checkpoint={folder}", f"output={tmp_path}", "test.task=detection", "per_class=true")
        )
        assert (result["task"], result["count"]) == ("detection", 3)
        rows = list(csv.DictReader((tmp_path / "per_class.csv").open()))
        assert [row["class"] for row in rows] == [str(digit) for digit in range(10)]


def test_exported_folder_is_a_model(run):
    task, folder, _ = run
    model = dinat.dense.create_model(f"local-dir:{folder}", pretrained=True).eval()
    averaged = read_checkpoint(folder / "last.pt")["state_dict_ema"]
    assert model.task == task
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in model.state_dict().items())
    (found,) = model.predict([torch.zeros(3, 40, 56)], [(20, 28)])
    maps = found["masks"] if task == "detection" else found[task]
    assert maps.shape[-2:] == (20, 28)


def test_predict_writes_pictures_and_results(run, tmp_path, monkeypatch, capsys):
    """The command line on images of other sizes, one of them damaged."""
    task, folder, _ = run
    for index, size in enumerate([(40, 28), (64, 64)], start=1):
        Image.new("RGB", size, (90, 120, 60 + index)).save(tmp_path / f"{index}.jpg")
    (tmp_path / "0.jpg").write_text("no image")
    output = tmp_path / "found"
    arguments = ["dinat", "predict", tmp_path, "--model", f"local-dir:{folder}", "--output", output]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    with pytest.raises(SystemExit) as stop:
        dinat.commands.main()
    assert stop.value.code == 2
    messages = capsys.readouterr().err
    assert "0.jpg: cannot identify image file" in messages
    assert "1 of 3 images cannot be read" in messages
    assert Image.open(output / "1.png").size == (40, 28)
    if task == "detection":
        records = json.loads((output / "detections.json").read_text())
        assert {(record["image_id"], record["file_name"]) for record in records} == {
            (number, str(tmp_path / f"{number}.jpg")) for number in (1, 2)
        }
        assert all(record["segmentation"]["size"] in ([28, 40], [64, 64]) for record in records)
    elif task == "panoptic":
        annotations = json.loads((output / "panoptic.json").read_text())["annotations"]
        assert [(one["image_id"], one["file_name"]) for one in annotations] == [(1, "1.png"), (2, "2.png")]
        assert Image.open(output / "panoptic" / "2.png").size == (64, 64)
    else:
        labels = Image.open(output / "1_labels.png")
        assert (labels.size, labels.mode) == ((40, 28), "L")


def test_crowds_are_not_drawn_as_objects(tmp_path, monkeypatch):
    target = {
        "boxes": torch.tensor([[1.0, 1, 5, 5], [0, 0, 9, 9]]), "labels": torch.tensor([1, 0]),
        "iscrowd": torch.tensor([False, True]),
    }  # fmt: skip
    task = SimpleNamespace(
        val_set=[(torch.zeros(3, 9, 9, dtype=torch.uint8), target)], classes=["ant", "bee"],
        views=lambda: [[]], predict=lambda *_: [{}],
    )  # fmt: skip
    drawn = []
    monkeypatch.setattr("dinat.tasks.dense.write_pictures", lambda path, rows, classes: drawn.extend(rows))
    DenseTask.draw(task, torch.nn.Identity(), tmp_path)
    ((_, truth, _),) = drawn
    assert (truth["boxes"].tolist(), truth["labels"].tolist()) == ([[1, 1, 5, 5]], [1])


def test_predict_at_several_scales(tmp_path, monkeypatch, capsys):
    """The sizes are those of the model's resize times 0.5 to 1.75."""
    sizes, predict_views = [], DenseModel.predict_views

    def spy(self, views, size):
        sizes.extend(tuple(view.shape) for view in views)
        return predict_views(self, views, size)

    kwargs = {"channels": 8, "auxiliary_channels": 0}
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3, "transform": [{"resize": {"shortest": 32}}]}
    described = {
        "task": "semantic", "model": {"name": "upernet", "backbone": "test_convnext", "kwargs": kwargs},
        "num_classes": 2, "label_names": ["ant", "bee"], "preprocessing": preprocessing,
    }  # fmt: skip
    (tmp_path / "run").mkdir()
    model = dinat.dense.create_model("upernet", backbone="test_convnext", num_classes=2, **kwargs)
    dinat.dense.save(model, described, tmp_path / "run")
    Image.new("RGB", (40, 20), "gray").save(tmp_path / "a.png")
    monkeypatch.setattr(DenseModel, "predict_views", spy)
    monkeypatch.chdir(tmp_path)
    command = ["dinat", "predict", "a.png", "--model", "local-dir:run", "--output", "found", "--multi-scale"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stop:
        dinat.commands.main()
    assert not stop.value.code, capsys.readouterr().err
    assert sizes == [(3, side, 2 * side) for side in (16, 24, 32, 40, 48, 56)]
    assert Image.open(tmp_path / "found" / "a_labels.png").size == (40, 20)


def test_ids_of_the_data_come_back_in_the_results(scenes, tmp_path, monkeypatch):
    """COCO's numbers of the classes have gaps and are in no order."""
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        names = [f"{index}.png" for index in range(4)]
        for name in names:
            Image.new("RGB", (32, 32), "gray").save(tmp_path / split / name)
        content = {
            "images": [{"id": i, "file_name": name, "height": 32, "width": 32} for i, name in enumerate(names)],
            "annotations": [
                {"id": i, "image_id": i, "category_id": (90, 7)[i % 2], "bbox": [4, 4, 20, 20], "area": 400,
                 "iscrowd": 0, "segmentation": [[4, 4, 24, 4, 24, 24, 4, 24]]} for i in range(4)
            ],
            "categories": [{"id": 90, "name": "bee"}, {"id": 7, "name": "ant"}],
        }  # fmt: skip
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(content))
    cfg = scenes("detection", "data=coco", f"data.root={tmp_path}", "++data.kwargs=null", "scheduler.epochs=1")
    train(cfg, tmp_path / "run")
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    names = dict(zip(described["category_ids"], described["label_names"], strict=True))
    assert names == {90: "bee", 7: "ant"}
    monkeypatch.chdir(tmp_path)
    for label, number in enumerate(described["category_ids"]):  # the model is made to find one class alone
        state = load_file("run/model.safetensors")
        state["box_predictors.0.cls_score.weight"].zero_()
        state["box_predictors.0.cls_score.bias"].fill_(-9)[label] = 9
        save_file(state, "run/model.safetensors")
        monkeypatch.setattr("sys.argv", f"dinat predict train --model local-dir:run --output found/{label}".split())
        with pytest.raises(SystemExit) as stop:
            dinat.commands.main()
        assert not stop.value.code
        records = json.loads(Path(f"found/{label}/detections.json").read_text())
        assert {record["category_id"] for record in records} == {number}


@pytest.mark.parametrize("task", TASKS)
def test_killed_and_resumed_is_bit_identical(scenes, tmp_path, monkeypatch, task):
    """The kill is in the second epoch, an update after a checkpoint."""
    cfg = scenes(task, "checkpoint.every_steps=1", "augment=dense", "eval_every=3")
    cfg.scheduler.epochs = 2
    train(cfg, tmp_path / "whole")
    update = Trainer.update

    def update_or_die(self, batches):
        update(self, batches)
        if self.step == 5:
            raise RuntimeError("killed")

    monkeypatch.setattr(Trainer, "update", update_or_die)
    with pytest.raises(RuntimeError, match="killed"):
        train(cfg, tmp_path / "killed")
    assert read_checkpoint(tmp_path / "killed" / "last.pt")["step"] == 4
    monkeypatch.undo()
    cfg.resume = "auto"
    train(cfg, tmp_path / "killed")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = {read_checkpoint(tmp_path / name / "last.pt")["history"][-1]["train_loss"] for name in ("whole", "killed")}
    assert len(losses) == 1


@pytest.fixture
def drawn_alike(monkeypatch):
    """What heads draw does not depend on how many images there are at a time, and there is no batch norm."""
    rand, randperm = torch.rand, torch.randperm

    def first_of_all(count, *shape, **other):
        if not isinstance(count, int):  # a single number: whether a layer is dropped
            return rand(count, *shape, **other)
        return rand(1, *shape, generator=torch.Generator().manual_seed(7)).expand(count, *shape).clone()

    def in_order(count, generator=None, **other):
        return torch.arange(count, **other) if generator is None else randperm(count, generator=generator, **other)

    monkeypatch.setattr(torch, "rand", first_of_all)
    monkeypatch.setattr(torch, "randperm", in_order)
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", lambda self, x: x * self.weight[:, None, None])


# Heads divide by the number of what they compare, of the images that they are given: here each image has as many.
EQUAL = {
    "detection": "++model.kwargs.masks=false ++model.kwargs.rpn_samples=8 ++model.kwargs.roi_samples=4",
    "semantic": "++model.kwargs.dropout=0.0",
    "panoptic": "data.kwargs.digits=[1,1]",
}


@pytest.mark.parametrize("task", TASKS)
def test_two_batches_of_4_are_one_of_8(scenes, tmp_path, drawn_alike, task):
    """`runtime.grad_accum`: one step of SGD, so that weights tell gradients."""
    weights = {}
    for parts in (1, 2):
        cfg = scenes(
            task, "batch_size=8", f"runtime.grad_accum={parts}", "scheduler.epochs=1", "optimizer=sgd",
            "optimizer.lr=0.01", "optimizer.clip_grad=null", "eval_every=9", *EQUAL[task].split(),
        )  # fmt: skip
        train(cfg, tmp_path / str(parts))
        weights[parts] = load_file(tmp_path / str(parts) / "model.safetensors")
    before = dinat.dense.create_model(f"local-dir:{tmp_path}/1").state_dict()
    moved = [name for name, tensor in weights[1].items() if not torch.equal(tensor, before[name])]
    assert len(moved) > len(before) / 2
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[2][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_backbone_data_and_size_are_those_of_the_configuration(scenes, tmp_path, monkeypatch):
    """`model.backbone`, `data.kwargs` and `data.eval_transform`."""
    sizes, predict = set(), DenseModel.predict

    def spy(self, images, *args):
        sizes.update(tuple(image.shape) for image in images)
        return predict(self, images, *args)

    monkeypatch.setattr(DenseModel, "predict", spy)
    cfg = scenes(
        "semantic", "model.backbone=test_convnext", "model.kwargs.backbone_kwargs=null", "data.kwargs.scenes=8",
        "data.eval_transform=[{resize: {shortest: 48}}]", "scheduler.epochs=1", "eval_every=1",
    )  # fmt: skip
    train(cfg, tmp_path)
    assert sizes == {(3, 48, 48)}
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 8 // 4
    backbone = dinat.dense.create_model(f"local-dir:{tmp_path}").backbone
    plain = timm.create_model("test_convnext", features_only=True)
    assert sum(p.numel() for p in backbone.parameters()) == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("wanted", [False, True])
def test_batch_norm_of_all_processes(scenes, tmp_path, wanted):
    trainer = Trainer(scenes("semantic", f"runtime.sync_batchnorm={wanted}"), tmp_path, ALONE)
    norms = [module for module in trainer.model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(module, torch.nn.SyncBatchNorm) is wanted for module in norms)


def test_backbone_of_another_task(run, scenes, tmp_path, caplog):
    """`model.reset_head=true` takes the backbone from a run of any task; without it, the run is refused."""
    task, folder, _ = run
    other = "semantic" if task == "panoptic" else "panoptic"
    caplog.set_level("INFO", "dinat")
    cfg = scenes(other, f"model.checkpoint={folder}", "scheduler.epochs=1", "optimizer.lr=0.0", "eval_every=1")
    with pytest.raises(UserError, match=r"model\.checkpoint=.* is of another model .*model\.reset_head=true takes"):
        train(cfg, tmp_path / "refused")
    cfg.model.reset_head = True
    cfg.scheduler.min_lr = 0.0
    cfg.optimizer.weight_decay = 0.0
    train(cfg, tmp_path / "taken")
    source = dinat.dense.create_model(f"local-dir:{folder}", pretrained=True).backbone.state_dict()
    taken = dinat.dense.create_model(f"local-dir:{tmp_path}/taken", pretrained=True).backbone.state_dict()
    short = lambda state: {name.split("model.model.")[-1]: tensor for name, tensor in state.items()}  # noqa: E731
    assert short(source).keys() == short(taken).keys()
    assert all(torch.equal(tensor, short(taken)[name]) for name, tensor in short(source).items())
    assert "tensors of the backbone; the head starts anew" in caplog.text


@pytest.mark.parametrize(
    ("task", "override", "message"),
    [
        ("semantic", "data=coco", r"data\.name=coco: not for task=semantic, which reads digit_scenes, masks"),
        ("semantic", "model.backbone=dinat_pica", r"backbone=dinat_pica: no such model\. Did you mean dinat_pico"),
        ("detection", "model.name=mask_rnn", r"mask_rnn: no such model\. Did you mean mask_rcnn"),
        ("detection", "model={name: upernet, kwargs: null}", r"task=detection: upernet is for semantic"),
        ("detection", "++data.kwargs.digit=3", r"data\.kwargs=.*digit"),
        ("panoptic", "++augment.transform=[{flop: {}}]", r"augmentation: no step flop\..*Did you mean flip"),
        ("semantic", "++augment.transform=3", r"augment\.transform=3: must be a list of steps"),
        ("semantic", "data.exif_transpose=true", r"data\.exif_transpose=true: not for dense prediction"),
        ("semantic", "model.num_classes=3", r"class counts differ: the data set 11, model\.num_classes 3"),
    ],
)
def test_wrong_setting(scenes, tmp_path, task, override, message):
    with pytest.raises(UserError, match=message):
        train(scenes(task, override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_exported_for_one_size(run, tmp_path, monkeypatch, capsys):
    """`dinat export local-dir:RUN`: of ONNX files, and of what cannot become one."""
    task, folder, _ = run
    monkeypatch.chdir(tmp_path)
    sizes = ("--img-size", "64", "64")

    def exported(*arguments):
        monkeypatch.setattr("sys.argv", ["dinat", "export", f"local-dir:{folder}", *arguments])
        with pytest.raises(SystemExit) as stop:
            dinat.commands.main()
        return (stop.value.code or 0, *capsys.readouterr())

    for wrong in ((), ("--img-size", "64", "65")):
        status, _, err = exported(*wrong)
        assert status == 2
        assert "takes any size and is exported for one. Give HEIGHT WIDTH, multiples of 32." in err
    if task == "detection":
        status, _, err = exported(*sizes)
        assert (status, err) == (
            2, "error: MaskRCNN cannot be exported: how many proposals and detections there are depends on the image.\n"
        )  # fmt: skip
        return
    pytest.importorskip("onnxscript", reason="the package onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    status, out, err = exported(*sizes, "--output", "model.onnx")
    assert status == 0, err
    assert out.startswith("model.onnx: ")


def test_boxes_alone_need_a_model_without_masks(scenes, tmp_path):
    """Two images of one box each: refused before anything starts; without mask heads, trained and scored."""
    for split in ("train", "validation"):
        images = [{"id": index, "file_name": f"{index}.png", "height": 32, "width": 32} for index in range(2)]
        boxes = [{"id": index, "image_id": index, "category_id": 1, "bbox": [4, 4, 20, 16]} for index in range(2)]
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "ant"}]}
        (tmp_path / split).mkdir()
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(content))
        for image in images:
            Image.new("RGB", (32, 32), (90, 120, 60)).save(tmp_path / split / image["file_name"])
    settings = ("data=coco", "data.kwargs=null", f"data.root={tmp_path}", "batch_size=2", "scheduler.updates=1")
    with pytest.raises(
        UserError, match=r"masks=true: .*coco\.json has boxes only\. Set \+\+model\.kwargs\.masks=false"
    ):
        train(scenes("detection", *settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(scenes("detection", *settings, "++model.kwargs.masks=false"), tmp_path / "run")
    (row,) = csv.DictReader((tmp_path / "run" / "summary.csv").open())
    assert float(row["val_box_ap"]) >= 0
    assert row.get("val_mask_ap", "") == ""
    assert ", 1 updates (1 per epoch) of 2 images" in (tmp_path / "run" / "train.log").read_text()
