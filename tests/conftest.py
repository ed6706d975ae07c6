"""Shared test data: golden outputs of the original implementations (golden/README.md) and the published models."""

import gzip
import importlib.util
import json
from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="session")
def published_weights(published: dict, fill: ModuleType) -> Callable[..., dict[str, torch.Tensor]]:
    """A checkpoint of a published model in its published layout: golden weights, or empty ones on the meta device."""

    def published_weights(name: str, meta: bool = False) -> dict[str, torch.Tensor]:
        weights = {}
        for key, shape in published["keys"][name].items():
            if key.endswith("relative_position_index"):
                weights[key] = torch.zeros(shape, dtype=torch.int64)
            else:
                weights[key] = torch.empty(shape, device="meta") if meta else fill.tensor_for(key, tuple(shape))
        return weights

    return published_weights


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors are NaN, however they are made: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # of its effects, the one that is wanted
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
