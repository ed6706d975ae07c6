"""The benchmarks run, at tiny sizes on the CPU, and the pictures come from the rows; nothing here asserts a time."""

import csv
import importlib
import importlib.util
import os
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
    for name in ("scale.png", "layers.png", "throughput.png", "paper.png"):
        drawn, committed = (Image.open(folder / name).info["Source"] for folder in (tmp_path, ROOT / "docs" / "images"))
        assert drawn == committed, "run benchmarks/plot.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_host_overhead():
    """In a process of its own, as it lets Triton accept CPU tensors."""
    command = [sys.executable, ROOT / "benchmarks" / "host_overhead.py"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    both = ["PyTorch, both passes without bias", "both passes without bias", "PyTorch, both passes", "both passes"]
    assert [line[:34].strip() for line in printed.splitlines()] == ["inference", "addition", "forward", *both]
    assert all(float(line[34:].split()[0]) > 0 for line in printed.splitlines())


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


@pytest.fixture
def report(tmp_path):
    return importlib.import_module("gpu_report").Report(tmp_path, dry=True)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_gpu_report(tmp_path):
    """Every phase at a tiny size, in a process of its own, since Triton interprets its kernels there."""
    out = tmp_path / "report"
    command = [sys.executable, ROOT / "benchmarks" / "gpu_report.py", "--dry", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    report = importlib.import_module("gpu_report").Report(out, dry=True)
    log = (out / "log.txt").read_text()
    phases = [phase.run.__name__ for phase in importlib.import_module("gpu_report").PHASES]
    assert {name: report.get(name, "ended") for name in phases} == dict.fromkeys(phases, "done"), log
    assert [report.get(name, "problem") for name in phases] == [None] * len(phases), log
    assert done.returncode == 0
    assert len(list(out.iterdir())) <= 8
    assert (out / "summary.txt").read_text() in done.stdout
    kernels = [(row["name"], row["kernel"]) for row in read(out / "kernels.csv")]
    assert kernels == [("small", "forward"), ("small", "query")]  # a whole group: there is no third kernel
    assert {row["class"].split("/")[0] for row in read(out / "tuning.csv")} == {"forward", "query"}
    assert {row["kernel"] for row in read(out / "operator.csv")} == {
        "torch",
        "torch+rpb",
        "dense_sdpa",
        "dense_sdpa+rpb",
    }
    assert {row["pass"] for row in read(out / "models.csv")} == {"inference", "training"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_report_without_a_gpu_ends_with_the_reason(tmp_path, capsys):
    run("gpu_report", "--out", tmp_path / "report")
    assert "models: skipped. PyTorch finds no CUDA or ROCm device here" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("gpu_report", "--out", tmp_path / "report")
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no report of a GPU"):
        run("gpu_report", "--merge", tmp_path / "report")


def crash(report, seconds):
    report.note("crash", found=1)
    os.kill(os.getpid(), 9)


def hang(report, seconds):
    report.note("hang", found=1)
    print("before", flush=True)
    subprocess.run(["sleep", "600"])


def mistake(report, seconds):
    raise ValueError("such a pity")


@pytest.mark.parametrize(("phase", "status"), [(crash, "failed"), (hang, "timed out"), (mistake, "failed")])
def test_phases_may_fail(report, phase, status):
    """What one found before is kept, why it failed is told, and what it started has ended."""
    module = importlib.import_module("gpu_report")
    assert module.run_phase(module.Phase(phase, 1), report, 0.5) == status
    name = phase.__name__
    assert report.get(name, "ended") == status
    assert report.get(name, "found") == (None if phase is mistake else 1)
    assert report.get(name, "problem") == ("ValueError: such a pity" if phase is mistake else None)
    assert ("before" in (report.out / "log.txt").read_text()) == (phase is hang)


def test_failed_tests_end_a_report(report, monkeypatch):
    module = importlib.import_module("gpu_report")
    red = "t.py::a PASSED [ 1%]\nt.py::b[c] FAILED [ 2%]\n=== FAILURES ===\nFAILED\nFAILED t.py::b[c] - dq: error 1"
    assert module.read_tests(red) == dict(passed=1, skipped=0, failed=1, errors=["b[c] - dq: error 1"])
    assert module.read_tests("[gw0] [ 1%] PASSED t.py::a\n[gw1] [ 2%] FAI") == dict(
        passed=1, skipped=0, failed=0, errors=[]
    )
    monkeypatch.setattr(module, "run", lambda *_: ("exit status 1", red))
    monkeypatch.setattr(module, "PHASES", [module.Phase(module.tests, 9), module.Phase(mistake, 9)])
    module.make(report, 6)
    assert report.get("mistake", "skipped") == "1 tests failed"
    assert "b[c] - dq: error 1" in (report.out / "summary.txt").read_text()


def test_counters_of_ncu_are_read():
    module = importlib.import_module("gpu_report")
    names = ("dram__bytes.sum", "gpu__time_duration.sum")
    printed = '==PROF== noise\n"ID","Kernel Name","dram__bytes.sum","gpu__time_duration.sum"\n"","","byte","ns"\n'
    printed += '"0","forward_kernel","205","48"\n'
    found = [{"kernel": "forward_kernel", "dram__bytes.sum": "205 byte", "gpu__time_duration.sum": "48 ns"}]
    assert module.read_counters(printed, names) == found
    assert module.read_counters("==ERROR== Failed to find metric", names) == []


def test_a_report_is_merged_once(report, tmp_path, monkeypatch, capsys):
    """Its rows are appended; faster configurations and the rate of the L2 cache are named."""
    harness = importlib.import_module("harness")
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    report.note("facts", device="H100", driver="580")
    report.note("ceilings", l2_plain=5.0e12, l2_async=6.0e12)
    for stages, us in ((2, 30.0), (3, 20.0), (1, 40.0)):
        row = {"class": "forward/sm_90", "tile": 16, "num_stages": stages, "us": us, "error": ""}
        harness.append(report.out / "tuning.csv", row)
    run("gpu_report", "--merge", report.out)
    printed = capsys.readouterr().out
    assert "forward/sm_90: Config(16, 3), 1.50x as fast as Config(16, 2)" in printed
    assert "6e+12 bytes/s" in printed
    run("gpu_report", "--merge", report.out)
    assert len(read(tmp_path / "results" / "tuning.csv")) == 3


def test_facts_without_git(monkeypatch):
    """The revision is the environment's where git is not installed or this is no checkout."""
    facts = importlib.import_module("harness").facts
    monkeypatch.setenv("PATH", "")
    assert facts("cpu")["git"] == ""
    monkeypatch.setenv("DINAT_REVISION", "abc")
    assert facts("cpu")["git"] == "abc"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_instructions_are_counted_by_the_trips_of_their_loops():
    """A kernel written by hand: images around blocks, and a loop through the table after both."""
    paper = importlib.import_module("paper")
    lines = [("MOV", ""), ("LDG", ""), ("DEPBAR.LE", " SB0, 0x2"), ("HGMMA", ""), ("MUFU.EX2", ""), ("BRA", 2)]
    lines += [("BRA", 1), ("LDS", ""), ("BRA", 7), ("LDL", ""), ("EXIT", "")]
    code = [
        paper.Instruction(i, name, x if isinstance(x, str) else "", x if isinstance(x, int) else None)
        for i, (name, x) in enumerate(lines)
    ]
    counts = paper.count(code, trips=5, images=3, entries=7)
    assert counts.body == ["DEPBAR.LE", "HGMMA", "MUFU.EX2", "BRA"]
    assert counts.all == 1 + 3 * (2 + 5 * 4) + 7 * 2 + 2
    assert (counts.other, counts.exponentials, counts.in_flight, counts.loop_spills) == (7, 15, 2, 0)
    single = [*code[:1], *code[2:6], *code[7:]]  # blocks and images in one loop
    assert paper.count(single, trips=1, images=3, entries=7).all == 1 + 3 * 4 + 7 * 2 + 2


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_wait_behind_the_end_is_no_loop_around_the_products():
    """As on Blackwell: the loop, 1 to 4, leaves for the wait, 6 to 7, which comes back to where it was left."""
    paper = importlib.import_module("paper")
    code = [
        paper.Instruction(0, "MOV", "", None),
        paper.Instruction(1, "IADD", "", None),
        paper.Instruction(2, "BRA", "", 6),
        paper.Instruction(3, "UTCHMMA", "", None),
        paper.Instruction(4, "BRA", "", 1),
        paper.Instruction(5, "EXIT", "", None, goes_on=False),
        paper.Instruction(6, "SYNCS.PHASECHK.TRANS64.TRYWAIT", "", None),
        paper.Instruction(7, "BRA", "", 6),
        paper.Instruction(8, "BRA", "", 3, goes_on=False),
    ]
    counts = paper.count(code, trips=1, images=3, entries=7)
    assert counts.body == ["IADD", "BRA", "UTCHMMA", "BRA"]
    assert counts.all == 1 + 3 * 4 + 5 - 1


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_programs_of_a_multiprocessor():
    """By hand, as CUDA's occupancy calculator has them: 168 registers, 2 warps, 38.9 KB; then 255 and 4."""
    paper = importlib.import_module("paper")
    limits = paper.Limits(227 << 10, 228 << 10)
    assert paper.programs_per_processor(paper.Compiled(168, 0, 39834, []), 2, limits) == 5  # shared memory
    assert paper.programs_per_processor(paper.Compiled(255, 0, 1024, []), 4, limits) == 2  # registers


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_layers_of_a_model_share_kernels():
    """All that a training step of DiNAT-Tiny compiles, and two halo layers that differ in sizes alone."""
    aot = importlib.import_module("aot")
    layers = [case for case in aot.cases() if case.layer is not None]
    keys = [{aot.key(launch) for launch in case.launches("sm_90")} for case in layers]
    assert len(set.union(*keys)) <= 8
    assert keys[0] == keys[2]
    assert layers[0].layer.side == 2 * layers[2].layer.side


def test_a_step_of_a_model_on_paper():
    """Attention is that of the 30 layers in aot.csv, products the model's 4.3 GMACs; the table has both."""
    paper, problems = (importlib.import_module(name) for name in ("paper_models", "problems"))
    rows, device = read(paper.RESULTS / "aot.csv"), problems.DEVICES["H200"]
    seconds = paper.step("dinat_tiny", False, device, paper.layer_times(rows))
    of_kernel = {
        row["problem"]: float(row["time_us"])
        for row in rows
        if (row["arch"], row["kernel"], row["dtype"]) == ("sm_90", "forward", "bf16") and row["time_us"]
    }
    layers = {"0.d1": 2, "0.d8": 1, "1.d1": 2, "1.d4": 2, "2.d1": 9, "2.d2": 9, "3.d1": 5}
    attention = sum(count * of_kernel[f"dinat_tiny.{layer}"] for layer, count in layers.items())
    assert 1e6 * seconds["attention"] == pytest.approx(attention)
    least = 128 * 2 * 4.2e9 / (0.8 * device.matrix)
    assert least < seconds["products"] < 2 * least  # those that move more bytes than they compute take longer
    (row,) = [
        row
        for row in read(paper.RESULTS / "paper_models.csv")
        if (row["model"], row["pass"]) == ("dinat_tiny", "inference")
    ]
    for kind, time in seconds.items():
        assert float(row[f"{kind}_ms"]) == pytest.approx(1e3 * time, rel=0.01), "run benchmarks/paper_models.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_bytes_that_programs_read():
    """A map of 7x7 by hand: windows of 3, tiles of 4x4 and of what is left; keys 0 to 4 and 3 to 6 on each axis."""
    aot, paper = (importlib.import_module(name) for name in ("aot", "paper"))
    case = aot.Case("small", (7, 7), dict(kernel_size=3), heads=2, batch=5)
    forward, *_ = case.launches("sm_90")
    assert forward.plan.constants["TILE"][:3] == (1, 4, 4)
    assert paper.boxes(forward.plan) == (5 + 4) ** 2
    rows = 5 * 2 * (49 + 2 * 81 + 49)  # queries, keys and values, results
    assert paper.traffic(forward.plan, 49, 2)[1] == rows * 64 + 4 * 5 * 2 * 49
