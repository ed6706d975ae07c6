"""Training: one loop, on one process or many, that can be stopped anywhere and continued exactly."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dinat.data import count_images, reseed
from dinat.data.loaders import Batch
from dinat.distributed import World, gradient_sync, join, parallelize
from dinat.engine import checkpoint, report
from dinat.engine.optim import create_optimizer, create_schedule
from dinat.engine.scoring import measure, report_bad_images
from dinat.engine.settings import check_settings
from dinat.errors import UserError
from dinat.files import write_atomically, write_csv, write_text
from dinat.tasks import Scores, Step, find_task
from dinat.tasks.models import check_fit, to_channels_last, to_dict
from dinat.tasks.task import autocast_dtype

log = report.log

# what may differ when a run is continued without a word about it
INCIDENTAL = (
    "dir",
    "resume",
    "name",
    "logger",
    "checkpoint",
    "eval_batch_size",
    "runtime.workers",
    "runtime.log_every",
)
CURVES_EVERY = 60.0  # seconds: drawing costs more than a short epoch


class Interrupted(Exception):
    """Training was told to stop by a signal, and saved its state first."""

    def __init__(self, signum: int, run_dir: Path, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after {step} updates; saved {run_dir / 'last.pt'}")
        self.signum, self.run_dir = signum, run_dir


def train(cfg: DictConfig, run_dir: str | Path) -> float:
    """Trains, evaluates and exports a model as `configs/train.yaml` describes.

    Args:
        cfg: the composed configuration.
        run_dir: where everything is written; rank 0's counts.

    Returns:
        Top-1 of the exported weights on the validation split, in percent.

    Raises:
        UserError: for a mistake in the configuration or the data, before the first update wherever possible.
        Interrupted: after SIGTERM or Ctrl-C, with the state saved.
    """
    check_settings(cfg)
    with join(cfg.runtime.device) as world:
        run_dir = Path(world.agree(str(run_dir)))
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            with report.logging_to(run_dir, world.primary):
                return Trainer(cfg, run_dir, world).fit()
        except UserError:
            with contextlib.suppress(OSError):
                if [path.name for path in run_dir.iterdir()] == ["train.log"]:  # lines before anything started
                    (run_dir / "train.log").unlink()
                run_dir.rmdir()  # if nothing else was written to it
            raise


class Trainer:
    """The state of a run (model, average, optimizer, position) and what moves it forward."""

    def __init__(self, cfg: DictConfig, run_dir: Path, world: World) -> None:
        self.cfg, self.run_dir, self.world = cfg, run_dir, world
        # What is cheap to check comes first: nothing heavy starts on a mistake.
        dtype = autocast_dtype(cfg.runtime.dtype)
        if cfg.runtime.parallel == "fsdp" and dtype == torch.float16:
            raise UserError("runtime.dtype=float16: not with runtime.parallel=fsdp. Use bfloat16.")
        self.task = find_task(cfg.task)(cfg.data, cfg.model, cfg.runtime, world)
        resume = world.agree(checkpoint.find_resume(cfg.resume, run_dir))
        saved = checkpoint.read_checkpoint(resume) if resume else None
        self.parts, per_process = cfg.runtime.grad_accum, self.batch_per_process()
        self.task.open(seed=cfg.seed, batch_size=per_process)

        reseed(cfg.seed)
        model = self.task.build_model().to(world.device)
        if cfg.runtime.sync_batchnorm:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if cfg.runtime.channels_last:
            model = to_channels_last(model)
        if cfg.runtime.grad_checkpointing:
            if not hasattr(model, "set_grad_checkpointing"):
                raise UserError(f"runtime.grad_checkpointing=true: {cfg.model.name} has none. Set it to false.")
            model.set_grad_checkpointing()
        self.ema = None
        if cfg.ema.decay is not None:
            self.ema = ModelEmaV3(model, decay=cfg.ema.decay, use_warmup=cfg.ema.warmup)
        if cfg.runtime.compile:
            model.compile()
        self.sharded = world.size > 1 and cfg.runtime.parallel == "fsdp"
        if self.ema and self.sharded:
            parallelize(self.ema.module, world, "fsdp", dtype)
        self.model = model
        self.parallel = parallelize(model, world, cfg.runtime.parallel, dtype)
        self.optimizer = create_optimizer(cfg.optimizer, model)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)

        self.train_loader = self.task.train_loader(cfg.augment, batch_size=per_process, parts=self.parts, seed=cfg.seed)
        self.val_loader = self.task.eval_loader(cfg.eval_batch_size)
        self.test_loader = None
        if self.task.test_set is not None:
            self.test_loader = self.task.eval_loader(cfg.eval_batch_size, self.task.test_set)
        self.lockstep = self.sharded and isinstance(self.val_loader.dataset, IterableDataset)
        self.updates = self.train_loader.updates
        self.schedule, epochs = create_schedule(cfg.scheduler, self.optimizer, self.updates)
        self.epochs, self.last_step = math.ceil(epochs), round(epochs * self.updates)

        self.epoch = self.step = 0  # epochs finished, updates done
        self.lr = 0.0  # of the last update
        self.best: float | None = None
        self.history: list[dict[str, Any]] = []
        self.meter = Meter(world)
        if saved:
            self.restore(saved, resume)

    # ---- the loop ----

    def fit(self) -> float:
        """Trains to the end, from wherever the state is; returns the exported weights' headline figure."""
        if self.world.primary:
            self.describe()
        tracker_config = self.cfg.logger if self.world.primary else {"name": None}
        self.tracker = report.Tracker(tracker_config, self.run_dir, to_dict(self.cfg), self.step)
        drawn = -math.inf
        with contextlib.closing(self.tracker), Stop() as self.stop:
            for epoch in range(self.epoch, self.epochs):
                row = self.train_epoch(epoch)
                self.save("last.pt")  # a run killed while it evaluates only has that to do again
                last = epoch + 1 == self.epochs
                if last or (epoch + 1) % self.cfg.eval_every == 0:
                    scores = self.evaluate(f"evaluation {epoch + 1}/{self.epochs}", self.val_loader)
                    row |= {f"val_{name}": scores.figures[name] for name in self.task.labels if name in scores.figures}
                self.finish_epoch(row)
                if self.world.primary and (last or time.monotonic() - drawn > CURVES_EVERY):
                    headline = self.task.headline
                    report.draw_curves(self.run_dir / "curves.png", self.history, headline, self.task.labels[headline])
                    if not self.sharded:  # where one process alone cannot run the model
                        self.task.draw(self.averaged, self.run_dir)
                    drawn = time.monotonic()
                self.stop_if_asked()
        return self.export()

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """The updates of an epoch that are still to do; returns the epoch's row of the summary."""
        started, start = time.perf_counter(), self.step - epoch * self.updates
        end = min(self.updates, self.last_step - epoch * self.updates)
        batches = self.train_loader.batches(epoch, start)
        log_every, save_every = self.cfg.runtime.log_every, self.cfg.checkpoint.every_steps
        self.model.train()
        bar = report.Bar(
            f"epoch {epoch + 1}/{self.epochs}", end, self.cfg.batch_size,
            primary=self.world.primary, every=log_every,
        )  # fmt: skip
        with bar:
            for done in range(start + 1, end + 1):
                self.update(batches)
                note = None
                if done % log_every == 0:
                    means = self.means()
                    note = f"{report.say(means, self.task.labels)}  lr {self.lr:.2e}"
                    self.tracker.log(
                        {f"train/{name}": mean for name, mean in means.items()} | {"lr": self.lr}, self.step
                    )
                bar.advance(done, note)
                if done < end:  # at the end of the epoch, fit() does both
                    self.stop_if_asked(save=True)
                    if save_every and self.step % save_every == 0:
                        self.save("last.pt")
        trained = {f"train_{name}": mean for name, mean in self.means().items()}
        unknown = dict.fromkeys(f"val_{name}" for name in self.task.labels)
        seconds = round(time.perf_counter() - started, 2)
        return {"epoch": epoch + 1, "step": self.step, "lr": self.lr, **trained, **unknown, "seconds": seconds}

    def update(self, batches: Iterator[Batch]) -> None:
        """One step of the optimizer, on `parts` batches."""
        for part in range(self.parts):
            images, targets, problems = next(batches)
            report_bad_images(problems, self.cfg.data.on_bad_image)
            if count_images(targets) < len(targets):
                raise UserError("data: an image without a label, or too many unreadable images in a row.")
            # All that is random from here on (erasing, mixup, dropout, stochastic depth) follows from these numbers.
            reseed(self.cfg.seed, self.world.rank, self.step, part)
            with gradient_sync(self.parallel, part == self.parts - 1):
                step = self.task.step(self.parallel, images, targets)
                self.scaler.scale(step.loss / self.parts).backward()
            self.meter.add(step)
        if self.cfg.optimizer.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), self.cfg.optimizer.clip_grad, self.cfg.optimizer.clip_mode)
        self.lr = max(group["lr"] for group in self.optimizer.param_groups)  # they differ under layer decay
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.schedule.step_update(self.step)
        if self.ema:
            self.ema.update(self.model, step=self.step)

    def finish_epoch(self, row: dict[str, Any]) -> None:
        """Records an epoch and saves what is due: the state, the best one, every N-th."""
        self.epoch += 1
        self.history.append(row)
        self.meter.clear()
        names = ["last.pt"]
        score = row[f"val_{self.task.headline}"]
        if score is not None and (self.best is None or score > self.best):
            self.best = score
            names.append("best.pt")
        if self.cfg.checkpoint.every_epochs and self.epoch % self.cfg.checkpoint.every_epochs == 0:
            names.append(f"epoch_{self.epoch:04d}.pt")
        self.save(*names)
        trained, found = (self.say(row, split) for split in ("train", "val"))
        found = f"validation {found}" if score is not None else ""
        log.info(
            "epoch %d/%d  %s  %s  lr %.2e  %.1f s", self.epoch, self.epochs, trained, found, row["lr"], row["seconds"]
        )
        self.tracker.log({key: value for key, value in row.items() if key.startswith(("val", "epoch"))}, self.step)
        if self.world.primary:
            write_csv(self.run_dir / "summary.csv", self.history)

    def say(self, row: dict[str, Any], split: str) -> str:
        """The figures of a split in a row of the summary, for the log."""
        prefix = f"{split}_"
        figures = {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
        return report.say({name: value for name, value in figures.items() if value is not None}, self.task.labels)

    @property
    def averaged(self) -> torch.nn.Module:
        """The averaged weights if there are any, else the model: what is evaluated and exported."""
        return self.ema.module if self.ema else self.model

    def evaluate(self, label: str, loader: DataLoader) -> Scores:
        """Scores of the averaged weights on the images of a loader."""
        if self.world.size > 1:
            # running statistics are of rank 0, as in what is saved
            for module in dict.fromkeys((self.model, self.averaged)):
                distribute_bn(module, self.world.size)
        total = len(loader) if not isinstance(loader.dataset, IterableDataset) else None
        with report.Bar(label, total, self.cfg.eval_batch_size * self.world.size, primary=self.world.primary) as bar:
            return measure(self.task, self.averaged, loader, lockstep=self.lockstep, tick=bar.advance)

    def means(self) -> dict[str, float]:
        """Loss and other figures of this epoch so far, over all processes. Raises UserError if one is not finite."""
        means = self.meter.means()
        for name, mean in means.items():
            if not math.isfinite(mean):
                self.diverged(f"the {name} became {mean}")
        return means

    def diverged(self, what: str) -> None:
        last = self.run_dir / "last.pt"
        kept = f"The last good checkpoint is {last}." if last.exists() else "No checkpoint had been saved yet."
        raise UserError(
            f"{what} by update {self.step}; training stopped. {kept} "
            f"Try a lower optimizer.lr ({self.cfg.optimizer.lr}), a longer warm-up, or runtime.dtype=bfloat16."
        )

    def stop_if_asked(self, save: bool = False) -> None:
        """Raises Interrupted, having saved the state, if any process has been told to stop."""
        if self.world.any(self.stop.signum is not None):
            if save:
                self.save("last.pt")
            raise Interrupted(self.stop.signum or signal.SIGTERM, self.run_dir, self.step)

    # ---- what is kept ----

    def save(self, *names: str) -> None:
        """Writes the whole state of the run to each of the files, unless its weights have become useless."""
        meter = self.meter.state()
        state: dict[str, Any] = {}
        if self.world.primary or self.sharded:
            state = {
                "arch": self.cfg.model.name,
                "num_classes": self.task.num_classes,
                "classes": self.task.classes,
                "config": to_dict(self.cfg),
                "state_dict": checkpoint.model_state(self.model),
                "state_dict_ema": checkpoint.model_state(self.ema.module) if self.ema else None,
                "optimizer": checkpoint.optimizer_state(self.model, self.optimizer),
                "scaler": self.scaler.state_dict(),
                "epoch": self.epoch,
                "step": self.step,
                "updates": self.updates,
                "lr": self.lr,
                "best": self.best,
                "history": self.history,
                "meter": meter,
            }
        weights = state["state_dict"].values() if self.world.primary else ()
        if self.world.any(not all(tensor.isfinite().all() for tensor in weights)):
            self.diverged("a weight became infinite or NaN")
        if self.world.primary:
            for name in names:
                write_atomically(self.run_dir / name, partial(torch.save, state))

    def restore(self, saved: dict[str, Any], path: Path) -> None:
        """Takes over the state of a checkpoint, and says in which settings this run differs from that one."""
        if saved["arch"] != self.cfg.model.name:
            raise UserError(
                f"resume={path} is of {saved['arch']}, model.name={self.cfg.model.name}. Use the same model."
            )
        check_fit(self.model, saved["state_dict"], f"resume={path}")
        if bool(saved["state_dict_ema"]) != bool(self.ema):
            raise UserError(f"resume={path} was trained {'with' if not self.ema else 'without'} ema.decay. Keep that.")
        if saved["updates"] != self.updates:
            raise UserError(
                f"resume={path}: an epoch had {saved['updates']} updates and now has {self.updates}. "
                "Keep the data and batch_size, or start anew from the weights with model.checkpoint."
            )
        checkpoint.restore_model(self.model, saved["state_dict"])
        if self.ema:
            checkpoint.restore_model(self.ema.module, saved["state_dict_ema"])
        checkpoint.restore_optimizer(self.model, self.optimizer, saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.epoch, self.step, self.lr = saved["epoch"], saved["step"], saved["lr"]
        self.best, self.history = saved["best"], saved["history"]
        self.schedule.step_update(self.step)
        self.meter.restore(saved["meter"])
        for key, old, new in config_differences(saved["config"], to_dict(self.cfg)):
            log.warning("resume: %s was %s and is now %s; the run will not be what it would have been", key, old, new)
        log.info("continuing %s after %d updates, in epoch %d/%d", path, self.step, self.epoch + 1, self.epochs)

    def export(self) -> float:
        """Writes the final weights as a model folder; returns their headline figure (%).

        They are evaluated on the test split, if there is one: here alone, so that it has no part in any choice.
        """
        best, column = self.cfg.checkpoint.export == "best", f"val_{self.task.headline}"
        weights = checkpoint.model_state(self.averaged)
        row = self.history[-1]
        if best:
            row = max((row for row in self.history if row[column] is not None), key=lambda row: row[column])
        if best and (self.world.primary or self.test_loader is not None):
            saved = checkpoint.read_checkpoint(self.run_dir / "best.pt")
            weights = saved["state_dict_ema"] or saved["state_dict"]
        if self.world.primary:
            self.task.export(weights, self.run_dir)
            write_text(self.run_dir / "README.md", str(report.card(self.run_dir, self.cfg, self.task, row)))
        log.info(
            "%s weights, epoch %d: %s on the validation split; %s",
            self.cfg.checkpoint.export, row["epoch"], self.say(row, "val"), self.run_dir / "model.safetensors",
        )  # fmt: skip
        if self.test_loader is not None:
            if best:
                checkpoint.restore_model(self.averaged, weights)
            self.test()
        return row[column]

    def test(self) -> None:
        """Evaluates the test split, and writes test.csv."""
        scores = self.evaluate("test", self.test_loader)
        log.info("test split, %d images: %s", scores.count, report.say(scores.figures, self.task.labels))
        if self.world.primary:
            row = self.task.results_row(self.averaged, scores.figures)
            write_csv(self.run_dir / "test.csv", [row | {"count": scores.count, "skipped": scores.skipped}])

    def describe(self) -> None:
        """Writes down what this run is: its configuration and its surroundings."""
        environment = report.describe_environment(report.argv(), str(self.world.device), self.world.size)
        write_text(self.run_dir / "config.yaml", OmegaConf.to_yaml(self.cfg, resolve=True))
        write_text(self.run_dir / "environment.json", json.dumps(environment, indent=2) + "\n")
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        log.info(
            "%s, %.2f M parameters, %d classes, input %s, %d updates (%d per epoch) of %d images on %d x %s; %s",
            self.cfg.model.name, parameters / 1e6, self.task.num_classes, self.task.describe_input(),
            self.last_step, self.updates, self.cfg.batch_size, self.world.size, self.world.device, self.run_dir,
        )  # fmt: skip

    def batch_per_process(self) -> int:
        """Images per forward pass: `batch_size` counts those of an update, over all processes and parts."""
        total, shares = self.cfg.batch_size, self.cfg.runtime.grad_accum * self.world.size
        if total % shares:
            raise UserError(
                f"batch_size={total}: not a multiple of {self.world.size} processes x runtime.grad_accum="
                f"{self.cfg.runtime.grad_accum}. batch_size counts the images of one update, over all of them."
            )
        return total // shares


class Meter:
    """Sums over the images of an epoch, of this process: the loss, and the other figures that a task's steps give."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.dtype = torch.float32 if world.device.type == "mps" else torch.float64  # MPS has no float64
        self.sums: dict[str, Tensor] = {}

    def add(self, step: Step) -> None:
        sums = {"images": step.loss.new_tensor(step.images), "loss": step.loss.detach() * step.images, **step.sums}
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value.to(self.dtype)

    def state(self) -> dict[str, float]:
        """The sums over all processes, which have the same names."""
        if not self.sums:
            return {}
        return dict(zip(self.sums, self.world.sum(torch.stack(list(self.sums.values()))).tolist(), strict=True))

    def restore(self, state: dict[str, float]) -> None:
        """Continues from such sums, which one process takes over: they are added up again in the end."""
        share = float(self.world.primary)
        options = {"dtype": self.dtype, "device": self.world.device}
        self.sums = {name: torch.tensor(share * value, **options) for name, value in state.items()}

    def means(self) -> dict[str, float]:
        """Means over the images of all processes."""
        sums = self.state()
        images = sums.pop("images")
        return {name: value / images for name, value in sums.items()}

    def clear(self) -> None:
        self.sums = {}


class Stop:
    """Within, SIGTERM and Ctrl-C are noted in `signum` for the loop to see; a second Ctrl-C acts at once."""

    def __enter__(self) -> Stop:
        self.signum: int | None = None
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def note(self, signum: int, _: FrameType | None) -> None:
        if self.signum == signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum


def config_differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Settings that differ between two configurations and bear on the result, as (key, old, new)."""
    for name in sorted(old.keys() | new.keys()):
        key, before, after = f"{prefix}{name}", old.get(name), new.get(name)
        if key in INCIDENTAL or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            yield from config_differences(before, after, f"{key}.")
        else:
            yield key, before, after
