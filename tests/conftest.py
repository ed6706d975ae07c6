"""Shared test data: golden outputs of the original implementations (golden/README.md) and the published models."""

import gzip
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def fill() -> ModuleType:
    """golden/fill.py: weights and inputs as pure functions of their names and shapes."""
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def published() -> dict:
    """`models`: facts of the 25 published models; `keys`: state-dict keys and shapes of their checkpoints."""
    return json.loads(gzip.decompress((GOLDEN / "published.json.gz").read_bytes()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
