"""Transforms for dense prediction: what is done to an image and to the boxes, masks and maps that belong to it.

A transform is a list of steps, each a mapping of one name to its arguments:

    - resize: {shortest: [480, 512, 544], longest: 1333}
    - crop: {size: 512, max_class_share: 0.75}
    - flip: {p: 0.5}
    - photometric: {}
    - pad: {size: 512, fill: 128}
    - one_of: [[resize: {shortest: 800}], [resize: {shortest: 400}, crop: {range: [384, 600]}]]

Everything is drawn from PyTorch's global generator. Images stay uint8; padding to a common size is the model's part,
`pad` is for data that was padded to more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from dinat.errors import UserError, nearest

Target = dict[str, Any]
Transform = Callable[[tv_tensors.Image, Target], tuple[tv_tensors.Image, Target]]

PER_OBJECT = ("boxes", "labels", "masks", "iscrowd", "segment_ids")
IGNORED = 255  # of semantic maps
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of a test at several sizes
CROPS = 10  # drawn in search of one that keeps to `max_class_share`
RESAMPLE = ("pil", "bilinear")
ROUNDING = {"round": 0.5, "floor": 0.0}


class Resize:
    """Resizes, keeping the ratio of the sides, until the shorter is `shortest` or the longer `longest`.

    Large-scale jitter to 1024 pixels is `shortest=1024, longest=1024, scale=[0.1, 2]` and then a crop of 1024.

    Args:
        shortest: pixels; one of several is drawn (multi-scale).
        longest: pixels that the longer side must not exceed.
        scale: range of a factor that is drawn for both.
        resample: "pil" (antialiased; what detectron2 did) or "bilinear" (no antialias; what OpenCV and mm* did).
        rounding: of the new sides: "round" (mm*, detectron2) or "floor" (torchvision).
    """

    def __init__(
        self, shortest: int | Sequence[int], longest: int | None = None, scale: Sequence[float] = (1.0, 1.0),
        resample: str = "pil", rounding: str = "round",
    ) -> None:  # fmt: skip
        self.shortest = [shortest] if isinstance(shortest, int) else list(shortest)
        self.longest, self.scale, self.resample = longest, tuple(scale), resample
        for name, value, known in (("resample", resample, RESAMPLE), ("rounding", rounding, tuple(ROUNDING))):
            if value not in known:
                raise ValueError(f"{name}={value}: not known. Known: {', '.join(known)}.")
        if min(self.shortest, default=0) < 1 or (longest is not None and longest < 1) or not 0 < scale[0] <= scale[1]:
            raise ValueError(
                f"shortest={shortest}, longest={longest}, scale={list(scale)}: give sizes and factors above 0."
            )
        self.rounding = ROUNDING[rounding]

    @property
    def random(self) -> bool:
        """Whether anything is drawn."""
        return len(self.shortest) > 1 or self.scale[0] < self.scale[1]

    def __call__(self, image: tv_tensors.Image, target: Target) -> tuple[tv_tensors.Image, Target]:
        size = self.size(*image.shape[-2:])
        return self.resize(image, size), _map(lambda part: _resize_part(part, size), target)

    def size(self, height: int, width: int) -> list[int]:
        """The new (height, width); draws what there is to draw."""
        shortest = (
            self.shortest[int(torch.randint(len(self.shortest), ()))] if len(self.shortest) > 1 else self.shortest[0]
        )
        factor = float(torch.empty(()).uniform_(*self.scale)) if self.random else self.scale[0]
        ratio = shortest * factor / min(height, width)
        if self.longest is not None:
            ratio = min(ratio, self.longest * factor / max(height, width))
        return [max(1, int(side * ratio + self.rounding)) for side in (height, width)]

    def resize(self, image: tv_tensors.Image, size: list[int]) -> tv_tensors.Image:
        """`image` in the size (height, width), by the chosen method."""
        if list(image.shape[-2:]) == size:
            return image
        if self.resample == "bilinear":
            return F.resize(image, size, antialias=False)
        pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
        return tv_tensors.Image(torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous())


class Crop:
    """Cuts a rectangle out, at a random place; a side shorter than that stays as it is.

    Args:
        size: pixels, one number or (height, width).
        range: instead, the range that each side is drawn from ("absolute_range" of mm* and detectron2).
        max_class_share: of the pixels of a semantic map: crops are drawn until no class has more, at most ten times.
    """

    def __init__(
        self, size: int | Sequence[int] | None = None, range: Sequence[int] | None = None, max_class_share: float = 1.0
    ) -> None:  # fmt: skip
        if (size is None) == (range is None):
            raise ValueError(f"size={size}, range={range}: give one of the two.")
        height, width = (size, size) if isinstance(size, int) else size or (None, None)
        self.sides = (tuple(range), tuple(range)) if range is not None else ((height, height), (width, width))
        self.max_class_share = max_class_share
        if not all(0 < least <= most for least, most in self.sides) or not 0 < max_class_share <= 1:
            raise ValueError(f"size={size}, range={range}, max_class_share={max_class_share}: out of range.")

    def __call__(self, image: tv_tensors.Image, target: Target) -> tuple[tv_tensors.Image, Target]:
        if self.max_class_share < 1 and "semantic" not in target:
            raise ValueError(f"crop: max_class_share={self.max_class_share} needs a semantic map; set it to 1.")
        size = [
            int(torch.randint(min(least, side), min(most, side) + 1, ()))
            for side, (least, most) in zip(image.shape[-2:], self.sides, strict=True)
        ]
        for _ in range(CROPS):
            corner = [
                int(torch.randint(side - length + 1, ())) for side, length in zip(image.shape[-2:], size, strict=True)
            ]
            if self.max_class_share == 1 or self._mixed(F.crop(target["semantic"], *corner, *size)):
                break
        return F.crop(image, *corner, *size), _map(lambda part: F.crop(part, *corner, *size), target)

    def _mixed(self, labels: Tensor) -> bool:
        counts = torch.bincount(labels.flatten().long(), minlength=IGNORED + 1)
        counts[IGNORED] = 0
        return bool(counts.max() <= self.max_class_share * counts.sum()) and int((counts > 0).sum()) > 1


class Pad:
    """Fills a smaller image up on the right and at the bottom; semantic maps with 255, all else with 0.

    Args:
        size: pixels, one number or (height, width).
        fill: what images are filled with, a grey level or a colour (red, green, blue). Where padding came after the
            normalisation, with 0, it is the mean colour.
    """

    def __init__(self, size: int | Sequence[int], fill: int | Sequence[int] = 0) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.fill = fill if isinstance(fill, int) else list(fill)
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size={size}: give one or two numbers above 0.")

    def __call__(self, image: tv_tensors.Image, target: Target) -> tuple[tv_tensors.Image, Target]:
        rows, columns = (max(0, side - own) for side, own in zip(self.size, image.shape[-2:], strict=True))
        padding = [0, 0, columns, rows]
        return F.pad(image, padding, fill=self.fill), {
            key: F.pad(part, padding, fill=IGNORED if key == "semantic" else 0)
            if isinstance(part, tv_tensors.TVTensor)
            else part
            for key, part in target.items()
        }


def flip(p: float = 0.5) -> Transform:
    """Mirrors left and right with probability `p`."""
    return v2.RandomHorizontalFlip(p)


def photometric(
    brightness: float = 0.125, contrast: float = 0.5, saturation: float = 0.5, hue: float = 0.1, p: float = 0.5
) -> Transform:  # fmt: skip
    """SSD's distortion as in mmsegmentation and Mask2Former, each part with probability `p`; colours are not permuted.

    Brightness is a factor in 1 +- `brightness`, where the originals add up to 32 of 255; `hue` is in turns.
    """
    parts = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
    jitter = {name: v2.RandomApply([v2.ColorJitter(**{name: strength})], p) for name, strength in parts.items()}
    orders = ("brightness contrast saturation hue", "brightness saturation hue contrast")
    return v2.RandomChoice([v2.Compose([jitter[name] for name in order.split()]) for order in orders])


def one_of(*branches: Sequence[Mapping[str, Any]]) -> Transform:
    """One of several lists of steps, drawn evenly."""
    return v2.RandomChoice([v2.Compose(_steps(branch)) for branch in branches])


STEPS: dict[str, Callable[..., Transform]] = {
    "resize": Resize, "crop": Crop, "pad": Pad, "flip": flip, "photometric": photometric, "one_of": one_of,
}  # fmt: skip


def dense_train_transform(steps: Sequence[Mapping[str, Any]]) -> Transform:
    """(image, target) -> the same after the steps of a list as above.

    Boxes are clamped to the image, and objects of which nothing is left (no pixel of the mask or of the map of
    segments, or a side of the box below one pixel) are removed from every entry; `area` is what is left, `size` the
    original (height, width).

    Raises:
        UserError: for a step that is not known, or arguments that it does not take.
    """
    built = _steps(steps)

    def transform(image: tv_tensors.Image, target: Target) -> tuple[tv_tensors.Image, Target]:
        target = {**target, "size": tuple(image.shape[-2:])}
        for step in built:
            image, target = step(image, target)
        return image, _without_emptied(target) if built else target

    return transform


def dense_eval_transform(steps: Sequence[Mapping[str, Any]]) -> Transform:
    """(image, target) -> the resized image; the target stays in the original image's frame, where it is scored.

    Raises:
        UserError: as above, and for a step that is random or not a resize.
    """
    built = _steps(steps)
    for step, resize in zip(steps, built, strict=True):
        if not isinstance(resize, Resize) or resize.random:
            raise UserError(f"evaluation: {dict(step)} would be random. Use resize with one size.")

    def transform(image: tv_tensors.Image, target: Target) -> tuple[tv_tensors.Image, Target]:
        target = {**target, "size": tuple(image.shape[-2:])}
        for step in built:
            image = step.resize(image, step.size(*image.shape[-2:]))
        return image, target

    return transform


def dense_views_transform(
    views: Sequence[Sequence[Mapping[str, Any]]],
) -> Callable[[tv_tensors.Image, Target], tuple[list[tv_tensors.Image], Target]]:
    """(image, target) -> a list with the image as each of `views`, lists of steps for evaluation, and the target."""
    transforms = [dense_eval_transform(steps) for steps in views]

    def transform(image: tv_tensors.Image, target: Target) -> tuple[list[tv_tensors.Image], Target]:
        seen, (target, *_) = zip(*(transform(image, target) for transform in transforms), strict=True)
        return list(seen), target

    return transform


def views_of(preprocessing: Mapping[str, Any], scales: Sequence[float] | None = None) -> list[list[Mapping[str, Any]]]:
    """The steps for each view of a test at several scales: the model's own, or those of its `transform` at `scales`."""
    own = preprocessing.get("views")
    return own if own and scales is None else scaled_steps(preprocessing["transform"], scales or SCALES)


