"""All that a GPU has to say about the kernels, in six minutes, from a plain checkout.

    PYTHONPATH=.:kernels python benchmarks/gpu_report.py --out REPORT             # CUDA or ROCm; then send the folder
    PYTHONPATH=.:kernels python benchmarks/gpu_report.py --out REPORT --dry       # every phase, tiny, on the CPU
    PYTHONPATH=.:kernels python benchmarks/gpu_report.py --merge REPORT           # its rows become those of results/

Needs PyTorch, Triton and a C compiler; pytest, timm, compute-sanitizer and ncu where they are.  Phases run one after
the other, each in a process of its own with a time limit: one that crashes, hangs or lacks something is named, and the
next begins.  A GPU that is not there ends the report, and so do tests that fail (but for --keep-going): wrong kernels
are not worth a time.

Files: report.jsonl has a line for everything that was found out, at the time it was; kernels.csv, tuning.csv,
operator.csv and models.csv are as in results/; log.txt is what everything printed; summary.txt says what follows.
Configurations are the shipped ones, whatever the user has tuned.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SCREEN = 1400  # characters that a phase may print
BATCH = 128
WARM_UNTIL = 45  # seconds from the start that tests wait for the cache of compiled kernels
MODELS = ["swin_tiny_patch4_window7_224", "dinat_s_tiny", "dinat_tiny", "nat_tiny", "convnext_tiny"]
# Nsight Compute's names.  A version that does not know one of the second tuple is asked for the first alone.
COUNTERS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)
MORE_COUNTERS = (
    "l1tex__m_xbar2l1tex_read_bytes.sum",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
)


class Report(NamedTuple):
    """The folder that a report is written to."""

    out: Path
    dry: bool
    keep_going: bool = False  # though tests fail
    skipped: tuple[str, ...] = ()  # phases

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def note(self, phase: str, **found: Any) -> None:
        """Writes down what a phase found; `stop=reason` ends the report."""
        with open(self.out / "report.jsonl", "a") as file:
            file.write(json.dumps({"phase": phase} | found, default=str) + "\n")

    def notes(self, phase: str) -> list[dict]:
        """What a phase wrote down."""
        path = self.out / "report.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [found for found in map(json.loads, lines) if found["phase"] == phase]

    def get(self, phase: str, name: str, default: Any = None) -> Any:
        """The last thing of this name that a phase wrote down."""
        return next((found[name] for found in reversed(self.notes(phase)) if name in found), default)

    def rows(self, name: str) -> list[dict[str, str]]:
        path = self.out / f"{name}.csv"
        return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []

    def problems(self) -> list:
        """The layers that are measured."""
        import problems

        small = problems.Problem("small", 3, 1, 3, 1, 8)
        return [small] if self.dry else problems.MODELS["dinat_tiny"]


def facts(report: Report, seconds: float) -> None:
    import harness
    import torch

    triton = importlib.util.find_spec("triton") is not None
    tools = {name: bool(shutil.which(name)) for name in ("gcc", "cc", "clang", "git", "ncu", "compute-sanitizer")}
    packages = {name: importlib.util.find_spec(name) is not None for name in ("pytest", "xdist", "timm", "expecttest")}
    report.note("facts", python=sys.version.split()[0], cpus=os.cpu_count(), tools=tools, packages=packages)
    if not report.dry and not torch.cuda.is_available():
        report.note("facts", stop="PyTorch finds no CUDA or ROCm device here")
        return
    report.note("facts", **harness.facts(report.device))
    if not triton:
        report.note("facts", stop="the package triton is not installed")
    elif not (report.dry or tools["gcc"] or tools["cc"] or tools["clang"] or os.environ.get("CC")):
        report.note("facts", stop="Triton needs a C compiler, and there is none (gcc, cc, clang, or the variable CC)")
    if report.dry:
        report.note("facts", arch="sm_90")
        return
    from dinat_kernels.impl.fused.launch import gpu_of

    report.note("facts", **gpu_of(torch.device("cuda"))._asdict())
    properties = torch.cuda.get_device_properties(0)
    report.note("facts", l2=properties.L2_cache_size, memory=properties.total_memory, free=torch.cuda.mem_get_info()[0])


def ceilings(report: Report, seconds: float) -> None:
    import ceilings

    sizes = (ceilings.TINY, 1) if report.dry else (ceilings.Sizes(), 5)
    report.note("ceilings", **ceilings.measure(report.device, *sizes))


def tests(report: Report, seconds: float) -> None:
    jobs = min(12, os.cpu_count() or 1)
    parallel = ["-n", str(jobs)] if importlib.util.find_spec("xdist") and not report.dry else []
    suite = "tests/dinat_kernels/test_triton_gpu.py"
    command = [sys.executable, "-m", "pytest", "-v", "-rf", "-m", "gpu", "-p", "no:cacheprovider", *parallel, suite]
    environment = os.environ | {"COLUMNS": "400"}  # of which a line about a failure has most
    status, output = run(command, seconds, environment)
    found = read_tests(output)
    report.note("tests", status=status, **found)
    if not found["passed"] + found["failed"] + found["skipped"]:
        report.note("tests", problem=output[-300:])
    if found["failed"] and not report.keep_going:
        report.note("tests", stop=f"{found['failed']} tests failed")


def read_tests(output: str) -> dict[str, Any]:
    """Numbers of tests and the failures in what `pytest -v -rf` printed, also if it was cut short."""
    counts = {word.lower(): len(re.findall(rf"\b{word}\b", _without_summary(output))) for word in ("PASSED", "SKIPPED")}
    failed = len(re.findall(r"\b(?:FAILED|ERROR)\b", _without_summary(output)))
    errors = re.findall(r"^(?:FAILED|ERROR) \S*?::(.*)$", output, re.MULTILINE)
    return counts | dict(failed=failed, errors=[error[:200] for error in errors])


def _without_summary(output: str) -> str:
    return re.split(r"^=+ (?:short test summary|FAILURES|ERRORS)", output, maxsplit=1, flags=re.MULTILINE)[0]


def sanitizer(report: Report, seconds: float) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None and not report.dry:
        report.note("sanitizer", skipped="compute-sanitizer is not installed")
        return
    for check in ("memcheck",) if report.dry else ("memcheck", "racecheck"):
        prefix = [] if report.dry else [tool, "--tool", check]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # tensors have ends of their own
        status, output = run([*prefix, sys.executable, __file__, "--small"], seconds / 2, environment)
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
        report.note("sanitizer", **{check: summary[-1] if summary else f"{status}: {output[-200:]}"})
        if summary and not re.match(r"0 (errors|hazards)", summary[-1]):
            report.note("sanitizer", stop=f"{check}: {summary[-1]}")


def small() -> None:
    """Forward and backward passes on small maps with borders and remainders: what compute-sanitizer watches."""
    import torch
    from dinat_kernels import na2d

    device, k, dtype, maps = "cuda", 7, torch.bfloat16, (((14, 14), 1), ((14, 14), 2), ((15, 17), 2))
    if not torch.cuda.is_available():
        device, k, dtype, maps = "cpu", 2, torch.float32, (((3, 4), 1),)
    for side, dilation in maps:
        q, k_, v = (x.requires_grad_() for x in torch.randn(3, 1, *side, 1, 32, device=device, dtype=dtype))
        rpb = torch.randn(1, 2 * k - 1, 2 * k - 1, device=device, requires_grad=True)
        out = na2d(q, k_, v, k, dilation=dilation, rpb=rpb, backend="triton")
        torch.autograd.grad(out.sum(), (q, k_, v, rpb))


def kernels(report: Report, seconds: float) -> None:
    import kernel_speed

    for p in report.problems():
        batch, samples = (1, 1) if report.dry else (BATCH, 30)
        kernel_speed.measure(p, batch, report.device, report.out / "kernels.csv", samples)


def host(report: Report, seconds: float) -> None:
    import host_overhead

    report.note("host", **host_overhead.measure(report.device, 2 if report.dry else 50))


def counters(report: Report, seconds: float) -> None:
    tool = shutil.which("ncu")
    if tool is None:
        report.note("counters", skipped="ncu is not installed")
        return
    end = time.monotonic() + seconds
    for names in (COUNTERS + MORE_COUNTERS, COUNTERS):
        options = ["--clock-control", "none", "--csv", "--page", "raw", "--metrics", ",".join(names)]
        options += ["--kernel-name", r"regex:(forward|query|key)_kernel"]
        status, output = run([tool, *options, sys.executable, __file__, "--profiled"], end - time.monotonic())
        found = read_counters(output, names)
        if found:
            for entry in found:
                report.note("counters", **entry)
            return
        report.note("counters", problem=f"{status}: {output[-300:]}")


def read_counters(output: str, names: tuple[str, ...]) -> list[dict[str, str]]:
    """Kernel and counters, in the units that ncu says, of every launch in `ncu --csv --page raw`."""
    start = output.find('"ID"')
    if start < 0:
        return []
    table = list(csv.DictReader(io.StringIO(output[start:])))
    units, launches = table[:1], table[1:]  # below the names are the units
    return [
        {"kernel": launch["Kernel Name"]} | {name: f"{launch[name]} {units[0][name]}" for name in names}
        for launch in launches
        if launch.get(names[-1])
    ]


def profiled() -> None:
    """What ncu watches: every kernel of every layer once."""
    import kernel_speed
    import problems

    for p in problems.MODELS["dinat_tiny"]:
        kernel_speed.launches(p, BATCH, "cuda")


def tuning(report: Report, seconds: float) -> None:
    import harness
    import torch
    from dinat_kernels import tune

    known = harness.facts(report.device)
    layers = [tune.Layer(3, 3, 1, 1, 8, torch.float32)] if report.dry else tune.layers()
    timer = (lambda launch: harness.alone(launch, "cpu", 1)) if report.dry else tune.on_gpu
    for layer in layers:
        for tried in tune.trials(layer, 1 if report.dry else BATCH, report.device, timer):
            for trial in tried:
                columns = {"class": str(trial.problem)} | trial.config._asdict()
                columns |= dict(us=harness.rounded(1e6 * trial.seconds), error=trial.error)
                harness.append(report.out / "tuning.csv", known | columns)


def operator(report: Report, seconds: float) -> None:
    import operator_speed

    layers = report.problems()
    operator_speed.GROUPS |= {"layers": layers, "few": layers[:2]}
    ours = ["torch"] if report.dry else ["triton"]
    batch = "2" if report.dry else str(BATCH)
    common = [
        "--device",
        report.device,
        "--output",
        str(report.out / "operator.csv"),
        "--seconds",
        "0",
        "--rounds",
        "7",
    ]
    both = ["forward", "training"]
    jobs = [("layers", batch, both, ["dense_sdpa"])]
    if not report.dry:  # what takes long comes last
        jobs += [("layers", "1", both, ["dense_sdpa"])] + [("few", batch, [of_pass], ["flex"]) for of_pass in both]
    for group, size, passes, peers in jobs:
        what = ["--models", group, "--batch", size, "--passes", *passes, "--kernels", *ours, *peers]
        operator_speed.main([*common, *what])


def models(report: Report, seconds: float) -> None:
    import model_speed

    common = ["--device", report.device, "--output", str(report.out / "models.csv"), "--no-memory", "--rounds", "7"]
    few = ["swin_tiny_patch4_window7_224", "dinat_s_tiny"]
    jobs = [("eager", "inference", MODELS), ("eager", "training", MODELS)]
    jobs += [("compiled", "inference", few), ("compiled", "training", few)]  # what takes long comes last
    size = ["--batch", str(BATCH)]
    if report.dry:
        jobs, size = [("eager", of_pass, ["dinat_pico"]) for of_pass in ("inference", "training")], ["--batch", "1"]
        size += ["--sizes", "32"]
    for mode, of_pass, names in jobs:
        model_speed.main([*common, *size, "--seconds", "0", "--modes", mode, "--passes", of_pass, "--models", *names])


def run(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> tuple[str, str]:
    """Runs a command; returns how it ended, and what it printed, which is in the log too."""
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
        try:
            output, _ = process.communicate(timeout=max(1.0, seconds - 2))
            status = f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            status = "timed out"
    print(output, flush=True)
    return status, output


class Phase(NamedTuple):
    run: Callable[[Report, float], None]
    seconds: float  # of 360


PHASES = [
    Phase(facts, 15),
    Phase(ceilings, 20),
    Phase(tests, 65),
    Phase(sanitizer, 30),
    Phase(kernels, 25),
    Phase(host, 10),
    Phase(counters, 35),
    Phase(tuning, 70),
    Phase(operator, 60),
    Phase(models, 65),
]


def _in_child(phase: Phase, report: Report, seconds: float) -> None:
    """Runs a phase with a process group of its own, which ends with it; all that it prints goes to the log."""
    os.setsid()
    log = open(report.out / "log.txt", "a")  # noqa: SIM115  open as long as the process
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    print(f"\n== {phase.run.__name__}", flush=True)
    try:
        phase.run(report, seconds)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        report.note(phase.run.__name__, problem=f"{type(error).__name__}: {str(error)[:300]}")
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def run_phase(phase: Phase, report: Report, seconds: float) -> str:
    """Runs a phase; returns, and writes down, how it ended."""
    started = time.monotonic()
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(phase, report, seconds))
    child.start()
    child.join(seconds)
    status = "done" if child.exitcode == 0 else "failed" if child.exitcode is not None else "timed out"
    kill_group(child.pid)
    child.join()
    report.note(phase.run.__name__, ended=status, took=round(time.monotonic() - started, 1))
    return status


@contextlib.contextmanager
def warming(report: Report) -> Iterator[Callable[[], subprocess.Popen | None]]:
    """Compiles beside the phases what they will ask Triton for; the function starts it, once."""
    processes = []

    def start() -> subprocess.Popen | None:
        arch, known = report.get("facts", "arch"), importlib.import_module("aot").ARCHITECTURES
        if arch in known and not processes:
            jobs = 1 if report.dry else max(1, (os.cpu_count() or 1) - 2)
            command = [sys.executable, str(ROOT / "benchmarks" / "aot.py"), "--warm", "--arch", arch]
            command += ["--jobs", str(jobs), *(["--only", "whole map"] if report.dry else [])]
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            with open(report.out / "log.txt", "a") as log:
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
                )
        return processes[0] if processes else None

    try:
        yield start
    finally:
        for process in processes:
            kill_group(process.pid)
            process.wait()


def make(report: Report, minutes: float) -> None:
    """Runs all phases, then the summary."""
    started = time.monotonic()
    stop = None
    with warming(report) as warm:
        for phase in PHASES:
            name = phase.run.__name__
            if name in report.skipped:
                report.note(name, ended="skipped", skipped="as asked for")
                continue
            left = 60 * minutes - (time.monotonic() - started) - 5
            if stop or left < min(5, phase.seconds):
                report.note(name, ended="skipped", skipped=stop or "no time was left")
                continue
            warmer = None
            with contextlib.suppress(Exception):  # a report without a warm cache is slower, no more
                warmer = warm() if phase.run is not facts else None
            if warmer and phase.run is tests and not report.dry:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    warmer.wait(max(0.1, WARM_UNTIL - (time.monotonic() - started)))
            status = run_phase(phase, report, min(left, phase.seconds * minutes / 6))
            stop = report.get(name, "stop")
            if phase.run is facts and status != "done":
                stop = stop or f"not even the facts: {status}"
            print(f"== {name}: {told(report, name)}"[:SCREEN], flush=True)
    text = summary(report)
    (report.out / "summary.txt").write_text(text)
    print(text)


def told(report: Report, phase: str) -> str:
    """What a phase found, for the screen."""
    found = {}
    for note in report.notes(phase):
        found |= {name: value for name, value in note.items() if name != "phase"}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
    )


def summary(report: Report) -> str:
    """What was found, and what follows from it."""
    get = report.get
    lines = [f"{get('facts', 'device', 'no GPU')}, torch {get('facts', 'torch')}, triton {get('facts', 'triton')}, "]
    lines[0] += f"driver {get('facts', 'driver')}, revision {get('facts', 'git')}"
    rates = {name: get("ceilings", name) for name in ("copy", "l2_plain", "l2_async", "exp2", "launch")}
    if rates["launch"] is not None:
        copy, plain, copied, exp2 = (rate / 1e12 for name, rate in rates.items() if name != "launch")
        lines.append(f"copy {copy:.2f} TB/s, L2 {plain:.2f} plain, {copied:.2f} asynchronous, exp2 {exp2:.2f} T/s")
        lines[-1] += f", empty launch {1e6 * rates['launch']:.1f} us"
    passed, failed, skipped = (get("tests", name) for name in ("passed", "failed", "skipped"))
    lines.append(f"tests: {passed} passed, {failed} failed, {skipped} skipped")
    lines += [f"  {error}" for error in get("tests", "errors", [])[:12]]
    memcheck, racecheck = (get("sanitizer", name, "not run") for name in ("memcheck", "racecheck"))
    lines.append(f"sanitizer: memcheck {memcheck}, racecheck {racecheck}")
    lines += kernel_lines(report, rates) + tuning_lines(report) + ratio_lines(report)
    if get("host", "inference"):
        names = ("inference", "both passes", "PyTorch, both passes")
        lines.append("host: " + ", ".join(f"{name} {get('host', name):.0f} us" for name in names))
    for phase in PHASES:
        name = phase.run.__name__
        why = get(name, "skipped") or get(name, "problem", "")
        if get(name, "ended") != "done" or why:
            lines.append(f"{name}: {get(name, 'ended')}. {why}".rstrip(". ")[:200])
    return "\n".join(lines) + "\n"


def kernel_lines(report: Report, rates: dict[str, float | None]) -> list[str]:
    """A line for each kernel: its time, and the share that each resource would need at the rates measured here."""
    lines = []
    for row in report.rows("kernels"):
        shares = {}
        if row["l2_bytes"] and rates["copy"]:
            us = float(row["us"])
            shares = {
                "DRAM": 1e6 * float(row["dram_bytes"]) / rates["copy"] / us,
                "L2": 1e6 * float(row["l2_bytes"]) / rates["l2_async"] / us,
                "issue": float(row["issue_us"]) / us,
                "exp2": float(row["exp2_us"]) / us,
            }
        shown = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        binds = max(shares, key=shares.get) if shares and max(shares.values()) > 0.6 else "latency" if shares else ""
        lines.append(
            f"{row['name']:16} {row['kernel']:7} {float(row['us']):8.1f} us, floor ratio {row['floor_ratio'] or '?'}"
            + (f"; {shown}; binds: {binds}" if shown else "")
        )
    return ["kernels, each alone:", *lines] if lines else []


def best_configs(rows: list[dict[str, str]]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Class and its trials, fastest first; the first trial of a class was the shipped configuration."""
    classes = {}
    for row in rows:
        classes.setdefault(row["class"], []).append(row)
    for name, tried in classes.items():
        yield name, sorted(tried, key=lambda row: float(row["us"]))


