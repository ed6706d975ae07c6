"""Optimizer and learning-rate schedule, from timm's factories."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from dinat.engine.models import to_dict
from dinat.errors import UserError, nearest


def create_optimizer(optimizer: Mapping[str, Any], model: nn.Module) -> Optimizer:
    """timm's `create_optimizer_v2` with the `optimizer` section of the configuration.

    One-dimensional parameters (norms, biases, layer scale) are never decayed. What the model itself lists in
    `no_weight_decay()` is spared too, unless `optimizer.decay_listed` asks otherwise.

    Raises:
        UserError: for an optimizer that timm does not have, or arguments that it does not take.
    """
    name = optimizer["opt"]
    if name not in list_optimizers():
        raise UserError(f"optimizer.opt={name}: no such optimizer.{nearest(name, list_optimizers())}")
    spared = set() if optimizer["decay_listed"] else getattr(model, "no_weight_decay", set)()
    group = partial(param_groups_weight_decay, no_weight_decay_list=spared)
    if optimizer["layer_decay"] is not None:
        group = partial(param_groups_layer_decay, no_weight_decay_list=spared, layer_decay=optimizer["layer_decay"])
    decay, kwargs = optimizer["weight_decay"], to_dict(optimizer["kwargs"])
    try:
        return create_optimizer_v2(
            model, name, lr=optimizer["lr"], param_group_fn=partial(group, weight_decay=decay), **kwargs
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.opt={name} with optimizer.kwargs={kwargs}: {error}") from error


def create_schedule(
    scheduler: Mapping[str, Any], optimizer: Optimizer, updates_per_epoch: int
) -> tuple[Scheduler, int]:
    """timm's `create_scheduler_v2`, stepped by updates, and the number of epochs with its cooldown.

    The learning rate is a function of the number of updates done: `schedule.step_update(step)` sets it for the next.
    """
    options = to_dict(scheduler)
    try:
        schedule, epochs = create_scheduler_v2(
            optimizer,
            num_epochs=options.pop("epochs"),
            updates_per_epoch=updates_per_epoch,
            step_on_epochs=False,
            **options,
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"scheduler={to_dict(scheduler)}: timm's create_scheduler_v2 refuses it: {error}") from error
    if schedule is None:
        raise UserError(
            f"scheduler.sched={scheduler['sched']}: no schedule. Use cosine, poly, tanh, step or multistep."
        )
    schedule.step_update(0)
    return schedule, epochs
