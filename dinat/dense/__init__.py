"""Models for dense prediction: detection, instance, semantic and panoptic segmentation on any timm backbone.

    model = dinat.dense.create_model("mask_rcnn_dinat_tiny.coco", pretrained=True)  # a published model
    model = dinat.dense.create_model("mask_rcnn_dinat_tiny", num_classes=10)
    model = dinat.dense.create_model("upernet", backbone="swin_tiny_patch4_window7_224", pretrained_backbone=True)

A method's file, and the libraries it needs, are imported when a model of it is made.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm

import dinat
from dinat import checkpoints
from dinat.errors import CheckpointError, UserError, nearest

from . import folder
from .folder import read_config, save
from .published import PUBLISHED, Published

METHODS = {  # class and file of each
    "mask_rcnn": ("MaskRCNN", "rcnn"),
    "cascade_mask_rcnn": ("CascadeMaskRCNN", "rcnn"),
    "upernet": ("UPerNet", "upernet"),
    "mask2former": ("Mask2Former", "mask2former"),
    "oneformer": ("OneFormer", "mask2former"),
}

LOCAL = "local-dir:"

__all__ = [
    "METHODS",
    "PUBLISHED",
    "Published",
    "create_model",
    "describe",
    "is_dense",
    "list_models",
    "read_config",
    "save",
    "task_of",
    "things_of",
]


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """Names METHOD_BACKBONE with the backbones of this package, those that match `pattern`; others of timm work too.

    With `pretrained`, names METHOD_BACKBONE.DATA of the published models.
    """
    if pretrained:
        return fnmatch.filter(PUBLISHED, pattern)
    families = (dinat.models.nat, dinat.models.dinat_s)
    backbones = [name for family in families for name in timm.list_models(module=family.__name__.rsplit(".")[-1])]
    return fnmatch.filter(sorted(f"{method}_{name}" for method in METHODS for name in backbones), pattern)


def is_dense(name: str) -> bool:
    """Whether `name` is a published model, or local-dir:FOLDER with the folder of a dense model."""
    return name in PUBLISHED or (name.startswith(LOCAL) and folder.is_dense(name.removeprefix(LOCAL)))


def describe(name: str) -> dict[str, Any]:
    """What config.json says, or would say, of a model for which `is_dense` holds; see `save`."""
    return dict(PUBLISHED[name].described) if name in PUBLISHED else folder.read_config(name.removeprefix(LOCAL))


def create_model(
    name: str,
    pretrained: bool | str = False,
    num_classes: int | None = None,
    backbone: str | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
):
    """A `dinat.dense.model.DenseModel`.

    Args:
        name: a published model, METHOD_BACKBONE.DATA of `PUBLISHED`; or METHOD_BACKBONE, or a method of `METHODS`; or
            local-dir:FOLDER for a run folder or another that `save` wrote, with which, of the other arguments, only
            `pretrained` has a meaning.
        pretrained: published weights of the whole model, or the name of another published model whose weights fit;
            `pretrained_backbone=True` is for those of the backbone.
        num_classes: without background; None for those of the published model. Of another number of them, what
            depends on it starts anew, and the log says what that is.
        backbone: any timm model with `features_only`; not beside a name that has one.
        pretrained_cfg_overlay: as timm's, on where the weights are: `file` for one that is here already, in any
            layout, `url`, which may end in #sha256=HEX, or `hf_hub_id`.
        cache_dir: instead of the caches of huggingface_hub and torch.hub.
        kwargs: of the method's class: `backbone_kwargs` (a dict for timm), `pretrained_backbone`, the head's arguments.
            For a published model, those that are given replace or (`backbone_kwargs`) join its own.

    Raises:
        UserError: an unknown name, an argument that the method does not take, a missing package, `pretrained` where
            nothing is published, weights that no source has (see `dinat.checkpoints.download`) or that do not fit.
    """
    if name.startswith(LOCAL):
        return _from_folder(name.removeprefix(LOCAL), pretrained)
    method, in_name, published = _parse(name)
    if in_name and backbone is not None:
        raise UserError(f"backbone={backbone}: the name {name} has a backbone already; use {method} as the name.")
    if isinstance(pretrained, str) and pretrained not in PUBLISHED:
        raise UserError(f"pretrained={pretrained}: no such published model.{nearest(pretrained, PUBLISHED)}")
    if pretrained is True and not published:
        raise UserError(
            f"pretrained=True: no weights of {name} are known.{nearest(name, PUBLISHED)} "
            "pretrained_backbone=True takes those of its backbone."
        )
    cls = _import(method)
    takes = list(inspect.signature(cls).parameters)
    for argument in kwargs.keys() - set(takes):
        raise UserError(
            f"{argument}={kwargs[argument]}: {method} takes no such argument.{nearest(argument, takes)} "
            f"On the command line, model={method} chooses it with arguments of its own."
        )
    given = {"num_classes": num_classes, "backbone": in_name or backbone, **kwargs}
    given = {key: value for key, value in given.items() if value is not None}
    model = cls(**_merge(published, given))
    if published:
        model.preprocessing = PUBLISHED[name].preprocessing
    if pretrained:
        source = PUBLISHED[name if pretrained is True else pretrained]
        try:
            cfg = replace(source.pretrained_cfg, **(pretrained_cfg_overlay or {}))
        except TypeError as error:
            raise UserError(f"pretrained_cfg_overlay={pretrained_cfg_overlay}: {error}") from error
        path = checkpoints.find_weights(cfg, cache_dir)
        state = checkpoints.read_checkpoint(path)
        try:
            model.load_state_dict(checkpoints.fit_dense(state, model, method, len(source.classes)))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
    return model


def _parse(name: str) -> tuple[str, str, dict[str, Any]]:
    """Method, backbone ("" for none) and, for a published model, the arguments of its class."""
    if name in PUBLISHED:
        row = PUBLISHED[name]
        return row.method, row.backbone, row.arguments
    method = max((m for m in METHODS if name == m or name.startswith(f"{m}_")), key=len, default=None)
    backbone, _, tag = name[len(method or "") + 1 :].partition(".")
    if method is None or (tag and timm.is_model(backbone) and f"{backbone}.{tag}" not in _tagged(backbone)):
        known = nearest(name, PUBLISHED) if tag else nearest(name, [*METHODS, *list_models()])
        raise UserError(f"{name}: no such model.{known} Methods: {', '.join(METHODS)}.")
    return method, name[len(method) + 1 :], {}


def _tagged(backbone: str) -> list[str]:
    return timm.list_models(backbone, include_tags=True)


def _merge(published: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a method's class: those of the published model with what is given."""
    if given.get("num_classes", published.get("num_classes")) != published.get("num_classes"):
        published = {key: value for key, value in published.items() if key != "things"}  # of its own classes
    inner = {**published.get("backbone_kwargs", {}), **given.get("backbone_kwargs", {})}
    return published | given | ({"backbone_kwargs": inner} if inner else {})


def task_of(name: str) -> str | None:
    """The task that a published model was trained for; None for other names."""
    return PUBLISHED[name].task if name in PUBLISHED else None


def things_of(name: str) -> list[bool] | None:
    """Which classes have instances, of a model for which `is_dense` holds and whose task is "panoptic"; else None."""
    described = describe(name) if is_dense(name) else {}
    if described.get("task") != "panoptic":
        return None
    return PUBLISHED[name].arguments["things"] if name in PUBLISHED else described["model"]["kwargs"].get("things")


def _from_folder(path: str, pretrained: bool):
    described = folder.read_config(path)
    section = described["model"]
    model = create_model(
        section["name"], num_classes=described["num_classes"], backbone=section["backbone"], task=described["task"],
        **section["kwargs"],
    )  # fmt: skip
    model.preprocessing = described["preprocessing"]
    if pretrained:
        folder.load_weights(model, path)
    return model


def _import(method: str) -> type:
    name, file = METHODS[method]
    try:
        return getattr(importlib.import_module(f"{__name__}.{file}"), name)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("dinat"):
            raise
        raise UserError(f'{method} needs {error.name}, not installed here: pip install "dinat[dense]".') from error
