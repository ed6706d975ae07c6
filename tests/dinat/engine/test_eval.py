"""The evaluation command repeats training's figure, and counts as it says."""

import csv
import json

import pytest
import timm
import torch
from PIL import Image

from dinat.engine import evaluate
from dinat.engine.checkpoint import read_checkpoint

COLUMNS = "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation,loss"


@pytest.mark.parametrize("name", ["", "last.pt", "model.safetensors", "epoch_0002.pt"])
def test_repeats_the_figure_of_training(trained, evaluation, tmp_path, name):
    run, top1 = trained
    result = evaluate(evaluation(f"checkpoint={run / name}", f"output={tmp_path}"))
    last = read_checkpoint(run / "last.pt")["history"][-1]
    assert result["top1"] == round(top1, 4)
    assert result["top5"] == round(last["val_top5"], 4)
    assert result["loss"] == round(last["val_loss"], 6)
    assert (result["count"], result["skipped"]) == (37, 0)


def test_model_folder_without_the_run(trained, evaluation, tmp_path, digits_folder):
    """What `timm` needs is enough: config.json and model.safetensors, moved elsewhere, and the data named."""
    run, top1 = trained
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    result = evaluate(evaluation(f"checkpoint={tmp_path}", "data=folder", f"data.root={digits_folder}"))
    assert result["top1"] == round(top1, 4)


def test_class_folders_directly_in_the_root(trained, evaluation, tmp_path, digits_folder):
    run, top1 = trained
    options = ("data.name=folder", f"data.root={digits_folder}/validation", "data.val_split=.", f"output={tmp_path}")
    assert evaluate(evaluation(f"checkpoint={run}", *options))["top1"] == round(top1, 4)


def test_weights_without_the_average(trained, evaluation, tmp_path):
    run, _ = trained
    averaged, plain = (
        evaluate(evaluation(f"checkpoint={run}/last.pt", f"use_ema={use}", f"output={tmp_path}"))["loss"]
        for use in ("true", "false")
    )
    assert averaged != plain


def test_bare_weights_of_a_named_model(trained, evaluation, tmp_path, digits_folder):
    run, top1 = trained
    torch.save(read_checkpoint(run / "last.pt")["state_dict_ema"], tmp_path / "weights.pth")
    cfg = evaluation(
        f"checkpoint={tmp_path}/weights.pth", "model.name=dinat_pico", "data=folder", f"data.root={digits_folder}",
        "+model.kwargs={img_size: 16, embed_dim: 8, depths: [1, 1, 1], num_heads: [1, 1, 1]}", "data.img_size=16",
    )  # fmt: skip
    assert evaluate(cfg)["top1"] == round(top1, 4)


def test_a_validation_folder_that_lacks_a_class(trained, evaluation, tmp_path, digits_folder):
    """Indices come from the training classes: with class 0 missing, the others must not move up."""
    run, _ = trained
    for path in (digits_folder / "validation").glob("[1-9]/*.png"):
        target = tmp_path / "validation" / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    cfg = evaluation(f"checkpoint={run}", f"data.root={tmp_path}", f"output={tmp_path}", "per_class=true")
    evaluate(cfg)
    whole = evaluation(f"checkpoint={run}", f"output={tmp_path}/whole", "per_class=true")
    evaluate(whole)
    partial, full = (list(csv.DictReader((tmp_path / p / "per_class.csv").open())) for p in (".", "whole"))
    assert partial[0]["count"] == "0"
    assert partial[1:] == full[1:]


def test_tables_and_picture(trained, evaluation, tmp_path):
    run, _ = trained
    cfg = evaluation(f"checkpoint={run}", f"output={tmp_path}", "per_class=true", "confusion=true")
    result = evaluate(cfg)
    header, row = (tmp_path / "results.csv").read_text().splitlines()
    assert header == COLUMNS
    assert row.startswith(f"dinat_pico,{result['top1']},")
    classes = list(csv.DictReader((tmp_path / "per_class.csv").open()))
    assert sum(int(row["count"]) for row in classes) == 37
    assert 100 * sum(int(row["correct"]) for row in classes) / 37 == pytest.approx(result["top1"], abs=1e-3)
    assert Image.open(tmp_path / "confusion.png").size[0] > 300


def test_preprocessing_can_be_overridden(trained, evaluation, tmp_path):
    run, _ = trained
    plain = evaluate(evaluation(f"checkpoint={run}", f"output={tmp_path}"))
    cropped = evaluate(evaluation(f"checkpoint={run}", f"output={tmp_path}", "data.crop_pct=0.5"))
    assert (plain["crop_pct"], cropped["crop_pct"]) == (
        timm.create_model(f"local-dir:{run}").pretrained_cfg["crop_pct"],
        0.5,
    )
    assert plain["loss"] != cropped["loss"]


def test_command_line_prints_one_line_of_json(trained, python, tmp_path):
    run, top1 = trained
    done = python("eval.py", f"checkpoint={run}", f"output={tmp_path}", "runtime.device=cpu")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["top1"] == round(top1, 4)
    assert done.stdout.count("\n") == 1
