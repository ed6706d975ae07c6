"""timm's models: built from the configuration, weights loaded with every mismatch named, written as a folder."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import tempfile
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import OmegaConf
from timm.models import get_pretrained_cfg, save_for_hf
from torch import Tensor, nn

from dinat import checkpoints, dense
from dinat.errors import CheckpointError, UserError, nearest
from dinat.files import telling_full_disk, write_atomically

log = logging.getLogger("dinat")

SEVERAL = "several_labels"  # in config.json: whether an image may have several of the classes

# what says where weights lie and how they are read, of a timm pretrained_cfg
WEIGHT_SOURCE = ("url", "file", "hf_hub_id", "hf_hub_filename", "custom_load", "num_classes", "classifier")


def check_model_name(name: str, key: str = "model.name") -> None:
    """Raises UserError for a name that timm does not know, with the nearest names."""
    if name.startswith(tuple(dense.METHODS)):
        near = nearest(name, dense.PUBLISHED) if "." in name else ""
        raise UserError(f"{key}={name}: is for dense prediction: task=detection, semantic or panoptic.{near}")
    if ":" not in name and not timm.is_model(name):
        known = timm.list_models()
        raise UserError(f"{key}={name}: no such model.{nearest(name, known)} timm.list_models('dinat_*') lists ours.")


def build_model(model: Mapping[str, Any], num_classes: int) -> nn.Module:
    """`timm.create_model` with the `model` section of the configuration, and the initial weights it asks for.

    Args:
        model: name, pretrained, checkpoint, reset_head, drop_path_rate, kwargs.
        num_classes: of the data, hence of the head.

    Raises:
        UserError: for an unknown name, an argument that the model does not take, or weights that do not fit.
    """
    name, pretrained = model["name"], model["pretrained"]
    check_model_name(name)
    overlay = None
    if isinstance(pretrained, str):  # another model's weights
        check_model_name(pretrained, "model.pretrained")
        try:
            source = get_pretrained_cfg(pretrained)
        except RuntimeError as error:
            raise UserError(f"model.pretrained={pretrained}: {error} timm.list_pretrained() lists what is.") from error
        overlay = {field: getattr(source, field) for field in WEIGHT_SOURCE}
    try:
        network = timm.create_model(
            name,
            pretrained=bool(pretrained),
            pretrained_cfg_overlay=overlay,
            num_classes=num_classes,
            drop_path_rate=model["drop_path_rate"],
            **to_dict(model["kwargs"]),
        )
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        arguments = to_dict(model["kwargs"])
        raise UserError(f"model.name={name} with model.kwargs={arguments} cannot be built: {error}") from error
    if model["checkpoint"]:
        load_weights(network, model["checkpoint"], reset_head=model["reset_head"], key="model.checkpoint")
    return network


def to_channels_last(model: nn.Module) -> nn.Module:
    """The model with its weights in the memory format of images, or volumes, whose channels come last."""
    if getattr(model, "rank", 2) == 3:  # not by Module.to, which takes bias tables of four axes for images
        return nn.utils.convert_conv3d_weight_memory_format(model, torch.channels_last_3d)
    return model.to(memory_format=torch.channels_last)


def refusal(model: nn.Module, images: Tensor) -> str | None:
    """Why a model cannot take images of this shape, in its own words; None where it can.

    Found out by a forward pass in evaluation mode, which changes nothing and draws nothing.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model.forward(images)  # not called: hooks are for images of the data
    except Exception as error:  # models raise what they please
        lines = [frame.line for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
        return " ".join(str(error).split()).rstrip(".") or lines[-1]  # of an assertion without words, its condition
    finally:
        model.train(training)
    return None


def load_weights(
    model: nn.Module, path: str | Path, *, reset_head: bool = False, use_ema: bool = True, key: str = "checkpoint"
) -> None:
    """Loads weights from a file into `model`, all of them or, with `reset_head`, all but the classifier's.

    Reads what `dinat.checkpoints.read_checkpoint` reads, and the run folders of this package; other layouts go through
    the model file's `checkpoint_filter_fn`.

    Args:
        use_ema: prefer the averaged weights where a checkpoint has both.
        key: the configuration key that messages name.

    Raises:
        UserError: for a missing or unreadable file, another architecture, or another number of classes.
    """
    path = find_weights(path, key)
    state = read_weights(path, use_ema, key)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    own = model.state_dict()
    if convert and _axes(state) != _axes(own):
        try:
            state = convert(state, model)
        except CheckpointError as error:
            raise UserError(f"{key}={path}: {error}") from error
    if reset_head:
        head = _classifier_keys(model)
        state = {name: tensor for name, tensor in state.items() if name not in head}
        state |= {name: own[name] for name in head & own.keys()}
    check_fit(model, state, f"{key}={path}")
    model.load_state_dict(state)


def load_dense_weights(
    model: nn.Module, path: str | Path, *, reset_head: bool = False, use_ema: bool = True, key: str = "model.checkpoint"
) -> None:
    """Loads weights into a model of `dinat.dense`: all or, with `reset_head`, all but what depends on the classes.

    Of models with a backbone of this package, published files too, in every layout.

    With `reset_head`, a model of another method or task, a classifier too, gives its backbone. Norms of its feature
    maps, which classifiers do not have, start anew then, and the log says so.

    Raises:
        UserError: for a missing or unreadable file, or another model or backbone.
    """
    path = find_weights(path, key)
    state = read_weights(path, use_ema, key)
    if not reset_head:
        what = f"{key}={path} is of another model than this {type(model).__name__}"
        what += " (model.reset_head=true takes what does not depend on it)" if key == "model.checkpoint" else ""
        if state.keys() != model.state_dict().keys() and _native(state):
            try:
                state = checkpoints.fit_dense(state, model, model.method)
            except CheckpointError as error:
                raise UserError(f"{what}: {error}") from error
        checkpoints.check_fit(model.state_dict(), state, what)
        model.load_state_dict(state)
        return
    with contextlib.suppress(CheckpointError):  # of another method or architecture
        model.load_state_dict(checkpoints.fit_dense(state, model, model.method, reset_head=True))
        return
    own = model.backbone.state_dict()
    found = max((_backbone_part(weights, own) for weights in (state, _native(state))), key=len)
    lacking = own.keys() - found.keys()
    if not found or any("norm" not in name.rsplit(".", 2)[-2] for name in lacking):
        checkpoints.check_fit(own, found, f"{key}={path} is of another backbone than {type(model).__name__}'s")
    model.backbone.load_state_dict(found, strict=False)
    new = f"; {', '.join(sorted(lacking))} and the head start anew" if lacking else "; the head starts anew"
    log.info("%s: %d tensors of the backbone%s", path, len(found), new)


def _native(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of this package in a file of any layout, under its own names; {} for others."""
    try:
        native = checkpoints.to_native(state)
        checkpoints.Shape.of(native)
    except CheckpointError:
        return {}
    return native


def _backbone_part(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state` that are `own`'s, wherever the backbone lies in it: names agree from the end."""
    best: dict[str, Tensor] = {}
    for depth in range(max(name.count(".") for name in own)):  # names around the timm model, "features.model.model."
        inner = {name: name.split(".", depth)[-1] for name in own if name.count(".") >= depth}
        first = next(iter(inner.values()))
        for prefix in {name.removesuffix(first) for name in state if name == first or name.endswith(f".{first}")}:
            found = {name: state[prefix + part] for name, part in inner.items() if prefix + part in state}
            best = max(best, {name: x for name, x in found.items() if x.shape == own[name].shape}, key=len)
    return best


def read_weights(path: Path, use_ema: bool, key: str) -> dict[str, Tensor]:
    """The tensors of a weights file; messages begin with `key`, the setting that named it."""
    try:
        return checkpoints.read_checkpoint(path, use_ema)
    except CheckpointError as error:
        raise UserError(f"{key}={error}") from error


def find_weights(path: str | Path, key: str) -> Path:
    """The weights file that `path` means: itself, or the exported model or last checkpoint of a run folder."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{key}={path}: no such file or folder.")
    if path.is_file():
        return path
    for name in ("model.safetensors", "last.pt"):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{key}={path}: the folder holds neither model.safetensors nor last.pt.")


def _axes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """How many axes each tensor has: other names are of another layout, other numbers of a model of images."""
    return {name: tensor.ndim for name, tensor in state.items()}


def _classifier_keys(model: nn.Module) -> set[str]:
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return {f"{n}.{part}" for n in ([names] if isinstance(names, str) else names) for part in ("weight", "bias")}


def check_fit(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Raises UserError, beginning with `what`, unless `state` has the names and shapes of the model's state dict."""
    own, head = model.state_dict(), _classifier_keys(model)
    reshaped = {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}
    if own.keys() == state.keys() and reshaped and reshaped <= head:
        name = max(reshaped, key=lambda key: own[key].ndim)
        raise UserError(
            f"{what} has {len(state[name])} classes, the data has {len(own[name])}. "
            "Set model.reset_head=true to start with a new head, or use the data that the head was trained on."
        )
    checkpoints.check_fit(own, state, f"{what} is of another architecture than this {type(model).__name__}")


def to_dict(section: Any) -> dict[str, Any]:
    """A plain dict of a configuration section; {} for null."""
    return OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else dict(section or {})


def export(
    model: nn.Module, folder: Path, preprocessing: Mapping[str, Any], arguments: Mapping[str, Any], labels: list[str],
    several: bool = False,
) -> None:  # fmt: skip
    """Writes model.safetensors and config.json, for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Args:
        model: on the CPU; its `pretrained_cfg` takes over `preprocessing`.
        arguments: of the model's constructor, beyond the number of classes.
        labels: class names in index order; may be empty.
        several: whether an image may have several of them: outputs are logits of each then.
    """
    channels, *sides = preprocessing["input_size"]
    described = {**preprocessing, "input_size": (channels, *sides[-2:])}  # timm has no depth
    model.pretrained_cfg = {**model.pretrained_cfg, **described, "num_classes": model.num_classes}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export") as temporary, telling_full_disk(folder / "model"):
        save_for_hf(
            model,
            temporary,
            model_config={**({"label_names": labels} if labels else {}), SEVERAL: several},
            model_args=dict(arguments) or None,
            safe_serialization=True,
        )
        for name in ("model.safetensors", "config.json"):
            # copied, not moved: safetensors makes files that only their owner can read
            write_atomically(folder / name, partial(shutil.copyfile, Path(temporary) / name))
