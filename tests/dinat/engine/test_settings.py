"""Settings of the wrong kind: refused by name, before anything is made."""

from functools import reduce
from operator import getitem

import pytest
from omegaconf import OmegaConf

from dinat.cli import flatten
from dinat.engine import evaluate
from dinat.engine.settings import CHOICES, KINDS, check_settings
from dinat.errors import UserError

KEYS = {key.rstrip("?") for keys in KINDS.values() for key in keys.split()} | {key.rstrip("?") for key in CHOICES}
ELSEWHERE = {"scheduler.decay_rate"}  # checked where it is used


@pytest.fixture(scope="module")
def config(compose):
    """Both commands' configurations."""
    return {"train": compose("scheduler=multistep"), "eval": compose(config="eval")}


def changed(config, key, value):
    config = OmegaConf.create(OmegaConf.to_container(config))
    OmegaConf.update(config, key, value)
    return config


def test_the_defaults_are_of_their_kinds(config):
    check_settings(config["train"])
    check_settings(config["eval"], null=True)


def test_every_switch_and_number_is_checked(config):
    for cfg in config.values():
        plain = OmegaConf.to_container(cfg)
        for key in flatten(plain):
            value = reduce(getitem, key.split("."), plain)
            free = ".kwargs." in key or key.startswith(("augment.erasing.", "augment.mixup.", "augment.transform."))
            assert free or not isinstance(value, bool | int | float) or key in KEYS | ELSEWHERE, key


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 0, "batch_size=0: must be a whole number from 1 on."),
        ("batch_size", 1.5, "batch_size=1.5: must be a whole number from 1 on."),
        ("eval_batch_size", True, "eval_batch_size=True: must be a whole number from 1 on."),
        ("eval_every", 0, "eval_every=0: must be a whole number"),
        ("seed", -1, "seed=-1: must be a whole number from 0 on."),
        ("seed", None, "seed=None: must be a whole number from 0 on."),
        ("checkpoint.every_steps", -1, "checkpoint.every_steps=-1: must be a whole number from 1 on."),
        ("runtime.log_every", 0, "runtime.log_every=0: must"),
        ("runtime.grad_accum", 0, "runtime.grad_accum=0: must"),
        ("runtime.workers", -1, "runtime.workers=-1: must"),
        ("runtime.compile", "no", "runtime.compile=no: must be true or false."),
        ("ema.decay", 2, "ema.decay=2: must be a number from 0 to 1."),
        ("optimizer.lr", "fast", "optimizer.lr=fast: must be a number from 0 on."),
        ("optimizer.lr", None, "optimizer.lr=None: must be a number"),
        ("optimizer.lr", float("nan"), "optimizer.lr=nan: must be a number"),
        ("optimizer.lr", float("inf"), "optimizer.lr=inf: must be a number"),
        ("optimizer.clip_mode", "nrm", "optimizer.clip_mode=nrm: no such choice. Known: norm, value, agc. Did you"),
        ("data.interpolation", "cubic", "data.interpolation=cubic: no such choice. Known: nearest, bilinear, bicubic"),
        ("data.img_size", 0, "data.img_size=0: must be pixels, or a list of the sides."),
        ("data.img_size", "abc", "data.img_size=abc: must be pixels"),
        ("optimizer.no_decay", "rpb", "optimizer.no_decay=rpb: must be a list of names, such as [rpb]."),
        ("scheduler.decay_milestones", ["a"], "scheduler.decay_milestones=['a']: must be a list of epochs."),
        ("data.mean", 0.5, "data.mean=0.5: must be a list with a number for each channel."),
        ("data.root", 2024, "data.root=2024: must be a text; what looks like a number takes quotes within quotes."),
        ("data.train_split", None, "data.train_split=None: must be a text"),
        ("model.name", None, "model.name=None: must be a text"),
        ("model.pretrained", 5, "model.pretrained=5: must be true, false, or the name of a model."),
        ("runtime.device", 0, "runtime.device=0: must be a text"),
        ("model.kwargs", 5, "model.kwargs=5: must be a mapping, such as {name: value}."),
        ("augment.transform", "flip", "augment.transform=flip: must be a list of steps, or a mapping of arguments."),
    ],
)
def test_another_kind_is_refused(config, key, value, message):
    with pytest.raises(UserError) as error:
        check_settings(changed(config["train"], key, value))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("key", ["ema.decay", "optimizer.clip_grad", "data.img_size", "data.crop_mode", "model.kwargs"])
def test_null_where_it_has_a_meaning(config, key):
    check_settings(changed(config["train"], key, None))


def test_evaluation_checks_its_own(evaluation):
    for override, message in (("checkpoint=5", "checkpoint=5: must be a text"), ("batch_size=0", "batch_size=0: must")):
        with pytest.raises(UserError, match=message):
            evaluate(evaluation("data=digits", override))
