"""What kind of value a setting must be: another is refused before anything is done, and never taken for what it is not.

`no` is a text to Hydra, and true to Python; a folder named 2024 is a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinat.errors import UserError, nearest


@dataclass(frozen=True)
class Kind:
    """A kind of value: what to call it, and whether a value is of it."""

    words: str
    holds: Callable[[Any], bool]


def whole(least: int) -> Kind:
    return Kind(f"a whole number from {least} on", lambda value: type(value) is int and value >= least)


def number(most: float = math.inf) -> Kind:
    words = "a number from 0 on" if most == math.inf else f"a number from 0 to {most}"
    return Kind(words, lambda value: _is_number(value) and 0 <= value <= most)


def several(of: Callable[[Any], bool], words: str) -> Kind:
    return Kind(words, lambda value: isinstance(value, Sequence) and not isinstance(value, str) and all(map(of, value)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# timm's cosine leaves a part of an epoch out
EPOCHS = Kind(f"{whole(1).words}; scheduler.updates gives other lengths", whole(1).holds)
NUMBERS = several(_is_number, "a list with a number for each channel")
SIDES = several(whole(1).holds, "a list of sides")
SIZE = Kind("pixels, or a list of the sides", lambda value: whole(1).holds(value) or SIDES.holds(value))
WEIGHTS = Kind("true, false, or the name of a model", lambda value: isinstance(value, bool | str))
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
NAMES = several(lambda value: isinstance(value, str), "a list of names, such as [rpb]")
MILESTONES = several(whole(1).holds, "a list of epochs")
STEPS = several(lambda value: True, "a list of steps, or a mapping of arguments")
SECTION = Kind("a mapping, such as {name: value}", lambda value: False)  # `_given` passes mappings over
TEXT = Kind("a text; what looks like a number takes quotes within quotes", lambda value: isinstance(value, str))

# Kind: keys; where one ends in a question mark, null has a meaning.
KINDS = {
    whole(0): "seed runtime.workers",
    whole(1): (
        "batch_size eval_batch_size eval_every checkpoint.every_steps? checkpoint.every_epochs? runtime.grad_accum "
        "runtime.log_every data.num_classes? data.train_samples? data.val_samples? model.num_classes? "
        "scheduler.updates?"
    ),
    EPOCHS: "scheduler.epochs",
    number(): (
        "optimizer.lr optimizer.weight_decay optimizer.clip_grad? optimizer.layer_decay? scheduler.warmup_epochs "
        "scheduler.warmup_updates? scheduler.warmup_lr scheduler.min_lr scheduler.cooldown_epochs"
    ),
    number(most=1): "ema.decay? augment.smoothing model.drop_path_rate? data.crop_pct?",
    SWITCH: (
        "ema.warmup model.reset_head optimizer.decay_listed data.download data.exif_transpose runtime.sync_batchnorm "
        "runtime.grad_checkpointing runtime.channels_last runtime.compile use_ema per_class confusion test.multi_scale "
        "test.flip"
    ),
    TEXT: (
        "name dir resume? checkpoint? model.name model.backbone? model.checkpoint? data.name data.root? "
        "data.train_split data.val_split data.test_split? data.benchmark? data.labels? data.input_key? "
        "data.target_key? runtime.device runtime.dtype table? output?"
    ),
    SIZE: "data.img_size?",
    WEIGHTS: "model.pretrained",
    NUMBERS: "data.mean? data.std?",
    NAMES: "optimizer.no_decay?",
    MILESTONES: "scheduler.decay_milestones",
    SECTION: "model.kwargs? data.kwargs? optimizer.kwargs? optimizer.lr_scale? augment.erasing? augment.mixup?",
    STEPS: "augment.transform? data.eval_transform?",
}
CHOICES = {
    "runtime.parallel": ("ddp", "fsdp"),
    "data.on_bad_image": ("skip", "fail"),
    "data.interpolation?": ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
    "data.crop_mode?": ("center", "squash", "border"),
    "checkpoint.export": ("last", "best"),
    "optimizer.clip_mode": ("norm", "value", "agc"),
}


def check_settings(cfg: DictConfig, null: bool = False) -> None:
    """Raises UserError for a setting of another kind than above; with `null`, null always has a meaning."""
    for kind, keys in KINDS.items():
        for key in keys.split():
            for name, value in _given(cfg, key, null):
                if not kind.holds(value):
                    raise UserError(f"{name}={value}: must be {kind.words}.")
    for key, known in CHOICES.items():
        for name, value in _given(cfg, key, null):
            if value not in known:
                words = f"Known: {', '.join(known)}.{nearest(str(value), known)}"
                raise UserError(f"{name}={value}: no such choice. {words}")


def _given(cfg: DictConfig, key: str, null: bool) -> list[tuple[str, Any]]:
    """The name and value of a setting; none for a section, a null with a meaning, or what this command has not."""
    name = key.rstrip("?")
    *sections, last = name.split(".")
    for section in sections:
        cfg = cfg.get(section) if OmegaConf.is_dict(cfg) else None
    if not OmegaConf.is_dict(cfg) or last not in cfg or OmegaConf.is_dict(cfg[last]):
        return []
    value = cfg[last]
    return [] if value is None and (null or key.endswith("?")) else [(name, value)]