def config_of(row: dict[str, str]) -> str:
    fields = list(row)
    fields = fields[fields.index("class") + 1 : fields.index("us")]
    return f"Config({', '.join(row[field] for field in fields)})"


def tuning_lines(report: Report) -> list[str]:
    """The three fastest configurations of each class beside the shipped one."""
    rows = report.rows("tuning")
    first = {row["class"]: row for row in reversed(rows)}
    lines = []
    for name, tried in best_configs(rows):
        shown = ", ".join(f"{config_of(row)} {float(row['us']):.1f}" for row in tried[:3])
        lines.append(f"{name}: shipped {config_of(first[name])} {float(first[name]['us']):.1f} us; best {shown}")
    return lines


def ratio_lines(report: Report) -> list[str]:
    """How many times as fast as peers: operator and models."""
    lines = []
    for row in report.rows("operator"):
        if row["kernel"] not in ("triton+rpb", "torch+rpb") and row["ratio"]:
            lines.append(
                f"{row['name']} batch {row['batch']} {row['pass']}: {row['kernel']} takes {row['ratio']}x ours"
            )
    for row in report.rows("models"):
        what = f"{row['model']} {row['pass']} {row['mode']}"
        lines.append(f"{what}: {row['images_per_s']} images/s, {row['speed']}x {row['against']}")
    return lines


