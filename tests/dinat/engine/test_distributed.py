"""Two processes: training that agrees with one process, evaluation that is exact, sharding that works."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import dinat.data.scenes
from dinat.distributed import join
from dinat.engine import evaluate, train

JOB = Path(__file__).with_name("distributed_job.py")
# Nothing here draws random numbers by process, so that the number of processes must not matter.
PLAIN = ("augment=light", "model.drop_path_rate=0", "scheduler.epochs=2")
STILL = (*PLAIN, "optimizer.lr=0", "scheduler.warmup_lr=0", "scheduler.min_lr=0", "augment=none", "eval_every=9")
MIXED = ("augment=imagenet", "model.drop_path_rate=0.2", "ema.decay=0.8", "runtime.workers=1")


DENSE = ("detection", "semantic", "panoptic")
# of four images: two queries, and two texts, of three numbers each
CONTRAST = {
    "queries": [[[1.0, 2, 0], [0, 1, 1]], [[3, 0, 1], [1, 1, 1]], [[0, 0, 2], [1, 2, 0]], [[1, 0, 0], [0, 3, 1]]],
    "texts": [[[1.0, 1, 0], [0, 2, 1]], [[1, 0, 2], [3, 0, 0]], [[0, 1, 1], [2, 1, 0]], [[0, 4, 1], [1, 0, 0]]],
}


def weights(run):
    return load_file(run / "model.safetensors")


@pytest.fixture(scope="module")
def two(tiny, trained, scenes, evaluation, python, tmp_path_factory, digits_folder):
    """Runs all jobs on two processes; returns their results by job, one per process, and the folder of the runs."""
    output = tmp_path_factory.mktemp("two")
    configurations = {
        "ddp": ("train", tiny(*PLAIN)),
        "accumulated": ("train", tiny(*PLAIN, "runtime.grad_accum=2")),
        "fsdp": ("train", tiny(*PLAIN, "runtime.parallel=fsdp")),
        "mixed": ("train", tiny(*MIXED)),
        "sharded_mixed": ("train", tiny(*MIXED, "runtime.parallel=fsdp", "runtime.dtype=bfloat16")),
        "still": ("train", tiny(*STILL)),
        "stop": ("stop", tiny("checkpoint.every_steps=1")),
        "facts": ("facts", tiny("seed=7", "runtime.grad_accum=2")),
        "contrast": ("contrast", OmegaConf.create(CONTRAST)),
        "eval": ("eval", evaluation(f"checkpoint={trained[0]}", f"output={output}", "per_class=true")),
    }
    for task in DENSE:
        configurations[task] = ("train", scenes(task, "augment=dense", "batch_size=8", "runtime.grad_accum=2"))
        figures = (f"checkpoint={output}/{task}", f"output={output}/of_{task}", "per_class=true")
        configurations[f"eval_{task}"] = ("eval", evaluation(*figures))
    jobs = {
        name: {"kind": kind, "cfg": OmegaConf.to_container(cfg, resolve=True)}
        for name, (kind, cfg) in configurations.items()
    }
    (output / "jobs.json").write_text(json.dumps(jobs))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = python(*launch, JOB, output / "jobs.json", output)
    assert done.returncode == 0, done.stderr[-5000:]
    results = {name: [json.loads((output / f"{name}.{rank}.json").read_text()) for rank in (0, 1)] for name in jobs}
    return results, output


@pytest.mark.parametrize("job", ["ddp", "mixed", "fsdp", "sharded_mixed", *DENSE])
def test_processes_end_with_equal_weights(two, job):
    first, second = two[0][job]
    assert first == second


def test_only_one_run_folder(two):
    assert not list(two[1].glob("*-of-rank-1"))


@pytest.mark.parametrize("job", ["ddp", "accumulated", "fsdp"])
def test_the_number_of_processes_does_not_matter(two, tiny, tmp_path, job):
    """Same images in each update, same mean of gradients: equal to one process but for the order of additions."""
    results, output = two
    top1 = train(tiny(*PLAIN), tmp_path)
    alone, together = weights(tmp_path), weights(output / job)
    assert alone.keys() == together.keys()
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=2e-3, atol=5e-5)
    assert results[job][0]["score"] == pytest.approx(top1, abs=100 / 37 + 1e-6)  # one image on the fence at most


def test_parameters_are_sharded_under_fsdp(two):
    """`runtime.parallel`: each process has half of a parameter, or all of it."""
    assert [two[0][job][0]["sharded"] > 0 for job in ("ddp", "fsdp")] == [False, True]


def test_texts_are_told_from_those_of_all_processes(two):
    """OneFormer's contrast: each process has two of four images, and the mean is that of all four."""
    queries, texts = (torch.tensor(CONTRAST[name]).double().requires_grad_() for name in ("queries", "texts"))
    scale = torch.tensor(1 / 0.5).double().log().requires_grad_()
    cosines = torch.nn.functional.cosine_similarity(queries.flatten(1)[:, None], texts.flatten(1), dim=2)
    right = (scale.exp() * cosines).softmax(1).diagonal(), (scale.exp() * cosines).softmax(0).diagonal()
    loss = -sum(probability.log().mean() for probability in right)
    loss.backward()
    found = two[0]["contrast"]
    assert sum(one["loss"] for one in found) / 2 == pytest.approx(loss.item())
    assert sum(one["scale"] for one in found) / 2 == pytest.approx(scale.grad.item(), rel=1e-4)
    for rank, one in enumerate(found):  # of a sum of two processes; DistributedDataParallel takes the mean
        for name, whole in (("queries", queries), ("texts", texts)):
            mine = torch.tensor(one[name]) / 2
            torch.testing.assert_close(mine, whole.grad[rank::2].float(), rtol=1e-4, atol=1e-6)


