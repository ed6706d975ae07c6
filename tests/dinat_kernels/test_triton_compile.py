"""Ahead-of-time compilation for a GPU that is not there, as benchmarks/aot.py does for every configuration."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*command: str, **environment: str) -> str:
    """What a Python process prints that does not interpret kernels, whatever this one does."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = {"PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT / 'benchmarks'}"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=kept | paths | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dense_and_halo_kernels_use_tensor_cores_and_copy_ahead():
    printed = run("benchmarks/aot.py", "--arch", "sm_90", "--only", "dinat_tiny.0", "--output", "-")
    rows = list(csv.DictReader(printed.splitlines()))
    kernels = dict(d1=["forward", "query", "key"], d8=["forward", "query"])  # d8: one program has a whole group
    expected = [(f"dinat_tiny.0.{dilation}", kernel) for dilation, names in kernels.items() for kernel in names]
    assert [(row["problem"], row["kernel"]) for row in rows] == expected
    for row in rows:
        assert int(row["loop_spills"]) == 0  # Triton 3.9 spills 128 bytes between loops
        assert int(row["block_matrix"]) > 0
        assert int(row["in_flight"]) > 0  # of the next image, while a program works on this one


# Triton 3.8.0 can abort the process at `tl.gather` on few numbers and several warps (triton issue 11600).
SMALL_WINDOWS = """
import aot

for lengths in ((3,), (3, 4), (2, 3, 3)):
    case = aot.Case("small", lengths, dict(kernel_size=2))
    query = case.launches("sm_90")[1]
    print(query.plan.name, query.plan.constants["GRAD_RPB"], aot.compile_launch(query, "sm_90").name)
"""


def test_small_windows_compile():
    assert run("-c", SMALL_WINDOWS).split("\n")[:3] == ["query True query_kernel"] * 3


# A layer is compiled for tensors without memory, then launched with real ones, as far as a machine without GPU can.
WARM_AND_LAUNCH = """
import os, pathlib, aot
from dinat_kernels.tune import Layer

cache = pathlib.Path(os.environ["TRITON_CACHE_DIR"])
assert aot.warm("sm_90", aot.Case("small", (3, 3), dict(kernel_size=3), heads=2, batch=3)) is None
warmed = set(cache.iterdir())
for launch in Layer(3, 3, 1, heads=2).launches(3, "cpu", aot.ARCHITECTURES["sm_90"].gpu):
    launch.plan.kernel.device_caches.clear()
    launch.plan.kernel.run(*launch.arguments(), grid=launch.plan.grid, warmup=True, **launch.plan.options)
    print(launch.plan.name, len(warmed), len(set(cache.iterdir()) - warmed))
"""


def test_the_warmed_cache_has_what_a_launch_looks_up(tmp_path):
    printed = run("-c", WARM_AND_LAUNCH, TRITON_CACHE_DIR=str(tmp_path))
    assert printed.splitlines() == ["forward 2 0", "query 2 0"]
