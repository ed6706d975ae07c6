"""Runs of several epochs whose evaluations are known beforehand: what is recorded, kept, exported and drawn."""

import signal
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from dinat.engine import Interrupted
from dinat.engine.checkpoint import read_checkpoint

UPDATES = 5  # per epoch


@pytest.fixture
def scripted(observe, digits_folder, tmp_path):
    """Trains a model that scores 10, 30 and 20 % at the ends of three epochs: it finds classes with so many images."""
    for digit, images in ((0, 1), (1, 3), (2, 2), (3, 4)):
        for index in range(images):
            path = tmp_path / "data" / "validation" / str(digit) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    (tmp_path / "data" / "train").symlink_to(digits_folder / "train")
    script = [3] * UPDATES + [0] * UPDATES + [1] * UPDATES + [2]

    def scripted(*overrides, run="scripted"):
        return observe(
            f"data.root={tmp_path}/data", f"model.kwargs={{script: {script}}}", "batch_size=24", "scheduler.epochs=3",
            *overrides, run=run,
        )  # fmt: skip

    return scripted


@pytest.fixture
def saved(monkeypatch):
    """The update after which each file was written, by torch.save, in order."""
    steps, save = [], torch.save

    def spy(state, *args, **kwargs):
        steps.append(state["step"])
        save(state, *args, **kwargs)

    monkeypatch.setattr(torch, "save", spy)
    return steps


@pytest.mark.parametrize("export", ["best", "last"])
def test_stopped_in_the_middle_of_the_third_epoch(scripted, tmp_path, export):
    options = (f"checkpoint.export={export}", "ema.decay=0.5", "optimizer.lr=0.1", "checkpoint.every_epochs=2")
    steps = []

    def stop_after_12(*_):
        steps.append(1)
        if len(steps) == 12:
            signal.raise_signal(signal.SIGTERM)

    handle = register_optimizer_step_post_hook(stop_after_12)
    with pytest.raises(Interrupted):
        scripted(*options)
    handle.remove()
    assert read_checkpoint(tmp_path / "scripted" / "last.pt")["step"] == 12
    resumed = scripted(*options, "resume=auto")
    assert len(resumed.lr) == 3  # updates that were left

    assert [float(row["val_top1"]) for row in resumed.rows] == [10, 30, 20]
    best = read_checkpoint(resumed.run / "best.pt")
    assert (best["epoch"], best["step"], best["best"], len(best["history"])) == (2, 10, 30, 2)
    assert (resumed.last["best"], resumed.last["epoch"], resumed.last["step"]) == (30, 3, 15)
    assert [path.name for path in resumed.run.glob("epoch_*.pt")] == ["epoch_0002.pt"]
    assert read_checkpoint(resumed.run / "epoch_0002.pt")["step"] == 10

    source = best if export == "best" else resumed.last
    exported = load_file(resumed.run / "model.safetensors")
    assert resumed.top1 == (30 if export == "best" else 20)
    assert torch.equal(exported["head.weight"], source["state_dict_ema"]["head.weight"])
    assert not torch.equal(exported["head.weight"], source["state_dict"]["head.weight"])


def test_an_equal_epoch_is_not_better(scripted):
    """Of epochs with the same top-1 the first is kept: here all find the same class."""
    run = scripted(f"model.kwargs={{script: {[0] * 16}}}")
    assert read_checkpoint(run.run / "best.pt")["epoch"] == 1


def test_the_best_of_a_model_without_an_average(scripted):
    run = scripted("checkpoint.export=best", "optimizer.lr=0.1")
    weights = load_file(run.run / "model.safetensors")["head.weight"]
    assert torch.equal(weights, run.after[9]["head.weight"])


def test_evaluated_every_second_epoch_and_at_the_end(scripted):
    run = scripted("eval_every=2")
    assert [row["val_top1"] for row in run.rows] == ["", "30.0", "20.0"]
    assert sum(not training for training, *_ in run.forward) == 2


@pytest.mark.parametrize(("every", "expected"), [("null", {5, 10}), ("2", {2, 4, 5, 6, 8, 10})])
def test_saved_every_second_update(observe, saved, every, expected):
    observe(f"checkpoint.every_steps={every}", "batch_size=24", "scheduler.epochs=2")
    assert set(saved) == expected


def test_loss_scale_continues(observe):
    """Of a run in float16: the count of updates without an overflow goes on where it was."""
    options = ("runtime.dtype=float16", "batch_size=24", "optimizer.lr=0")
    observe(*options, run="scaled")
    longer = observe(*options, "resume=auto", "scheduler.epochs=2", run="scaled")
    assert longer.last["scaler"]["_growth_tracker"] == 10


def test_momentum_continues(observe):
    """The first step of a resumed run has the momentum of those before, and the learning rate that is asked for now."""

    def options(lr):
        return "batch_size=60", f"optimizer.lr={lr}", f"scheduler.min_lr={lr}"

    first = observe(*options(0.1), run="run")
    second = observe(*options(0.05), "resume=auto", "scheduler.epochs=2", run="run")
    gradients = [update["head.weight"] for update in first.gradients + second.gradients]
    momentum = sum(0.9 ** (2 - index) * gradient for index, gradient in enumerate(gradients[:3]))
    torch.testing.assert_close(second.step()["head.weight"], 0.05 * momentum, rtol=1e-4, atol=1e-6)
    assert torch.equal(second.before[0]["head.weight"], first.after[-1]["head.weight"])


def test_facts_that_random_draws_are_derived_from(observe, monkeypatch):
    """Two epochs with two parts per update: nothing is drawn twice from the same facts, nothing without an epoch."""
    derived, sequence = [], np.random.SeedSequence

    def spy(facts):
        derived.append(tuple(facts[1:]))  # the first is their number
        return sequence(facts)

    monkeypatch.setattr(np.random, "SeedSequence", spy)
    observe("seed=7", "batch_size=24", "runtime.grad_accum=2", "scheduler.epochs=2")
    initial, orders = [(7,)], [(7, epoch) for epoch in (0, 1)]
    images = [(7, epoch, index) for epoch in (0, 1) for index in range(120)]
    steps = [(7, 0, step, part) for step in range(10) for part in (0, 1)]
    assert Counter(derived) == Counter(initial + orders + images + steps)


def test_parts_of_an_update_draw_different_numbers(observe):
    """Of the same 20 images at the same weights, dropout makes different inputs of the head in each part and update."""
    inputs = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: (
            inputs.append((args[0] == 0).flatten()) if isinstance(module, torch.nn.Linear) and module.training else None
        )
    )
    options = ("optimizer.lr=0", "runtime.grad_accum=2", "eval_batch_size=64")
    observe("model.drop_path_rate=0.5", "batch_size=60", *options)
    handle.remove()
    training = inputs[:4]
    assert all(0.4 < dropped.double().mean() < 0.9 for dropped in training)  # black pixels are 0 only if dropped
    assert not any(torch.equal(a, b) for index, a in enumerate(training) for b in training[:index])
