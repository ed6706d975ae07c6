"""Files of unknown origin run no code, whoever reads them; what is written is found and fits."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from dinat.checkpoints.reading import read_checkpoint as read_tensors
from dinat.engine import checkpoint, evaluate, train
from dinat.errors import CheckpointError, UserError
from dinat.tasks import models


class Touch:
    """Unpickled without care, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


READERS = {
    "resume": lambda path, **of: train(of["tiny"](f"resume={path}"), of["run"]),
    "model.checkpoint": lambda path, **of: train(of["tiny"](f"model.checkpoint={path}"), of["run"]),
    "evaluate": lambda path, **of: evaluate(
        of["evaluation"](f"checkpoint={path}", "model.name=stand_in", "data=digits")
    ),
    "read_checkpoint": lambda path, **of: checkpoint.read_checkpoint(path),
    "load_weights": lambda path, **of: models.load_weights(timm.create_model("stand_in"), path),
    "read_tensors": lambda path, **of: read_tensors(path),
}


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("reader", READERS)
def test_code_in_a_checkpoint_is_not_run(tiny, evaluation, tmp_path, reader, suffix):
    path, touched = tmp_path / f"weights{suffix}", tmp_path / "touched"
    state = {"state_dict": {"a": torch.zeros(1)}, "optimizer": Touch(touched), "step": 0, "config": {}}
    torch.save(state, path)
    torch.load(path, weights_only=False)
    assert touched.exists()
    touched.unlink()
    with pytest.raises((UserError, CheckpointError)):
        READERS[reader](path, tiny=tiny, evaluation=evaluation, run=tmp_path / "run")
    assert not touched.exists()


@pytest.mark.parametrize("missing", ["state_dict", "optimizer", "step", "config"])
def test_a_checkpoint_is_whole(tmp_path, missing):
    state = dict.fromkeys(("state_dict", "optimizer", "step", "config"), 0)
    torch.save(state, tmp_path / "whole.pt")
    assert checkpoint.read_checkpoint(tmp_path / "whole.pt") == state
    del state[missing]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(UserError, match=r"resume=.*part\.pt: not a training checkpoint of dinat"):
        checkpoint.read_checkpoint(tmp_path / "part.pt")


def test_what_resume_means(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.mkdir()
    assert checkpoint.find_resume(None, run) is None
    assert checkpoint.find_resume("auto", run) is None
    (other / "last.pt").touch()
    (other / "best.pt").touch()
    assert checkpoint.find_resume(str(other), run) == other / "last.pt"
    assert checkpoint.find_resume(str(other / "best.pt"), run) == other / "best.pt"
    (run / "last.pt").touch()
    assert checkpoint.find_resume("auto", run) == run / "last.pt"
    with pytest.raises(UserError, match="holds a run already"):
        checkpoint.find_resume(None, run)


def test_export_describes_the_model(observe):
    """Arguments, preprocessing and class names are in the exported folder, under timm's names."""
    run = observe(
        "data.mean=[0.1,0.2,0.3]", "data.std=[0.4,0.5,0.6]", "data.crop_pct=0.5", "model.kwargs={script: null}"
    )
    described = json.loads((run.run / "config.json").read_text())
    assert described["architecture"] == "stand_in"
    assert described["num_classes"] == 10
    assert described["label_names"] == [str(digit) for digit in range(10)]
    # older timms keep the number of classes beside them
    assert {"num_classes": 10} | described["model_args"] == {"num_classes": 10, "script": None}
    preprocessing = described["pretrained_cfg"]
    found = {key: preprocessing[key] for key in ("input_size", "mean", "std", "crop_pct")}
    assert found == {
        "input_size": [3, 8, 8], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.5,
    }  # fmt: skip
    weights = load_file(run.run / "model.safetensors")
    assert torch.equal(weights["head.weight"], run.after[-1]["head.weight"])
    assert (run.run / "model.safetensors").stat().st_mode & 0o044  # others may read it as they may its folder


def test_start_from_a_checkpoint(observe):
    """`model.checkpoint` takes the averaged weights of a run, all of them, or all but the head's."""
    first = observe("ema.decay=0.5", "batch_size=60", "optimizer.lr=0.1", run="first")
    average = first.last["state_dict_ema"]
    second = observe(f"model.checkpoint={first.run}/last.pt", "optimizer.lr=0")
    assert torch.equal(second.before[0]["head.weight"], average["head.weight"])
    assert not torch.equal(average["head.weight"], first.last["state_dict"]["head.weight"])
    fresh = observe(f"model.checkpoint={first.run}", "model.reset_head=true", "optimizer.lr=0")
    assert torch.equal(fresh.before[0]["head.weight"], first.before[0]["head.weight"])  # what the seed gives
    model = timm.create_model("stand_in", num_classes=10)
    models.load_weights(model, first.run / "last.pt", use_ema=False)
    assert torch.equal(model.head.weight, first.last["state_dict"]["head.weight"])


def test_what_weights_mean(tmp_path):
    """Of a run folder, the exported model, or else the last state."""
    (tmp_path / "last.pt").touch()
    assert models.find_weights(tmp_path, "checkpoint") == tmp_path / "last.pt"
    (tmp_path / "model.safetensors").touch()
    assert models.find_weights(tmp_path, "checkpoint") == tmp_path / "model.safetensors"
    assert models.find_weights(tmp_path / "last.pt", "checkpoint") == tmp_path / "last.pt"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"checkpoint=.*empty: the folder holds neither"):
        models.find_weights(tmp_path / "empty", "checkpoint")
