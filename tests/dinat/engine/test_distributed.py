"""Two processes: training that agrees with one process, evaluation that is exact, sharding that works."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from dinat.engine import evaluate, train

JOB = Path(__file__).with_name("distributed_job.py")
# Nothing here draws random numbers by process, so that the number of processes must not matter.
PLAIN = ("augment=light", "model.drop_path_rate=0", "scheduler.epochs=2")
MIXED = ("augment=imagenet", "model.drop_path_rate=0.2", "ema.decay=0.8", "runtime.workers=1")


def weights(run):
    return load_file(run / "model.safetensors")


@pytest.fixture(scope="module")
def two(tiny, trained, evaluation, python, tmp_path_factory, digits_folder):
    """Runs all jobs on two processes; returns their results by job, one per process, and the folder of the runs."""
    output = tmp_path_factory.mktemp("two")
    configurations = {
        "ddp": ("train", tiny(*PLAIN)),
        "accumulated": ("train", tiny(*PLAIN, "runtime.grad_accum=2")),
        "fsdp": ("train", tiny(*PLAIN, "runtime.parallel=fsdp")),
        "mixed": ("train", tiny(*MIXED)),
        "sharded_mixed": ("train", tiny(*MIXED, "runtime.parallel=fsdp", "runtime.dtype=bfloat16")),
        "eval": ("eval", evaluation(f"checkpoint={trained[0]}", f"output={output}", "per_class=true")),
    }
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


@pytest.mark.parametrize("job", ["ddp", "mixed", "fsdp", "sharded_mixed"])
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
    assert results[job][0]["top1"] == pytest.approx(top1, abs=100 / 37 + 1e-6)  # one image on the fence at most


def test_sharded_training_exports_a_whole_model(two, evaluation, tmp_path):
    results, output = two
    result = evaluate(evaluation(f"checkpoint={output}/sharded_mixed", f"output={tmp_path}"))
    assert result["top1"] == pytest.approx(results["sharded_mixed"][0]["top1"], abs=100 / 37 + 1e-6)
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


def test_a_run_of_two_processes_continues_on_one(two, tiny, tmp_path):
    """Checkpoints hold the whole state by name, whatever the parallelism."""
    _, output = two
    train(tiny(*PLAIN, f"resume={output}/fsdp", "scheduler.epochs=3"), tmp_path)
    assert (tmp_path / "model.safetensors").exists()
