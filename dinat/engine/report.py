"""What a person sees of a run: log lines, progress bars, tables, curves, and the optional trackers."""

from __future__ import annotations

import contextlib
import csv
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import WeakFileLock
from matplotlib.figure import Figure
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from dinat.card import model_card
from dinat.errors import UserError
from dinat.files import write_atomically, write_csv
from dinat.tasks import Task

log = logging.getLogger("dinat")
console = Console(stderr=True)  # stdout is for results


@contextlib.contextmanager
def logging_to(run_dir: Path | None, primary: bool) -> Iterator[None]:
    """Within, the package logs to the terminal and to `run_dir`/train.log; off rank 0, only warnings."""
    if console.is_terminal:
        terminal: logging.Handler = RichHandler(console=console, show_path=False, show_level=False)
    else:
        terminal = logging.StreamHandler()
        terminal.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handlers = [terminal]
    if primary and run_dir:
        handlers.append(logging.FileHandler(run_dir / "train.log", delay=True))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for handler in handlers:
        log.addHandler(handler)
    log.setLevel(logging.INFO if primary else logging.WARNING)
    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


class Bar:
    """A progress bar with images per second and time left; without a terminal, a line now and then if `every` is set.

    Args:
        label: what is going on, e.g. "epoch 3/30".
        total: steps, if known.
        images: per step.
        every: steps between the log lines that stand in for the bar; 0 for none.
    """

    def __init__(self, label: str, total: int | None, images: int, *, primary: bool, every: int = 0) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (primary and console.is_terminal),
        )
        self.task = self.progress.add_task(label, total=total, note="", speed="")
        self.label, self.total, self.images, self.every = label, total, images, every
        self.note = ""

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self, completed: int, note: str | None = None) -> None:
        """Sets the number of steps done, and what to say beside it."""
        self.note = note or self.note
        task = self.progress.tasks[self.task]
        self.progress.update(self.task, completed=completed, note=self.note, speed=self.speed)
        if self.progress.disable and self.every and completed % self.every == 0:
            left = f"{task.time_remaining:.0f} s left" if task.time_remaining is not None else ""
            log.info("%s  %d/%s  %s  %s  %s", self.label, completed, self.total, self.note, self.speed, left)

    @property
    def speed(self) -> str:
        """Images per second, over the last thousand steps at most; nothing until there are two."""
        steps = self.progress.tasks[self.task].speed
        return f"{steps * self.images:.0f} img/s" if steps else ""


def card(run_dir: Path, cfg: Mapping[str, Any], task: Task, row: Mapping[str, Any]) -> ModelCard:
    """The model card of what a run exported, whose figures are a row of its summary."""
    figures = {name: row[f"val_{name}"] for name in task.labels if row[f"val_{name}"] is not None}
    training = {
        "epochs": row["epoch"],
        "updates": row["step"],
        "images in an update": cfg["batch_size"],
        "optimizer": cfg["optimizer"]["opt"],
        "learning rate": cfg["optimizer"]["lr"],
        "seed": cfg["seed"],
    }
    root = cfg["data"]["root"]  # its last part is what people call a folder of theirs; the rest is nobody's business
    data = ": ".join([cfg["data"]["name"], *([Path(root).name] if root else [])])
    return model_card(run_dir, task.hub_task, data, figures, task.labels, training)


def describe_environment(argv: Sequence[str], device: str, world_size: int) -> dict[str, Any]:
    """What one needs to know to repeat a run: versions, git revision, machine, command line."""
    packages = ("torch", "timm", "triton", "numpy", "torchvision")
    return {
        "argv": list(argv),
        "dinat": metadata.version("dinat"),
        "git": _git_revision(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "platform": platform.platform(),
        "device": device,
        "world_size": world_size,
        "cpu_count": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Of the checkout that the code runs from; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    return None


def add_row(path: Path, row: Mapping[str, Any], headline: str) -> None:
    """Adds an evaluation to a table that several processes may write to, in place of an earlier one of the same.

    The table is sorted by data, and then by the column `headline`, best first.

    Raises:
        UserError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {name: "" if value is None else str(value) for name, value in row.items()}
    with WeakFileLock(path.with_name(f".{path.name}.lock")):
        columns, rows = _read_table(path) if path.exists() else ([], [])
        if columns and set(columns) != row.keys():
            raise UserError(f"table={path}: has other columns, {', '.join(columns)}. Give another file.")
        same = [name for name in ("data", "model", "img_size", "crop_pct") if name in row]
        kept = [other for other in rows if any(other[name] != row[name] for name in same)]
        write_csv(path, sorted([*kept, row], key=lambda r: (r["data"], -float(r[headline]))))


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or ()), list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"table={path}: no table: {error}. Give another file.") from error


def say(figures: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """Figures as people read them: losses as they are, everything else in percent."""
    return "  ".join(
        f"{labels.get(name, name)} {value:.4f}" if "loss" in name else f"{labels.get(name, name)} {value:.2f} %"
        for name, value in figures.items()
    )


def draw_curves(path: Path, history: Sequence[Mapping[str, Any]], headline: str, label: str) -> None:
    """Losses, the headline figure and the learning rate over epochs, as a picture."""
    columns = list(history[0])
    panels = {
        "loss": [name for name in columns if "loss" in name],
        f"{label} (%)": [name for name in (f"train_{headline}", f"val_{headline}") if name in columns],
        "learning rate": ["lr"],
    }
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in names:
            points = [(row["epoch"], row[name]) for row in history if row[name] is not None]
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 50 else None)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def draw_confusion(path: Path, matrix: Tensor, names: Sequence[str]) -> None:
    """The confusion matrix, each row divided by its class's images, as a picture."""
    shares = (matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    side = min(20, max(5, 0.35 * len(shares)))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if len(shares) <= 50:  # more labels than that overlap
        axes.set_xticks(range(len(shares)), names, rotation=90)
        axes.set_yticks(range(len(shares)), names)
    if len(shares) <= 20:
        for row, images in enumerate(matrix.tolist()):
            for column, count in enumerate(images):
                shade = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, count, ha="center", va="center", color=shade, fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


class Tracker:
    """TensorBoard or Weights & Biases, or nothing: `log({name: number}, step)`.

    Args:
        logger: the `logger` section of the configuration.
        config: the whole configuration, for W&B to show.
        step: at which a resumed run starts; what TensorBoard has from later steps is superseded.

    Raises:
        UserError: for an unknown tracker, or one whose package is not installed.
    """

    def __init__(self, logger: Mapping[str, Any], run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        name = logger["name"]
        self.writer = self.run = None
        try:
            if name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
            elif name == "wandb":
                import wandb

                options = {key: value for key, value in logger.items() if key != "name"}
                self.run = wandb.init(dir=str(run_dir), config=dict(config), id=run_dir.name, resume="allow", **options)
            elif name is not None:
                raise UserError(f"logger.name={name}: no such tracker. Known: tensorboard, wandb.")
        except ImportError as error:
            raise UserError(f"logger={name}: {error}. Install it with pip install 'dinat[loggers]'.") from error

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        values = {key: value for key, value in values.items() if value is not None}
        if self.run:
            self.run.log(values, step=step)
        if self.writer:
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        if self.run:
            self.run.finish()
        if self.writer:
            self.writer.close()


def argv() -> list[str]:
    """The command line of this process."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
