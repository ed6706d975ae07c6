"""Runs interpreter_suite.py: Triton reads TRITON_INTERPRET when kernels are defined, so it needs its own process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dinat_kernels.impl import uninterpretable

WHY_NOT = uninterpretable() if importlib.util.find_spec("triton") else "triton is not installed"


@pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
def test_kernels_in_the_interpreter():
    suite = Path(__file__).with_name("interpreter_suite.py")
    # One thread: the interpreter's many small NumPy operations only get slower with more.
    environment = os.environ | dict(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", str(suite)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
