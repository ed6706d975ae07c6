"""The benchmarks run, at tiny sizes on the CPU, and the pictures come from the rows; nothing here asserts a time."""

import csv
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
QUICK = ["--device", "cpu", "--seconds", 0, "--rounds", 2]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def run(script, *arguments):
    importlib.import_module(script).main([str(argument) for argument in arguments])


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def problem():
    return importlib.import_module("problems").Problem("small", 9, 2, 3, 2)


def test_operator(problem, tmp_path, monkeypatch):
    monkeypatch.setitem(importlib.import_module("operator_speed").GROUPS, "small", [problem])
    path = tmp_path / "operator.csv"
    run("operator_speed", *QUICK, "--models", "small", "--batch", 2, "--output", path)
    rows = read(path)
    kernels = {"torch+rpb", "torch", "dense_sdpa", "dense_sdpa+rpb", "dense_views+rpb", "gather+rpb"}
    assert {(row["pass"], row["kernel"]) for row in rows} >= {(p, k) for p in ("forward", "training") for k in kernels}
    run("operator_speed", *QUICK, "--models", "small", "--batch", 1, "--kernels", "torch", "--output", path)
    assert read(path)[: len(rows)] == rows  # files only grow


def test_peers_with_bias_compute_what_the_operator_does(problem):
    build = importlib.import_module("operator_speed").build
    kernels = ("torch", "gather", "dense_views", "dense_sdpa")
    ours, gather, views, dense = (build(kernel, True, problem, 2, "forward", "cpu")() for kernel in kernels)
    torch.testing.assert_close(gather, ours, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(views, ours, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dense.transpose(1, 2).reshape(ours.shape), ours, rtol=1e-4, atol=1e-5)


def test_models_and_scale(tmp_path):
    common = [*QUICK, "--models", "dinat_pico", "resnet10t"]
    run("model_speed", *common, "--sizes", 64, "--batch", 1, "--modes", "eager", "--output", tmp_path / "models.csv")
    run("model_speed", *common, "--scale", "--sizes", 64, 96, "--output", tmp_path / "scale.csv")
    models, scale = read(tmp_path / "models.csv"), read(tmp_path / "scale.csv")
    assert [row["model"] for row in models] == ["dinat_pico", "resnet10t"] * 2
    assert [row["pixels"] for row in scale] == ["64", "96"]
    assert all(float(row["memory_mb"]) > 0 for row in models + scale)


def test_peak_memory():
    peak = importlib.import_module("harness").peak_memory
    assert peak(lambda: [torch.empty(1 << 20, dtype=torch.uint8) for _ in range(3)] and None, "cpu") == 3 << 20


def test_data(tmp_path):
    run("data_speed", *QUICK[2:], "--images", 16, "--output", tmp_path / "data.csv")
    assert {(row["source"], row["split"]) for row in read(tmp_path / "data.csv")} == {
        (source, split) for source in ("folder", "webdataset") for split in ("train", "validation")
    }


def test_other_columns_are_refused(tmp_path):
    append = importlib.import_module("harness").append
    append(tmp_path / "a.csv", dict(a=1))
    with pytest.raises(SystemExit, match="other columns"):
        append(tmp_path / "a.csv", dict(b=1))


def test_compare(capsys):
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a git checkout")
    run("compare", "HEAD", *QUICK[:2], "--layers", "--models", "dinat_pico", "--passes", "forward", "--rounds", 2)
    assert "dinat_pico batch 1 forward" in capsys.readouterr().out


def test_pictures_are_of_the_committed_rows(tmp_path):
    """In a process of its own, as in the README. Pixels differ between releases of matplotlib; the digest does not."""
    subprocess.run([sys.executable, ROOT / "benchmarks" / "plot.py", "--output", tmp_path], check=True)
    for name in ("scale.png", "layers.png", "throughput.png"):
        drawn, committed = (Image.open(folder / name).info["Source"] for folder in (tmp_path, ROOT / "docs" / "images"))
        assert drawn == committed, "run benchmarks/plot.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_host_overhead():
    """In a process of its own, as it lets Triton accept CPU tensors."""
    command = [sys.executable, ROOT / "benchmarks" / "host_overhead.py"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in printed.splitlines()] == ["addition", "inference", "autograd"]


def test_jobs_of_dense_prediction(tmp_path):
    """A tiny one: rows are what the run's summary says; the picture has its first scene, half as large."""
    output, sheet = tmp_path / "dense.csv", tmp_path / "dense.png"
    tiny = ["scheduler.epochs=1", "scheduler.warmup_epochs=0", "+data.kwargs.scenes=16", "runtime.device=cpu"]
    paths = ["--runs", tmp_path, "--picture", sheet, "--output", output]
    run("dense_jobs", "--tasks", "semantic", "--rows", 1, *paths, "--overrides", *tiny)
    summary = read(tmp_path / "semantic" / "summary.csv")[-1]
    rows = {row["figure"]: row for row in read(output)}
    assert rows.keys() == {"miou", "pixel_accuracy"}
    assert {row["updates"] for row in rows.values()} == {"1"}
    for name, row in rows.items():
        assert float(row["value"]) == pytest.approx(float(summary[f"val_{name}"]), rel=1e-3)
    assert Image.open(sheet).size == (976 // 2, (20 + 328) // 2)
