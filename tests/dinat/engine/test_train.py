"""Training from start to finish, and what it leaves behind."""

import csv
import json
import re

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from omegaconf import OmegaConf
from safetensors.torch import load_file

from dinat.engine import train
from dinat.engine.checkpoint import read_checkpoint
from dinat.engine.training import Trainer
from dinat.errors import UserError


def weights(run):
    return load_file(run / "model.safetensors")


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_run_folder(trained):
    run, top1 = trained
    names = {path.name for path in run.iterdir()}
    assert names == {
        "README.md", "best.pt", "config.json", "config.yaml", "curves.png", "environment.json", "epoch_0001.pt",
        "epoch_0002.pt", "last.pt", "model.safetensors", "summary.csv", "train.log",
    }  # fmt: skip
    rows = list(csv.DictReader((run / "summary.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["val_top1"]) == top1
    assert OmegaConf.load(run / "config.yaml").model.name == "dinat_pico"
    assert {"argv", "git", "torch", "timm", "device"} <= json.loads((run / "environment.json").read_text()).keys()
    assert (run / "curves.png").stat().st_size > 10_000
    assert "epoch 2/2" in (run / "train.log").read_text()


def test_model_card(trained, digits_folder):
    """As the hub reads it; its code makes the model."""
    run, top1 = trained
    card = ModelCard.load(run / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert figures["top-1"] == round(top1, 4)
    assert {(result.dataset_name, result.dataset_split) for result in card.data.eval_results} == {
        (f"folder: {digits_folder.name}", "validation")
    }
    assert "| epochs | 2 |" in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    made = {}
    exec(code.replace("hf-hub:OWNER/NAME", f"local-dir:{run}"), made)
    assert equal(made["model"].state_dict(), timm.create_model(f"local-dir:{run}", pretrained=True).state_dict())


def test_export_is_a_timm_model(trained):
    run, _ = trained
    model = timm.create_model(f"local-dir:{run}", pretrained=True)
    assert equal(model.state_dict(), read_checkpoint(run / "last.pt")["state_dict_ema"])  # the average, as it was on
    assert not equal(model.state_dict(), read_checkpoint(run / "last.pt")["state_dict"])
    assert model.num_classes == 10
    assert tuple(timm.data.resolve_data_config(model=model)["input_size"]) == (3, 16, 16)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


def test_checkpoint_is_readable_by_timm(trained):
    run, _ = trained
    state = timm.models.load_state_dict(str(run / "last.pt"), use_ema=False)
    assert equal(state, read_checkpoint(run / "last.pt")["state_dict"])


def test_training_learns(compose, tmp_path):
    """A few updates on the real task; the full default job is measured outside of the test suite."""
    kwargs = "{img_size: 16, embed_dim: 16, depths: [1, 1, 1], num_heads: [1, 2, 2]}"
    top1 = train(
        compose(
            f"+model.kwargs={kwargs}", "data.img_size=16", "augment=none", "batch_size=32", "optimizer.lr=5e-3",
            "scheduler.epochs=2", "scheduler.warmup_epochs=0", "runtime.device=cpu",
        ),
        tmp_path,
    )  # fmt: skip
    assert top1 > 50


@pytest.mark.parametrize(
    "options",
    [
        ("runtime.dtype=bfloat16", "runtime.channels_last=true", "runtime.grad_checkpointing=true"),
        ("optimizer.layer_decay=0.7", "optimizer.clip_mode=agc", "optimizer.clip_grad=0.02"),
        ("optimizer=sgd", "scheduler=linear", "augment=imagenet", "checkpoint.export=best", "eval_every=2"),
        ("model.name=resnet10t", "model.kwargs=null", "logger=tensorboard", "ema.decay=0.9", "ema.warmup=true"),
    ],
    ids=["precision", "layer-decay", "sgd", "batch-norm"],
)
def test_options(tiny, tmp_path, options):
    """Each option trains and exports, in as few updates as possible."""
    cfg = tiny("scheduler.epochs=2", "scheduler.warmup_epochs=0", "batch_size=60", *options)
    assert 0 <= train(cfg, tmp_path) <= 100
    assert (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "tensorboard").exists() == ("logger=tensorboard" in options)


def test_compiled_model_keeps_its_names(observe, monkeypatch):
    """It is compiled in place, once; what a compiler makes of it is not for here, and takes minutes."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    names = [observe(f"runtime.compile={asked}").last["state_dict"].keys() for asked in ("true", "false")]
    assert compiled == ["StandIn"]
    assert names[0] == names[1]


def test_fine_tuning_takes_all_but_the_head(trained, compose, tmp_path):
    run, _ = trained
    kwargs = "{img_size: 16, embed_dim: 8, depths: [1, 1, 1], num_heads: [1, 1, 1]}"
    cfg = compose(
        f"+model.kwargs={kwargs}", "data=folder", f"data.root={two_classes(tmp_path)}", "data.img_size=16",
        f"model.checkpoint={run}", "model.reset_head=true", "batch_size=4", "runtime.device=cpu",
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    from dinat.distributed import join

    with join("cpu") as world:
        model = Trainer(cfg, tmp_path / "run", world).model
    source = weights(run)
    differing = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, source[name])}
    assert {name.split(".")[0] for name in differing} == {"head"}
    assert model.num_classes == 2


def two_classes(root):
    from PIL import Image

    for split in ("train", "validation"):
        for name, shade in (("dark", 40), ("light", 200)):
            folder = root / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (16, 16), (shade + index,) * 3).save(folder / f"{index}.png")
    return root / "data"


def test_weights_of_another_model(trained, compose, tmp_path, monkeypatch):
    """`model.pretrained=NAME.TAG` takes where weights lie from that model, and everything else from `model.name`."""
    from dataclasses import replace

    from timm.models import get_pretrained_cfg

    from dinat.tasks import models

    run, _ = trained
    source = replace(get_pretrained_cfg("dinat_pico"), file=str(run / "model.safetensors"), num_classes=10)
    monkeypatch.setattr(models, "get_pretrained_cfg", lambda name: source)
    kwargs = "{img_size: 16, embed_dim: 8, depths: [1, 1, 1], num_heads: [1, 1, 1]}"
    cfg = compose("model.pretrained=dinat_nano.untrained", f"+model.kwargs={kwargs}")
    model = models.build_model(cfg.model, num_classes=3)
    state, loaded = model.state_dict(), weights(run)
    assert state["head.fc.weight"].shape[0] == 3
    assert all(torch.equal(state[name], loaded[name]) for name in loaded if not name.startswith("head.fc"))


def test_trackers(tiny, tmp_path, monkeypatch):
    """What goes to Weights & Biases, with a stand-in for it."""
    import sys
    import types

    logged = []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: run))
    options = ("scheduler.epochs=2", "scheduler.warmup_epochs=0", "batch_size=60", "runtime.log_every=1")
    train(tiny("logger=wandb", *options), tmp_path)
    assert [step for step, values in logged if "train/loss" in values] == [1, 2, 3, 4]
    assert [step for step, values in logged if "val_top1" in values] == [2, 4]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"logger=wandb: .*pip install 'dinat\[loggers\]'"):
        train(tiny("logger=wandb"), tmp_path / "other")


def test_sweep_maximises_what_training_returns(python, command_line, tmp_path):
    """Two jobs of a Hydra multirun get folders of their own."""
    options = ("scheduler.epochs=1", "scheduler.warmup_epochs=0", "batch_size=120", f"hydra.sweep.dir={tmp_path}")
    done = python("train.py", "-m", *command_line, *options, "seed=1,2")
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / job / "model.safetensors").exists() for job in "01")
