"""Ahead-of-time compilation for a GPU that is not there, as benchmarks/aot.py does for every configuration."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_dense_and_halo_kernels_use_tensor_cores_and_spill_nothing():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    command = ["benchmarks/aot.py", "--arch", "sm_90", "--only", "dinat_tiny.0", "--output", "-"]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = list(csv.DictReader(run.stdout.splitlines()))
    kernels = dict(d1=["forward", "query", "key"], d8=["forward", "query"])  # d8: one program has a whole group
    expected = [(f"dinat_tiny.0.{dilation}", kernel) for dilation, names in kernels.items() for kernel in names]
    assert [(row["problem"], row["kernel"]) for row in rows] == expected
    for row in rows:
        assert int(row["spills"]) == 0
        assert int(row["block_matrix"]) > 0