def scaled_steps(steps: Sequence[Mapping[str, Any]], scales: Sequence[float]) -> list[list[Mapping[str, Any]]]:
    """Steps for evaluation at several scales, as in mmsegmentation: both limits of their resize times each of `scales`.

    Raises:
        UserError: where there is not one resize.
    """
    if len(steps) != 1 or set(steps[0]) != {"resize"} or min(scales, default=0) <= 0:
        raise UserError(
            f"test.scales={list(scales)} of the steps {list(steps)}: give factors above 0, and one resize to scale, "
            "such as data.eval_transform=[{resize: {shortest: 512, longest: 2048}}]."
        )
    limits = {key: value for key, value in steps[0]["resize"].items() if key in ("shortest", "longest") and value}
    return [
        [{"resize": {**steps[0]["resize"], **{key: int(value * scale) for key, value in limits.items()}}}]
        for scale in scales
    ]


def _steps(steps: Sequence[Mapping[str, Any]]) -> list[Transform]:
    built = []
    for step in steps:
        if not isinstance(step, Mapping) or len(step) != 1:
            raise UserError(f"augmentation: {step} is not a step. Write one as `- flip: {{p: 0.5}}`.")
        ((name, arguments),) = step.items()
        if name not in STEPS:
            raise UserError(f"augmentation: no step {name}. Known: {', '.join(STEPS)}.{nearest(str(name), STEPS)}")
        named, listed = isinstance(arguments, Mapping), isinstance(arguments, list | None)
        if not (named or listed):
            raise UserError(f"augmentation: {name}: {arguments}: arguments have names, as in `- flip: {{p: 0.5}}`.")
        try:
            built.append(STEPS[name](**arguments) if named else STEPS[name](*(arguments or ())))
        except (TypeError, ValueError) as error:
            raise UserError(f"augmentation: {name}: {arguments}: {error}") from error
    return built


