"""Optimizer and learning-rate schedule, from timm's factories."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from dinat.errors import UserError, nearest
from dinat.tasks.models import to_dict


def create_optimizer(optimizer: Mapping[str, Any], model: nn.Module) -> Optimizer:
    """timm's `create_optimizer_v2` with the `optimizer` section of the configuration.

    One-dimensional parameters (norms, biases, layer scale) are not decayed. What the model itself lists in
    `no_weight_decay()` is spared too, unless `optimizer.decay_listed` asks otherwise. `optimizer.no_decay` replaces
    both rules: parameters with one of these parts in their name, and no others, are spared. To a parameter's name
    belong here the class of its module (`LayerNorm`) and, in the backbone of a dense model, "backbone".

    Raises:
        UserError: for an optimizer that timm does not have, arguments that it does not take, or a part of a name
            that no parameter has.
    """
    name = optimizer["opt"]
    if name not in list_optimizers():
        raise UserError(f"optimizer.opt={name}: no such optimizer.{nearest(name, list_optimizers())}")
    kwargs = to_dict(optimizer["kwargs"])
    try:
        return create_optimizer_v2(
            model, name, lr=optimizer["lr"], param_group_fn=partial(parameter_groups, optimizer), **kwargs
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.opt={name} with optimizer.kwargs={kwargs}: {error}") from error


def parameter_groups(optimizer: Mapping[str, Any], model: nn.Module) -> list[dict[str, Any]]:
    """The trained parameters of a model, grouped by weight decay and by factor of the learning rate (`lr_scale`).

    Raises:
        UserError: for an entry of `optimizer.no_decay` or `optimizer.lr_scale` that no parameter answers to.
    """
    decay, scales, no_decay = optimizer["weight_decay"], to_dict(optimizer["lr_scale"]), optimizer["no_decay"]
    spared = set() if optimizer["decay_listed"] else getattr(model, "no_weight_decay", set)()
    if optimizer["layer_decay"] is None:
        groups = param_groups_weight_decay(model, decay, no_weight_decay_list=spared)
    else:
        groups = param_groups_layer_decay(
            model, decay, no_weight_decay_list=spared, layer_decay=optimizer["layer_decay"]
        )
    names = full_names(model)
    for key, parts in (("no_decay", no_decay or ()), ("lr_scale", scales)):
        for part in parts:
            if not any(part in name for name in names.values()):
                raise UserError(f"optimizer.{key}: no parameter of {type(model).__name__} has {part} in its name.")
    if no_decay is None and not scales:
        return groups
    regrouped: dict[tuple[float, float], list[nn.Parameter]] = {}
    for group in groups:
        for parameter in group["params"]:
            name = names[parameter]
            scale = math.prod(
                (factor for part, factor in scales.items() if part in name), start=group.get("lr_scale", 1.0)
            )
            own = group["weight_decay"] if no_decay is None else decay * all(part not in name for part in no_decay)
            regrouped.setdefault((own, scale), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": own, "lr_scale": scale} for (own, scale), parameters in regrouped.items()
    ]


def full_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """What the parts in `optimizer.no_decay` and `optimizer.lr_scale` are looked for in: name, class of the module, and
    whether it is of the backbone."""
    of_backbone = set(model.backbone.parameters()) if isinstance(getattr(model, "backbone", None), nn.Module) else set()
    names = {}
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        names[parameter] = f"{name} {type(owner).__name__}{' backbone' if parameter in of_backbone else ''}"
    return names


def create_schedule(
    scheduler: Mapping[str, Any], optimizer: Optimizer, updates_per_epoch: int
) -> tuple[Scheduler, float]:
    """timm's `create_scheduler_v2`, stepped by updates, and the number of epochs with its cooldown.

    The learning rate is a function of the number of updates done: `schedule.step_update(step)` sets it for the next.
    `scheduler.updates` gives the length in updates instead of epochs (and decay_epochs, decay_milestones and
    cooldown_epochs are in updates then); the number of epochs need not be whole. `scheduler.warmup_updates` does the
    same for the warm-up alone.
    """
    options = to_dict(scheduler)
    epochs, updates = options.pop("epochs"), options.pop("updates", None)
    unit = updates_per_epoch if updates is None else 1  # what timm takes for an epoch, in updates
    warmup = options.pop("warmup_epochs") * updates_per_epoch
    if (in_updates := options.pop("warmup_updates", None)) is not None:
        warmup = in_updates
    try:
        schedule, length = create_scheduler_v2(
            optimizer,
            num_epochs=epochs if updates is None else updates,
            warmup_epochs=warmup / unit,
            updates_per_epoch=unit,
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
    return schedule, length * unit / updates_per_epoch
