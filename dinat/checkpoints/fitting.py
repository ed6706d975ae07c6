"""Making weights fit a model, or saying why they do not."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from dinat.checkpoints.layouts import HEADS, STEM, backbone_prefix, method_of, rename_heads, to_native
from dinat.checkpoints.reading import unwrap
from dinat.errors import CheckpointError

log = logging.getLogger("dinat")


def resize_rpb(rpb: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Resize a bias table (heads, 2k-1, 2k-1) to another window by bicubic interpolation, as the 11x11 weights were.

    That of a volume, (heads, 2k-1, 2k-1, 2k-1), first within its slices, and then along the depth.
    """
    size = tuple(2 * k - 1 for k in kernel_size)
    if tuple(rpb.shape[1:]) == size:
        return rpb
    bicubic = partial(F.interpolate, mode="bicubic", align_corners=False)
    if len(size) == 2:
        return bicubic(rpb[None].float(), size=size)[0].to(rpb.dtype)
    depth, *slices = size
    resized = bicubic(rpb.float(), size=slices)  # the depth in the place of the channels
    flat = math.prod(slices)
    return bicubic(resized.flatten(2)[None], size=(depth, flat))[0].unflatten(2, slices).to(rpb.dtype)


def fit(checkpoint: Mapping[str, Tensor], model: nn.Module, inflation: str | None = None) -> dict[str, Tensor]:
    """Weights of any known layout as a state dict for `model`; the classifier and the image's channels as they are.

    Bias tables of another window are resized. Norms that the publisher's classifiers or detection models do not have
    keep the values they have in `model`. The classifier and the first convolution are timm's to adapt.

    Args:
        inflation: see `inflate`, by which weights of a model of maps come to fit one of volumes.

    Raises:
        CheckpointError: the checkpoint is of another architecture.
    """
    state, own = to_native(checkpoint), model.state_dict()
    if inflation is not None:
        state = {key: inflate(value, own[key], inflation) if key in own else value for key, value in state.items()}
    for key, value in state.items():
        if key in own and key.endswith(".rpb"):
            state[key] = resize_rpb(value, [(side + 1) // 2 for side in own[key].shape[1:]])
    optional = r"norm\d+\." if "norm.weight" in state else r"norm\d*\."  # backbones have no final norm
    state |= {key: value for key, value in own.items() if key not in state and re.match(optional, key)}
    adapted = {"head.fc.weight", "head.fc.bias"}
    for stem in {"patch_embed.proj.weight", "patch_embed.proj.0.weight"} & state.keys() & own.keys():
        if own[stem].select(1, 0).shape == state[stem].select(1, 0).shape:
            adapted.add(stem)
    check_fit(own, state, f"the checkpoint is of another architecture than this {type(model).__name__}", adapted)
    return state


def inflate(weight: Tensor, like: Tensor, mode: str) -> Tensor:
    """A weight of a model of maps for one of volumes, where it lacks the depth (I3D, Carreira & Zisserman 2017).

    A volume that repeats one image along its depth then gives the image's features: everywhere for "centre", away from
    the first and last slices for "mean", where convolutions meet the padding. A convolution of another number of
    channels sums them up and spreads the sum, by which grey images give what they gave.

    Args:
        weight: a convolution (out, in, *sides), a bias table (heads, *sides), or anything else, which stays.
        like: the weight to fit.
        mode: "centre": a convolution is the given one in its middle slice, and 0 in the others. "mean": it is the given
            one in all slices, divided by their number. Bias tables are the same for all depths either way.
    """
    if like.ndim == 5 and weight.shape[1] != like.shape[1]:
        weight = weight.sum(1, keepdim=True).expand(-1, like.shape[1], *weight.shape[2:]) / like.shape[1]
    if weight.ndim != like.ndim - 1:
        return weight
    if like.ndim == 4:
        return weight[:, None].repeat(1, like.shape[1], 1, 1)
    depth = like.shape[2]
    if mode == "mean":
        return weight[:, :, None].repeat(1, 1, depth, 1, 1) / depth
    return F.pad(weight[:, :, None], (0, 0, 0, 0, depth // 2, depth // 2))


def fit_dense(
    checkpoint: Mapping[str, Tensor],
    model: nn.Module,
    method: str,
    classes: int | None = None,
    reset_head: bool = False,
) -> dict[str, Tensor]:
    """Weights of a dense model in any known layout as a state dict for `model`, of which every key is used.

    Parts that only training needs may be left out of the model: their weights are then too. OneFormer's text encoder
    may be left out of the checkpoint: it starts anew then. The log says either.

    Args:
        checkpoint: with a backbone of the NAT family; with any, under the names of `model`.
        model: a model of `dinat.dense`.
        method: its method, as in `layouts.HEADS`.
        classes: of the checkpoint, where the model has others: what depends on their number is then the model's, and
            the log says what that is.
        reset_head: whether that is the model's whatever classes the checkpoint has.

    Raises:
        CheckpointError: the checkpoint is of another model; the message says in what it differs.
    """
    state, own, head = unwrap(checkpoint), model.state_dict(), HEADS[method]
    out = dict(state) if state.keys() == own.keys() else _own_names(state, own, method)
    left_out = [key for key in out.keys() - own.keys() if re.match(f"{head.optional}|{head.of_training}", key)]
    out = {key: value for key, value in out.items() if key not in left_out}
    out |= {key: own[key] for key in head.constants if key not in out and key in own}
    found = len(out.get(head.classifier, own[head.classifier])) - len(own[head.classifier]) + model.num_classes
    if not reset_head and found != (expected := classes or model.num_classes):
        raise CheckpointError(f"the checkpoint has {found} classes, not {expected}.")
    renewed = reset_head or found != model.num_classes
    anew = [key for key in own if re.match(head.per_class, key)] if renewed else []
    begun = any(re.match(head.of_training, key) for key in out)
    lacking = [] if begun else [key for key in own if re.match(head.of_training, key)]
    out |= {key: own[key] for key in (*anew, *lacking)}
    check_fit(own, out, f"the checkpoint is of another architecture than this {type(model).__name__}")
    if left_out:
        log.warning("%d tensors are of parts that the model was made without: %s ...", len(left_out), min(left_out))
    if lacking:
        log.warning("%d tensors that the checkpoint lacks start anew: %s ...", len(lacking), min(lacking))
    if anew:
        log.warning("%d classes instead of %d: %s start anew", model.num_classes, found, ", ".join(anew))
    return out


def _own_names(state: Mapping[str, Tensor], own: Mapping[str, Tensor], method: str) -> dict[str, Tensor]:
    """Weights of a dense model of this method under the names of the state dict `own`."""
    prefix = backbone_prefix(state)
    around = {key: value for key, value in state.items() if not key.startswith(prefix)}
    if (other := method_of(around)) != method:
        holds = f"is of the method {other}" if other else "holds no head of a dense model that is known"
        raise CheckpointError(f"the checkpoint {holds}, the model is of the method {method}.")
    here = next((key[: match.start()] for key in own if (match := STEM.search(key))), "")
    backbone = {here + key: value for key, value in to_native(state).items()}
    return rename_heads(around, HEADS[method].rows) | backbone


def check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str, ignore: Collection[str] = ()) -> None:
    """Raises CheckpointError, beginning with `what`, unless `state` has the names and shapes of the state dict `own`.

    Args:
        ignore: keys that need not fit.
    """
    missing, unexpected = own.keys() - state.keys() - {*ignore}, state.keys() - own.keys() - {*ignore}
    reshaped = {name for name in own.keys() & state.keys() - {*ignore} if own[name].shape != state[name].shape}
    if not (missing or unexpected or reshaped):
        return
    examples = "; ".join(
        [f"lacks {name}" for name in sorted(missing)[:2]]
        + [f"has {name}" for name in sorted(unexpected)[:2]]
        + [f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}" for name in sorted(reshaped)[:2]]
    )
    total = len(missing) + len(unexpected) + len(reshaped)
    hint = _hint(missing, unexpected) if missing or unexpected else _window_hint(own, state, reshaped)
    raise CheckpointError(f"{what}: {total} entries differ ({examples}).{hint}")


def _hint(missing: Collection[str], unexpected: Collection[str]) -> str:
    """What is likely wrong, where the names tell."""
    if missing and all(re.search(r"\.ls[12]\.gamma$", key) for key in missing):
        return " The model has layer scale (ls_init_value), the checkpoint has not."
    if unexpected and all(re.search(r"\.ls[12]\.gamma$", key) for key in unexpected):
        return " The checkpoint has layer scale, the model has not (ls_init_value=None)."
    if unexpected and all(re.match(r"norm\d", key) for key in unexpected):
        return " The checkpoint is of a detection or segmentation backbone: create the model with stage_norm=True."
    return ""


def _window_hint(own: Mapping[str, Tensor], state: Mapping[str, Tensor], reshaped: Collection[str]) -> str:
    """The windows, where bias tables are all that has another shape."""
    if not all(name.endswith(".rpb") for name in reshaped):
        return ""
    there, here = ((weights[min(reshaped)].shape[-1] + 1) // 2 for weights in (state, own))
    return f" The window is {there} in the checkpoint, {here} in the model (kernel_size)."
