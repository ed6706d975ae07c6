"""What is done to an image: timm's transforms on the host, normalisation and mixing on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform, resolve_data_config
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from dinat.data import volumes
from dinat.data.images import MODES
from dinat.errors import UserError

PREPROCESSING = ("interpolation", "crop_pct", "crop_mode")
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}  # by rank


def resolve_preprocessing(
    data: Mapping[str, Any], model: nn.Module, img_size: int | None = None, in_chans: int | None = None
) -> dict[str, Any]:
    """timm's data config: `input_size` (C, H, W) or (C, D, H, W), mean, std, interpolation, crop_pct, crop_mode.

    The model's own `pretrained_cfg`, overridden by what `data` sets. `img_size` and `in_chans` are what the model was
    built for, where it is not its native one. Grey images have the mean over the colours as mean and std.

    Raises:
        UserError: for channels that no image has, or a mean or std that has neither one value nor one per channel.
    """
    channels = in_chans or model.pretrained_cfg["input_size"][0]
    if channels not in MODES:
        raise UserError(f"model.kwargs.in_chans={channels}: images have 1 channel (grey) or 3 (RGB).")
    config = resolve_data_config({key: data[key] for key in PREPROCESSING if data.get(key) is not None}, model=model)
    rank = getattr(model, "rank", 2)
    sides = config["input_size"][1:] if rank == 2 else model.img_size
    if size := data.get("img_size") or img_size:
        sides = (size,) * rank if isinstance(size, int) else tuple(size)
    if len(sides) != rank:
        raise UserError(f"data.img_size={list(sides)}: give one number, or {rank} for {type(model).__name__}.")
    config["input_size"] = (channels, *sides)
    for key in ("mean", "std"):
        values = tuple(data.get(key) or config[key])
        if len(values) not in (1, 3):
            raise UserError(f"data.{key}={list(values)}: give one value, or one per channel of RGB.")
        config[key] = values if len(values) == channels else (sum(values) / len(values),) * channels
    return config


def train_transform(preprocessing: Mapping[str, Any], options: Mapping[str, Any]) -> Callable:
    """PIL image -> uint8 `(C, H, W)` with timm's training augmentation; `options` are arguments of create_transform.

    For volumes, array -> uint8 `(C, D, H, W)` with the options of `volumes.train_transform`.
    """
    if not isinstance(options, Mapping):
        raise UserError(
            f"augment.transform={options}: a list of steps is for dense prediction, a mapping such as {{hflip: 0}} is "
            "for classification. Choose another augment=NAME."
        )
    if len(preprocessing["input_size"]) == 4:
        return volumes.train_transform(preprocessing["input_size"], options)
    try:
        transform = create_transform(
            preprocessing["input_size"], is_training=True, use_prefetcher=True, mean=preprocessing["mean"], **options
        )
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"augment.transform={dict(options)}: timm's create_transform refuses it: {error}") from error
    for operation in (op for step in transform.transforms for op in getattr(step, "ops", ())):  # RandAugment's
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize
    return transform


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's operation, but black for the 0 bits that it asks for at the highest magnitude: Pillow 13 refuses that."""
    return ImageOps.posterize(image, min(bits, 8)) if bits > 0 else Image.new(image.mode, image.size)


def eval_transform(preprocessing: Mapping[str, Any]) -> Callable:
    """PIL image -> uint8 `(C, H, W)`: resize and centre crop. Volume -> uint8 `(C, D, H, W)`, resized."""
    if len(preprocessing["input_size"]) == 4:
        return partial(volumes.resize, size=preprocessing["input_size"])
    return create_transform(**preprocessing, use_prefetcher=True)


class Normalize(nn.Module):
    """uint8 `(B, C, *sides)` of any device -> float32 on this one, normalised, in the wanted memory format."""

    def __init__(self, preprocessing: Mapping[str, Any], device: torch.device, channels_last: bool = False) -> None:
        super().__init__()
        self.device, self.channels_last = device, channels_last
        for name in ("mean", "std"):
            value = torch.tensor(preprocessing[name], device=device).mul(255)
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        rank = images.ndim - 2
        order = CHANNELS_LAST[rank] if self.channels_last else torch.contiguous_format
        mean, std = (value.view(-1, *[1] * rank) for value in (self.mean, self.std))
        return images.to(self.device, non_blocking=True).to(torch.float32, memory_format=order).sub_(mean).div_(std)


class Augment(nn.Module):
    """The part of the augmentation that works on a batch: random erasing, then mixup or cutmix.

    Args:
        augment: the `augment` section of the configuration.
        num_classes: of the targets, which mixing turns from `(B,)` indices to `(B, num_classes)` probabilities.
    """

    def __init__(self, augment: Mapping[str, Any], num_classes: int, device: torch.device) -> None:
        super().__init__()
        erasing, mixup = augment["erasing"], augment["mixup"]
        self.erase = None
        if erasing["prob"]:
            self.erase = RandomErasing(erasing["prob"], mode=erasing["mode"], max_count=erasing["count"], device=device)
        self.mixup = None
        if mixup["mixup_alpha"] or mixup["cutmix_alpha"]:
            self.mixup = Mixup(**mixup, label_smoothing=augment["smoothing"], num_classes=num_classes)
        # mixed targets are smoothed already
        self.smoothing = 0.0 if self.mixup else augment["smoothing"]

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.erase is not None:
            images = self.erase(images)
        return self.mixup(images, targets) if self.mixup else (images, targets)
