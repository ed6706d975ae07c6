"""A configuration small enough to train in a second, and the digits in every form that a dataset comes in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from dinat.data.digits import Digits

ROOT = Path(__file__).parents[3]
TRAIN_PER_CLASS, VAL_IMAGES = 12, 37  # the latter divides by nothing
TINY = (
    "+model.kwargs={img_size: 16, embed_dim: 8, depths: [1, 1, 1], num_heads: [1, 1, 1]}",
    "data.img_size=16",
    "batch_size=24",
    "eval_batch_size=16",
    "scheduler.epochs=2",
    "scheduler.warmup_epochs=1",
    "runtime.device=cpu",
)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def command_line(digits_folder: Path) -> list[str]:
    """Overrides of the command line for a tiny model on the 120 digits."""
    return [*TINY, "data=folder", f"data.root={digits_folder}"]


@pytest.fixture(scope="session")
def compose() -> Callable[..., DictConfig]:
    """Composes configs/train.yaml (or `config`) with overrides, as the command line does."""

    def compose(*overrides: str, config: str = "train") -> DictConfig:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            return hydra_compose(config, list(overrides))

    return compose


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 training and 37 validation digits as PNG files in class folders."""
    root = tmp_path_factory.mktemp("digits")
    train, val = Digits("train"), Digits("validation")
    counts = dict.fromkeys(range(10), 0)
    for index in range(len(train)):
        image, digit = train[index]
        if counts[digit] < TRAIN_PER_CLASS:
            save(image, root / "train" / str(digit) / f"{counts[digit]:02d}.png")
            counts[digit] += 1
    for index in range(VAL_IMAGES):
        image, digit = val[index]
        save(image, root / "validation" / str(digit) / f"{index:02d}.png")
    return root


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="session")
def tiny(compose: Callable[..., DictConfig], command_line: list[str]) -> Callable[..., DictConfig]:
    """The training configuration of a tiny model on the 120 digits, with overrides."""

    def tiny(*overrides: str) -> DictConfig:
        return compose(*command_line, *overrides)

    return tiny


@pytest.fixture(scope="session")
def evaluation(compose: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """The evaluation configuration, with overrides."""

    def evaluation(*overrides: str) -> DictConfig:
        return compose("runtime.device=cpu", *overrides, config="eval")

    return evaluation


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess]:
    """Runs this Python in the checkout with arguments; returns the finished process with its output as text."""

    def python(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout, check=False)

    return python


@pytest.fixture(scope="module")
def trained(tiny: Callable[..., DictConfig], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A finished run folder with an averaged model, and the top-1 that training returned."""
    from dinat.engine import train

    run = tmp_path_factory.mktemp("trained")
    top1 = train(tiny("ema.decay=0.5", "checkpoint.every_epochs=1"), run)
    return run, top1