def test_device(monkeypatch):
    """`runtime.device`: the accelerator if there is one, or what is named."""
    for accelerator in (None, torch.device("mps")):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda here=accelerator: here is not None)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda here=accelerator: here)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
        found = []
        for device in ("auto", "cpu"):
            with join(device) as world:
                found.append(world.device.type)
        assert found == ["mps" if accelerator else "cpu", "cpu"]


def test_figures_are_of_all_processes(two, tiny, tmp_path):
    """Weights that do not move have the loss and the top-1 of all training images, whoever saw which."""
    train(tiny(*STILL, "batch_size=120"), tmp_path)
    alone, together = (list(csv.DictReader((run / "summary.csv").open())) for run in (tmp_path, two[1] / "still"))
    for row, other in zip(alone, together, strict=True):
        assert float(other["train_loss"]) == pytest.approx(float(row["train_loss"]), rel=1e-5)
        assert float(other["train_top1"]) == pytest.approx(float(row["train_top1"]), abs=1e-6)


def test_one_process_that_is_told_to_stop_stops_all(two):
    results, output = two
    for result in results["stop"]:
        assert result == {"stopped": f"stopped by SIGTERM after 2 updates; saved {output}/stop/last.pt", "steps": 2}
    assert torch.load(output / "stop" / "last.pt", mmap=True)["step"] == 2


def test_processes_draw_from_different_facts(two):
    """Each image is drawn for once per epoch, by one of the two; steps by (seed, process, update, part)."""
    first, second = ([tuple(facts) for facts in found] for found in two[0]["facts"])
    images = [(7, epoch, index) for epoch in (0, 1) for index in range(120)]
    assert Counter(facts for facts in first + second if len(facts) == 3) == Counter(images)
    for rank, found in enumerate((first, second)):
        steps = [(7, rank, step, part) for step in range(10) for part in (0, 1)]
        others = [facts for facts in found if len(facts) != 3]
        assert Counter(others) == Counter([(7,), (7, 0), (7, 1), *steps])


def test_sharded_training_exports_a_whole_model(two, evaluation, tmp_path):
    results, output = two
    result = evaluate(evaluation(f"checkpoint={output}/sharded_mixed", f"output={tmp_path}"))
    assert result["top1"] == pytest.approx(results["sharded_mixed"][0]["score"], abs=100 / 37 + 1e-6)
    assert result["count"] == 37


def test_evaluation_is_exact(two, trained, evaluation, tmp_path):
    """37 images on two processes: the same counts as on one."""
    results, output = two
    alone = evaluate(evaluation(f"checkpoint={trained[0]}", f"output={tmp_path}", "per_class=true"))
    for result in results["eval"]:
        assert result["count"] == 37
        assert (result["top1"], result["top5"]) == (alone["top1"], alone["top5"])
        assert result["loss"] == pytest.approx(alone["loss"], abs=2e-6)
    assert (output / "per_class.csv").read_text() == (tmp_path / "per_class.csv").read_text()


@pytest.mark.parametrize("task", DENSE)
def test_figures_of_dense_prediction_are_exact(two, evaluation, tmp_path, monkeypatch, task):
    """Seven scenes on two processes: the figures of one, which are not those of eight."""
    results, output = two
    monkeypatch.setattr(dinat.data.scenes, "VALIDATION_SCENES", 7)
    alone = evaluate(evaluation(f"checkpoint={output}/{task}", f"output={tmp_path}", "per_class=true"))
    figures = {name: value for name, value in alone.items() if isinstance(value, float)}
    assert len(figures) > 1
    for rank, result in enumerate(results[f"eval_{task}"]):
        assert (result["task"], result["count"], result["skipped"]) == (task, 7, 0)
        assert {name: result[name] for name in figures} == pytest.approx(figures, abs=2e-3, nan_ok=True)
        assert results[task][rank]["score"] == pytest.approx(next(iter(figures.values())), abs=2e-3)
    assert (output / f"of_{task}" / "per_class.csv").exists()


def test_a_run_of_two_processes_continues_on_one(two, tiny, tmp_path):
    """Checkpoints hold the whole state by name, whatever the parallelism."""
    _, output = two
    train(tiny(*PLAIN, f"resume={output}/fsdp", "scheduler.epochs=3"), tmp_path)
    assert (tmp_path / "model.safetensors").exists()