def merge(folder: Path) -> None:
    """Appends a report's rows to those of results/, once, and prints what its figures change by hand."""
    import harness

    report = Report(folder, dry=False)
    if not (folder / "report.jsonl").exists():
        sys.exit(f"{folder} holds no report: there is no report.jsonl in it")
    if report.get("facts", "device") is None or report.get("facts", "driver") == "":
        sys.exit(f"{folder} is no report of a GPU: its device is {report.get('facts', 'device')!r}")
    for name in ("kernels", "tuning", "operator", "models"):
        path = harness.RESULTS / f"{name}.csv"
        known = harness.read(path) if path.exists() else []
        new = [row for row in report.rows(name) if row not in known]
        for row in new:
            harness.append(path, row)
        print(f"{len(new)} rows appended to {path}")
    print("\nConfigurations that were faster than the shipped ones, for kernels/dinat_kernels/impl/fused/configs.py:")
    rows = report.rows("tuning")
    first = {row["class"]: row for row in reversed(rows)}
    for name, tried in best_configs(rows):
        gain = float(first[name]["us"]) / float(tried[0]["us"])
        if gain > 1.02:
            print(f"  {name}: {config_of(tried[0])}, {gain:.2f}x as fast as {config_of(first[name])}")
    rate = report.get("ceilings", "l2_async")
    if rate:
        print(f"\nRate of the L2 cache for benchmarks/problems.py: {rate:.3g} bytes/s")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), help="a new folder")
    parser.add_argument("--keep-going", action="store_true", help="measure although tests fail")
    parser.add_argument("--skip", nargs="*", choices=[phase.run.__name__ for phase in PHASES[1:]], default=[])
    parser.add_argument("--dry", action="store_true", help="every phase at a tiny size on the CPU")
    parser.add_argument("--merge", type=Path, metavar="REPORT", help="append its rows to benchmarks/results/")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)  # what compute-sanitizer runs
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)  # what ncu runs
    args = parser.parse_args(arguments)
    if args.small or args.profiled:
        return small() if args.small else profiled()
    if args.merge:
        return merge(args.merge)
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out {args.out} is not empty; name a new folder")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it where kernels are defined
    os.environ["DINAT_TUNE_FILE"] = str(args.out.absolute() / "none.json")
    with contextlib.suppress(ImportError):  # once for all phases, which are forks of this process
        importlib.import_module("torch")
        importlib.import_module("dinat_kernels.tune")
        importlib.import_module("dinat_kernels.impl.fused")
    make(Report(args.out.absolute(), args.dry, args.keep_going, tuple(args.skip)), args.minutes)


if __name__ == "__main__":
    main()