def _map(function: Callable[[Tensor], Tensor], target: Target) -> Target:
    """`function` applied to what has a place in the image."""
    return {key: function(part) if isinstance(part, tv_tensors.TVTensor) else part for key, part in target.items()}


def _resize_part(part: tv_tensors.TVTensor, size: list[int]) -> tv_tensors.TVTensor:
    """What belongs to an image in another size; masks as bytes, since torchvision makes a float of every bool."""
    if part.dtype != torch.bool:
        return F.resize(part, size)
    return tv_tensors.wrap(F.resize(tv_tensors.Mask(part.byte()), size).bool(), like=part)


def _without_emptied(target: Target) -> Target:
    if "labels" not in target:
        return target
    target, keep = dict(target), torch.ones(len(target["labels"]), dtype=torch.bool)
    if "boxes" in target:
        target["boxes"] = F.clamp_bounding_boxes(target["boxes"])
        sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
        keep &= (sides >= 1).all(1)
        area = sides.prod(1)
    if "masks" in target:
        pixels = target["masks"].flatten(1).sum(1)
        keep &= pixels > 0
        area = pixels.float()
    if "panoptic" in target:
        keep &= torch.isin(target["segment_ids"], target["panoptic"].as_subclass(Tensor))
    if "area" in target:
        target["area"] = area.as_subclass(Tensor)[keep]
    for key in PER_OBJECT:
        if key in target:
            part = target[key]
            target[key] = (
                tv_tensors.wrap(part[keep], like=part) if isinstance(part, tv_tensors.TVTensor) else part[keep]
            )
    return target
