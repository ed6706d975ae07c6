"""What the benchmarks share: facts about the machine, interleaved measuring, peak memory, append-only CSV files."""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SAMPLE = 2e-3  # seconds; on the CPU, shorter calls are repeated within a sample
# Written before each sample on a GPU, in bytes and times: clears the L2 cache, and keeps the GPU busy for a millisecond
# or two while Python launches what is timed, so that no sample is one of Python.  A quarter of it is read at last, as
# lines that wait to be written are else charged to what is timed: on an H200, 3.3 of the 16.6 us of its forward pass
# of 7 x 7.
FLUSH, FLUSHES = 1 << 30, 5


class Timing(NamedTuple):
    """Seconds of one call (median, 20th and 80th percentile), and how many times those of the first in turn."""

    median: float
    p20: float
    p80: float
    ratio: float

    def columns(self, unit: float) -> dict[str, float]:
        """The times for a CSV row, in `unit` seconds."""
        return {name: rounded(getattr(self, name) / unit) for name in ("median", "p20", "p80")}


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])


def add_arguments(parser: argparse.ArgumentParser, output: str, seconds: float) -> None:
    """How long to measure, and where rows go; `output` names the file in results/."""
    parser.add_argument("--seconds", type=float, default=seconds, help="of sampling, for all that takes turns")
    parser.add_argument("--rounds", type=int, default=5, help="turns, at least")
    parser.add_argument("--output", type=Path, default=RESULTS / output)


def rounded(x: float, digits: int = 4) -> float:
    """`x` to significant digits."""
    return float(f"{x:.{digits}g}")


def facts(device: str) -> dict[str, Any]:
    """The columns that every row begins with: when, where and with which versions.

    A folder without git has the revision that the environment variable DINAT_REVISION says.
    """

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # not installed, or nothing to say
            return ""

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return ""

    gpu = device == "cuda"
    return dict(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        device=torch.cuda.get_device_name() if gpu else _cpu_name(),
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 1),  # of the minute before: other work on the machine
        driver=output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        if gpu
        else "",
        torch=torch.__version__,
        triton=version("triton"),
        timm=version("timm"),
        git=os.environ.get("DINAT_REVISION") or output("git", "describe", "--always", "--dirty", "--exclude=*"),
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{name[1] if name else 'CPU'} ({torch.backends.cpu.get_cpu_capability()})"


def _seconds(run: Callable[[], object], device: str, repeats: int = 1) -> float:
    """Duration of one call, of which `repeats` are made."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed = torch.empty(FLUSH // 4, dtype=torch.float32, device=device)
    for _ in range(FLUSHES):
        flushed.zero_()
    flushed[: FLUSH // 16].sum()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def alone(run: Callable[[], object], device: str, samples: int = 30) -> float:
    """Median of the seconds that `run` takes by itself: on a GPU replayed as a CUDA graph, without time to launch."""
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    return statistics.median(_seconds(run, device) for _ in range(samples))


def warmed(run: Callable[[], object], device: str) -> Callable[[], float]:
    """Warm up; returns what takes one sample: seconds per call."""
    run()
    repeats = math.ceil(SAMPLE / max(_seconds(run, device), 1e-6))
    return lambda: _seconds(run, device, repeats)


def interleaved(
    builders: Mapping[str, Callable[[], Callable[[], object]]], device: str, seconds: float, rounds: int
) -> dict[str, Timing]:
    """Times of several things, sampled in turn (A B C, B A C, ...), so that what slows the machine slows them all.

    `Timing.ratio` is the median over the turns of the time of one over that of the first.

    Args:
        builders: name -> function that prepares and returns what is timed. One that raises is named on the screen and
            left out: a peer may be missing, or out of memory.
        seconds: of sampling, in all; there are at least `rounds` turns.
    """
    samplers = {}
    for name, build in builders.items():
        try:
            samplers[name] = warmed(build(), device)
        except Exception as error:
            print(f"{name} left out: {type(error).__name__}: {str(error)[:100]}", flush=True)
    turns: list[list[float]] = []
    order, shuffle = list(samplers), random.Random(0).shuffle
    end = time.perf_counter() + seconds
    while samplers and (len(turns) < rounds or time.perf_counter() < end):
        shuffle(order)  # some leave caches and memory in a state that slows what comes next
        turn = {name: samplers[name]() for name in order}
        turns.append([turn[name] for name in samplers])
    timings = {}
    for name, times in zip(samplers, zip(*turns, strict=True), strict=True):
        p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
        ratio = statistics.median(x / turn[0] for x, turn in zip(times, turns, strict=True))
        timings[name] = Timing(statistics.median(times), p20, p80, ratio)
    return timings


def peak_memory(run: Callable[[], object], device: str) -> int:
    """Bytes that PyTorch's allocator hands out at the peak of `run`, beyond what it had before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    # The size of the process would hide what fits into memory that was freed before; the allocator does not.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


def command(script: str, *words: str) -> str:
    """Runs train.py or eval.py as a user does; returns what it prints on stdout, or ends with its status."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, script, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
    )
    return result.stdout if result.returncode == 0 else sys.exit(result.returncode)


def append(path: Path, row: Mapping[str, Any]) -> None:
    """One more row; files only grow, and keep their columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new and path.read_text().split("\n", 1)[0] != ",".join(row):
        sys.exit(f"{path} has other columns. Write to another file with --output.")
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file, oldest first."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
