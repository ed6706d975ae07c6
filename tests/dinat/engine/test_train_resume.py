"""A run that is killed or stopped, and continued, ends where it would have ended."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from dinat.engine import Interrupted, train
from dinat.engine.checkpoint import read_checkpoint
from dinat.engine.training import Trainer

# everything that draws random numbers, and everything that has a state
EVENTFUL = (
    "augment=imagenet",
    "augment.mixup.prob=0.7",
    "model.drop_path_rate=0.3",
    "ema.decay=0.9",
    "scheduler.epochs=3",
    "checkpoint.every_steps=2",
)
DRIVER = """
import os, signal, sys
from omegaconf import OmegaConf
from dinat.engine import train
from dinat.engine.training import Trainer

update = Trainer.update
def update_or_die(self, batches):
    if self.step == 8:  # in the middle of the second epoch of five updates, one update after a checkpoint
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
    update(self, batches)
Trainer.update = update_or_die
train(OmegaConf.load(sys.argv[1]), sys.argv[2])
"""


def same_state(left, right):
    assert left.keys() == right.keys()
    for key in left:
        if isinstance(left[key], dict):
            same_state(left[key], right[key])
        elif isinstance(left[key], list) and isinstance(left[key][0], dict):
            for pair in zip(left[key], right[key], strict=True):
                same_state(*pair)
        elif isinstance(left[key], torch.Tensor):
            assert torch.equal(left[key], right[key]), key
        elif isinstance(left[key], tuple | list):  # torch turns tuples of the optimizer's settings into lists
            assert list(left[key]) == list(right[key]), key
        else:
            assert left[key] == right[key], key


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_is_bit_identical(tiny, tmp_path, python, workers):
    cfg = tiny(*EVENTFUL, f"runtime.workers={workers}")
    train(cfg, tmp_path / "whole")

    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    died = python("-c", DRIVER, tmp_path / "config.yaml", tmp_path / "killed", "SIGKILL")
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert read_checkpoint(tmp_path / "killed" / "last.pt")["step"] == 8
    assert not (tmp_path / "killed" / "model.safetensors").exists()

    cfg.resume = "auto"
    cfg.runtime.workers = 2 - workers  # the number of workers has no part in it
    train(cfg, tmp_path / "killed")
    whole, resumed = (read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "killed"))
    for row in whole["history"] + resumed["history"]:
        del row["seconds"]
    for key in ("state_dict", "state_dict_ema", "optimizer"):
        same_state(whole[key], resumed[key])
    assert whole["history"] == resumed["history"]
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    same_state(left, right)


def test_killed_while_it_evaluates(tiny, tmp_path, monkeypatch):
    """The epoch's updates are saved by then; only the evaluation is done again."""
    cfg = tiny()
    train(cfg, tmp_path / "whole")
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        train(cfg, tmp_path / "killed")
    monkeypatch.undo()
    cfg.resume = "auto"
    train(cfg, tmp_path / "killed")
    whole, resumed = (read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "killed"))
    same_state(whole["state_dict"], resumed["state_dict"])
    for left, right in zip(whole["history"], resumed["history"], strict=True):
        assert {**left, "seconds": 0} == {**right, "seconds": 0}


def test_sigterm_saves_and_says_so(tiny, tmp_path, monkeypatch):
    update = Trainer.update

    def update_then_stop(self, batches):
        update(self, batches)
        if self.step == 3:
            signal.raise_signal(signal.SIGTERM)

    cfg = tiny()
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Trainer, "update", update_then_stop)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM after 3 updates; saved .*last\.pt"):
        train(cfg, tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 3
    monkeypatch.undo()
    cfg.resume = "auto"
    train(cfg, tmp_path)
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 10


def test_sigterm_of_the_whole_group_on_the_command_line(root, command_line, tmp_path):
    """A scheduler signals every process of a job, loader workers too: they must not die before the state is saved."""
    options = (f"dir={tmp_path}/run", "runtime.workers=2", "scheduler.epochs=100000")
    process = subprocess.Popen(
        [sys.executable, "train.py", *command_line, *options],
        cwd=root, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for line in process.stderr:
        if "epoch 1/" in line:
            os.killpg(process.pid, signal.SIGTERM)
            break
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, rest
    assert "stopped by SIGTERM" in rest
    assert f"dir={tmp_path}/run resume=auto" in rest
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] > 0


def test_resume_auto_without_a_run_starts_one(tiny, tmp_path):
    train(tiny("resume=auto", "scheduler.epochs=1", "scheduler.warmup_epochs=0"), tmp_path)
    assert read_checkpoint(tmp_path / "last.pt")["epoch"] == 1


def test_a_longer_run_is_told_to_differ(trained, tiny, tmp_path, caplog):
    run, _ = trained
    caplog.set_level("WARNING", "dinat")
    train(tiny("ema.decay=0.5", f"resume={run}", "scheduler.epochs=3"), tmp_path)
    assert "resume: scheduler.epochs was 2 and is now 3" in caplog.text
    assert read_checkpoint(tmp_path / "last.pt")["epoch"] == 3
