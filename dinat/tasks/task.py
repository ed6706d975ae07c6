"""What the engine asks of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinat.data.loaders import TrainLoader
from dinat.distributed import World
from dinat.errors import UserError, nearest


@dataclass(frozen=True)
class Step:
    """What a forward pass in training gives.

    `loss` is the mean over `images`, to be differentiated; `sums` are other figures of the training set, summed over
    the images: their means over an epoch stand in the summary beside the loss.
    """

    loss: Tensor
    images: int
    sums: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """What weights tell about the run that they come from; empty for a file of bare weights.

    `model` is a `model` section that builds the architecture, `classes` the class names in index order, `config` the
    run's whole configuration.
    """

    weights: Path | None = None
    model: dict[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    classes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    task: str | None = None


class Metric(Protocol):
    """Figures of predictions, gathered batch by batch and over processes."""

    def update(self, predictions: Any, targets: Any) -> None: ...

    def compute(self, world: World) -> dict[str, float]: ...

    def per_class(self, world: World) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Scores:
    """What an evaluation found, over all processes.

    `figures` are in percent, but for losses; unreadable images are in `skipped` and nowhere else. Where asked for,
    `per_class` is a table of the classes, and `confusion[i, j]` how often class i was predicted as class j.
    """

    figures: dict[str, float]
    count: int
    skipped: int
    per_class: list[dict[str, Any]] | None = None
    confusion: Tensor | None = None


class Task(ABC):
    """A kind of training: which data, which model, what is lost and what is scored.

    For training it is opened (data sets found, classes known), builds the model, and then makes loaders for it;
    for evaluation, the same with `open_validation` and `load_model`.

    Attributes:
        name: as in `task=NAME`.
        headline: the figure that runs are ranked by; higher is better.
        labels: the figures of an evaluation in the order of the tables, and what people call them.
        hub_task: what the Hugging Face hub calls it.
        test_set: the split that is evaluated once, after training, where `data.test_split` names one.
        averages: whether predictions of an image at several scales, or of its windows, can be averaged; `averaged`:
            whether they are.
        eval_batch_size: images per process in evaluation, where nothing else tells.
        classes: names of the classes in index order, once opened; may be empty where the data has none.
        num_classes: their number.
        share: what a loader has to know of the processes.

    Args:
        data, model, runtime: sections of the configuration.
        world: the processes.
        test: of an evaluation, its section of that name.

    Raises:
        UserError: for what is wrong in these sections.
    """

    name: ClassVar[str]
    headline: str
    labels: dict[str, str]
    hub_task: ClassVar[str]
    averages: ClassVar[bool] = False
    eval_batch_size: ClassVar[int] = 256
    classes: list[str]
    num_classes: int
    test_set: Dataset | None = None

    def __init__(
        self, data: Mapping[str, Any], model: Mapping[str, Any], runtime: Mapping[str, Any], world: World,
        test: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.data, self.model, self.runtime, self.world = data, model, runtime, world
        self.test = test or {"multi_scale": False, "window": None}
        self.averaged = bool(self.test["multi_scale"] or self.test["window"])
        if self.averaged and not self.averages:
            key = "multi_scale" if self.test["multi_scale"] else "window"
            raise UserError(f"test.{key}={self.test[key]}: not with task={self.name}, only with task=semantic.")
        dtype = autocast_dtype(runtime["dtype"])
        self.autocast = partial(torch.autocast, world.device.type, dtype, enabled=dtype != torch.float32)
        self.share = {"rank": world.rank, "ranks": world.size, "workers": runtime["workers"]}
        self.share["pin_memory"] = world.device.type == "cuda"

    def agree_on_classes(self, in_data: int | None) -> int:
        """Classes of the data, on which the data itself, `data.num_classes` and `model.num_classes` must agree."""
        found = {
            "the data set": in_data,
            "data.num_classes": self.data["num_classes"],
            "model.num_classes": self.model["num_classes"],
        }
        known = {source: count for source, count in found.items() if count is not None}
        if not known:
            raise UserError(f"data.num_classes is not set, and data.name={self.data['name']} does not tell. Set it.")
        if len(set(known.values())) > 1:
            listed = ", ".join(f"{source} {count}" for source, count in known.items())
            raise UserError(f"class counts differ: {listed}. Leave data.num_classes and model.num_classes at null.")
        return next(iter(known.values()))

    @abstractmethod
    def open(self, *, seed: int, batch_size: int) -> None:
        """Opens all splits for training; `batch_size` is per process and forward pass."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The model for the data that was opened, with the initial weights that its section asks for."""

    @abstractmethod
    def open_validation(self, origin: Origin) -> None:
        """Opens the validation split alone, labelled as the weights were trained."""

    @abstractmethod
    def load_model(self, origin: Origin, use_ema: bool) -> nn.Module:
        """The model with the weights to evaluate: the origin's, or else those that its section asks for."""

    @abstractmethod
    def train_loader(self, augment: Mapping[str, Any], *, batch_size: int, parts: int, seed: int) -> TrainLoader:
        """The training batches, `parts` to an update, augmented; what works on whole batches is left to `step`."""

    @abstractmethod
    def eval_loader(self, batch_size: int, source: Dataset | None = None) -> DataLoader:
        """Every image of the validation split, or of `source`, once over all processes."""

    @abstractmethod
    def step(self, model: nn.Module, images: Any, targets: Any) -> Step:
        """The forward pass of a training batch, as the loader gave it."""

    @abstractmethod
    def score(self, metric: Metric, model: nn.Module, images: Any, targets: Any) -> None:
        """Adds a validation batch, as the loader gave it, to the metric."""

    @abstractmethod
    def metric(self, confusion: bool = False) -> Metric:
        """An empty metric, with a confusion matrix where asked for."""

    @abstractmethod
    def describe_input(self) -> str:
        """The size of the images, for the log."""

    @abstractmethod
    def results_row(self, model: nn.Module, figures: Mapping[str, float]) -> dict[str, Any]:
        """The row of results.csv, rounded."""

    @abstractmethod
    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Writes a model folder, from which the model with these weights can be made anywhere."""

    def published(self, model: nn.Module) -> float | None:
        """The authors' figure for what is being evaluated, where there is one."""
        return None

    def check_details(self, *, per_class: bool, confusion: bool) -> None:
        """Raises UserError for details that there cannot be; where there can, the metric has a `confusion_matrix`."""
        if confusion:
            raise UserError(f"confusion=true: not with task={self.name}. Leave it out.")

    def draw(self, model: nn.Module, folder: Path) -> None:  # noqa: B027 - most tasks have nothing to draw
        """Writes predictions.png, where predictions are something to look at."""


def autocast_dtype(name: str) -> torch.dtype:
    """The torch dtype of `runtime.dtype`. Raises UserError for any but float32, bfloat16, float16."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise UserError(
            f"runtime.dtype={name}: no such precision. Known: {', '.join(known)}.{nearest(str(name), known)}"
        )
    return known[name]
