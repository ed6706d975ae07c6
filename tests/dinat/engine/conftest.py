"""A configuration small enough to train in a second, and the digits in every form that a dataset comes in."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dinat.data.digits import Digits
from dinat.engine import report, train
from dinat.engine.checkpoint import read_checkpoint

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
# one update on all images, of which everything can be worked out by hand
PLAIN = (
    "model.name=stand_in",
    "model.kwargs=null",
    "model.drop_path_rate=0",
    "data.img_size=8",
    "batch_size=120",
    "augment=none",
    "optimizer=sgd",
    "optimizer.opt=momentum",  # without Nesterov: the first step is lr * gradient
    "optimizer.lr=1",
    "optimizer.weight_decay=0",
    "optimizer.clip_grad=null",
    "scheduler.epochs=1",
    "scheduler.warmup_epochs=0",
    "scheduler.min_lr=0",
)


class StandIn(nn.Module):
    """A linear classifier of 8x8 pixels; or one that finds class `script[n]` everywhere, after `n` training batches."""

    def __init__(
        self, num_classes: int = 10, in_chans: int = 3, drop_path_rate: float = 0.0, script: list[int] | None = None
    ) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.script = num_classes, in_chans * 64, script
        self.drop = nn.Dropout(drop_path_rate)
        self.head = nn.Linear(self.num_features, num_classes)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head(self.drop(images.flatten(1)))
        self.seen += self.training
        if self.script and not self.training:
            return nn.functional.one_hot(torch.tensor(self.script[self.seen]), self.num_classes) + 0 * logits
        return logits


default_cfgs = generate_default_cfgs(
    {
        "stand_in.untrained": {
            "input_size": (3, 8, 8),
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
            "crop_pct": 1.0,
            "classifier": "head",
        }
    }
)


@register_model
def stand_in(pretrained: bool = False, **kwargs: Any) -> StandIn:
    return build_model_with_cfg(StandIn, "stand_in", pretrained, **kwargs)


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


# a tiny model for each task of dense prediction
BACKBONE = "backbone_kwargs: {embed_dim: 8, depths: [1, 1, 1, 1], num_heads: [1, 1, 1, 1]}"
DENSE_KWARGS = {
    "detection": "fpn_channels: 8, box_channels: 16, mask_channels: 8, roi_samples: 16, rpn_samples: 32, "
    "rpn_top_train: 20, rpn_top: 20, rpn_keep_train: 20, rpn_keep: 10, detections: 5, score_threshold: 0.0",
    "semantic": "channels: 8, auxiliary_channels: 8",
    "panoptic": "width: 64, heads: 2, encoder_layers: 1, decoder_layers: 2, encoder_mlp: 32, decoder_mlp: 32, "
    "queries: 8, points: 64, object_threshold: 0.0",
}


@pytest.fixture(scope="session")
def scenes(compose: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """The training configuration of a task with a tiny model on 12 scenes of 32 pixels, with overrides."""

    def scenes(task: str, *overrides: str) -> DictConfig:
        return compose(
            f"task={task}", f"++model.kwargs={{{DENSE_KWARGS[task]}, {BACKBONE}}}", "data.img_size=32",
            "++data.kwargs={digits: [1, 2], digit_size: [12, 20], scenes: 12}", "batch_size=4", "eval_batch_size=32",
            "scheduler.epochs=2", "scheduler.warmup_epochs=0", "eval_every=2", "runtime.device=cpu", *overrides,
        )  # fmt: skip

    return scenes


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


@dataclass
class Observed:
    """What a training run did, seen from outside.

    Attributes:
        lr: of each parameter group, at each update.
        before, gradients, after: of the parameters by name, around each step of the optimizer.
        forward: (whether training, images, logits) of each call of the model.
        last, rows, top1: last.pt, summary.csv, and what training returned.
    """

    lr: list[list[float]] = field(default_factory=list)
    before: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    after: list[dict[str, Tensor]] = field(default_factory=list)
    forward: list[tuple[bool, Tensor, Tensor]] = field(default_factory=list)
    run: Path | None = None
    top1: float | None = None
    model: nn.Module | None = None

    @property
    def last(self) -> dict[str, Any]:
        return read_checkpoint(self.run / "last.pt")

    @property
    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader((self.run / "summary.csv").open()))

    def step(self, update: int = 0) -> dict[str, Tensor]:
        """What an update subtracted from the parameters."""
        return {name: tensor - self.after[update][name] for name, tensor in self.before[update].items()}

    def on_forward(self, module: nn.Module, images: tuple[Tensor], logits: Tensor) -> None:
        if hasattr(module, "pretrained_cfg"):
            self.model = module if module.training else self.model
            self.forward.append((module.training, images[0].detach().clone(), logits.detach()))

    def before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self.model is None:  # torch's way to make an optimizer's state, before a resumed run restores it
            return
        named = dict(self.model.named_parameters())
        self.lr.append([group["lr"] for group in optimizer.param_groups])
        self.before.append({name: parameter.detach().clone() for name, parameter in named.items()})
        self.gradients.append({name: parameter.grad.clone() for name, parameter in named.items()})

    def after_step(self, *_: object) -> None:
        if self.model is not None:
            self.after.append({name: parameter.detach().clone() for name, parameter in self.model.named_parameters()})


@pytest.fixture
def observe(tiny: Callable[..., DictConfig], tmp_path: Path, monkeypatch) -> Iterator[Callable[..., Observed]]:
    """Trains the stand-in for one update on all images, or as overrides say, and tells what happened."""
    handles = []

    def observe(*overrides: str, run: str | None = None) -> Observed:
        observed = Observed(run=tmp_path / (run or f"run{len(handles)}"))
        for handle in handles:
            handle.remove()
        handles.extend((
            register_module_forward_hook(observed.on_forward),
            register_optimizer_step_pre_hook(observed.before_step),
            register_optimizer_step_post_hook(observed.after_step),
        ))  # fmt: skip
        observed.top1 = train(tiny(*PLAIN, *overrides), observed.run)
        return observed

    monkeypatch.setattr(report, "draw_curves", lambda *_: None)  # a third of the time
    yield observe
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="session")
def pixels() -> Callable[[Path], tuple[Tensor, Tensor]]:
    """All images of class folders, normalised as for the stand-in, (N, 192), and their classes; in float64."""

    def pixels(folder: Path) -> tuple[Tensor, Tensor]:
        paths = sorted(folder.glob("*/*.png"))
        images = np.stack([np.asarray(Image.open(path)) for path in paths])  # N, 8, 8, 3
        normalised = (torch.from_numpy(images).double().permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
        return normalised.flatten(1), torch.tensor([int(path.parent.name) for path in paths])

    return pixels
