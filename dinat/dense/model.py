"""What all dense models are: images of different sizes in, losses or predictions in each image's own size out."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinat.errors import UserError

from .features import Features

Target = dict[str, Any]


class DenseModel(nn.Module):
    """A backbone with a neck and a head.

    In training mode, `model(images, targets)` gives the losses, named, to be summed. In evaluation mode,
    `model.predict(images)` gives one dict per image, and `model(batch)` the network's own outputs (for export).

    Images are a list of float (3, height, width), normalised with `preprocessing`, of any sizes; they are padded on the
    right and at the bottom with zeros. Targets are dicts per image as the data sets give them: labels 0..num_classes-1,
    255 in maps is ignored.

    Attributes:
        method: the name of the method, as in `dinat.dense.create_model`.
        tasks: which of "detection", "semantic" and "panoptic" it can be trained for; `task`: the one it is for.
        num_classes: without background.
        preprocessing: "mean" and "std" of the images, for pixels of 0 to 1; of published models also "transform", the
            steps of `dinat.data.dense_transforms` before them in evaluation, and "views", those of each image of a test
            at several scales.
        size_divisor: sides of a batch are multiples of it, in pixels.
        not_exported: why `torch.export` cannot follow the model; "" where it can.
    """

    method: ClassVar[str]
    not_exported: ClassVar[str] = ""
    tasks: ClassVar[tuple[str, ...]]

    def __init__(self, num_classes: int, task: str | None, pretrained_cfg: dict, size_divisor: int = 32) -> None:
        super().__init__()
        task = self.tasks[0] if task is None else task
        if task not in self.tasks:
            raise UserError(f"task={task}: {self.method} is for {', '.join(self.tasks)}.")
        if num_classes < 1:
            raise UserError(f"num_classes={num_classes}: must be at least 1; background is not one of them.")
        self.num_classes = num_classes
        self.task = task
        self.size_divisor = size_divisor
        self.preprocessing = {key: tuple(pretrained_cfg[key]) for key in ("mean", "std")}

    @property
    def backbone(self) -> nn.Module:
        """The module that holds all parameters of the backbone."""
        raise NotImplementedError

    @property
    def timm_model(self) -> tuple[str, nn.Module]:
        """What the names of the backbone's parameters begin with here, and its timm model."""
        ((path, features),) = ((name, part) for name, part in self.named_modules() if isinstance(part, Features))
        prefix, model = features.timm_model
        return f"{path}.{prefix}", model

    def no_weight_decay(self) -> set[str]:
        """What the backbone does not want decayed, as of timm's models."""
        prefix, model = self.timm_model
        return {prefix + name for name in getattr(model, "no_weight_decay", set)()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The backbone's layers, for timm's layer decay; neck and head come after the last one.

        Raises:
            UserError: timm does not know the layers of this backbone once it gives feature maps.
        """
        prefix, model = self.timm_model
        if not hasattr(model, "group_matcher"):
            raise UserError(
                f"optimizer.layer_decay: timm tells no layers of {type(model).__name__}, as which this backbone gives "
                "feature maps. Use optimizer.lr_scale={backbone: 0.1} instead."
            )
        begin = "^" + re.escape(prefix)
        return {
            group: rule.replace("^", begin)
            if isinstance(rule, str)
            else [(expression.replace("^", begin), place) for expression, place in rule]
            for group, rule in model.group_matcher(coarse=coarse).items()
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Activations within the backbone are computed again in the backward pass."""
        _, model = self.timm_model
        if not hasattr(model, "set_grad_checkpointing"):
            raise UserError(f"runtime.grad_checkpointing=true: {type(model).__name__} has none. Set it to false.")
        model.set_grad_checkpointing(enable)

    def losses(self, batch: Tensor, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Losses of the padded `batch` of `images`."""
        raise NotImplementedError

    def outputs(self, batch: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the network says of images of one size, (batch, 3, height, width)."""
        raise NotImplementedError

    def predictions(self, batch: Tensor, frames: Sequence[tuple], sizes: Sequence[tuple], **kwargs: Any) -> list[dict]:
        """Predictions of a padded batch: (height, width) of each image in it, `frames`, and of each result, `sizes`."""
        raise NotImplementedError

    def scores(self, batch: Tensor, frames: Sequence[tuple], sizes: Sequence[tuple]) -> list[Tensor]:
        """Scores of the classes for each pixel, (num_classes, height, width) for each image; arguments as before."""
        return [self.activate(maps) for maps in self.fitted_maps(batch, frames, sizes)]

    def fitted_maps(self, batch: Tensor, frames: Sequence[tuple], sizes: Sequence[tuple]) -> list[Tensor]:
        """`maps` of each image alone, in the size of its result: (num_classes, height, width)."""
        return [
            resize(maps[None, :, :height, :width], size)[0]
            for maps, (height, width), size in zip(self.maps(batch), frames, sizes, strict=True)
        ]

    def maps(self, batch: Tensor) -> Tensor:
        """What is averaged over windows: (batch, num_classes, height, width), in the batch's own size."""
        raise UserError(f"{self.method} with task={self.task} has no scores of pixels that could be averaged.")

    def activate(self, maps: Tensor) -> Tensor:
        """Scores from such maps, (num_classes, height, width)."""
        return maps

    def forward(self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target] | None = None) -> Any:
        if not self.training:
            return self.outputs(images if isinstance(images, Tensor) else self.pad(images))
        if targets is None or len(targets) != len(images):
            found = "no" if targets is None else len(targets)
            raise ValueError(f"targets: {len(images)} images in training mode need one each, got {found} targets")
        return self.losses(self.pad(images), images, targets)

    @torch.no_grad()
    def predict(
        self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> list[dict]:
        """Predictions for images of any sizes; the company that an image is in makes no difference.

        Args:
            images: float (3, height, width), normalised.
            sizes: (height, width) of the results, one per image: that of the original images. By default that of
                `images`.
            kwargs: of the method; those with several tasks take `task`.

        Returns:
            One dict per image. Detection: `boxes` float (N, 4) as x1, y1, x2, y2 in pixels, `scores` (N,), `labels`
            (N,), `masks` bool (N, height, width). Semantic: `semantic` int64 (height, width). Panoptic: `panoptic`
            int32 (height, width), 0 where there is nothing, and `segments`, dicts of id, label, isthing and score.
        """
        if self.training:
            raise RuntimeError("predict() works in evaluation mode: call eval() first")
        frames = [tuple(image.shape[-2:]) for image in images]
        sizes = frames if sizes is None else [tuple(map(int, size)) for size in sizes]
        if len(sizes) != len(images):
            raise ValueError(f"sizes: {len(images)} images need one (height, width) each, got {len(sizes)}")
        together = defaultdict(list)  # images of one padded size: a larger frame would change what the network sees
        for i, frame in enumerate(frames):
            together[self.padded_size([frame])].append(i)
        results: list[dict] = [{} for _ in images]
        for indices in together.values():
            group = self.pad([images[i] for i in indices])
            found = self.predictions(group, [frames[i] for i in indices], [sizes[i] for i in indices], **kwargs)
            for i, result in zip(indices, found, strict=True):
                results[i] = result
        return results

    @torch.no_grad()
    def predict_views(
        self, views: Sequence[Tensor], size: tuple[int, int], flip: bool = True, window: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """The semantic map of one image from its scores at several scales, averaged ("multi-scale testing").

        Args:
            views: float (3, h, w), normalised: the image, resized to different sizes.
            size: (height, width) of the result.
            flip: whether each is seen mirrored as well.
            window: side and step in pixels of the windows that the model sees instead of a view as a whole.
        """
        total: Tensor | float = 0.0
        for view in views:
            for mirrored in (False, True)[: 1 + flip]:
                seen = view.flip(-1) if mirrored else view
                if window is None:
                    (scores,) = self.scores(self.pad([seen]), [tuple(view.shape[-2:])], [size])
                else:
                    scores = self.slide(seen, size, *window)
                total = total + (scores.flip(-1) if mirrored else scores)
        return {"semantic": total.argmax(0)}

    def slide(self, view: Tensor, size: tuple[int, int], side: int, step: int) -> Tensor:
        """Scores (num_classes, *size) of a view (3, h, w) from windows, averaged where these overlap."""
        height, width = view.shape[-2:]
        total, count = view.new_zeros(self.num_classes, height, width), view.new_zeros(height, width)
        for top in offsets(height, side, step):
            for left in offsets(width, side, step):
                place = (..., slice(top, top + side), slice(left, left + side))
                rows, columns = view[place].shape[-2:]
                total[place] += self.maps(self.pad([view[place]]))[0, :, :rows, :columns]
                count[place] += 1
        return self.activate(resize((total / count)[None], size)[0])

    def padded_size(self, frames: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """(height, width) that holds all `frames`."""
        height, width = (max(sides) for sides in zip(*frames, strict=True))
        return tuple(math.ceil(side / self.size_divisor) * self.size_divisor for side in (height, width))

    def pad(self, images: Sequence[Tensor]) -> Tensor:
        """(batch, 3, height, width) of images (3, h, w)."""
        height, width = self.padded_size([tuple(image.shape[-2:]) for image in images])
        return torch.stack([pad_to(image, height, width) for image in images])


def offsets(length: int, side: int, step: int) -> list[int]:
    """Where windows begin, the last one moved back to end at `length`, as in mmsegmentation."""
    last = max(length - side, 0)
    return [*range(0, last, step), last]


def pad_to(x: Tensor, height: int, width: int, value: float = 0) -> Tensor:
    """(..., h, w) to (..., height, width), filled up on the right and at the bottom."""
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=value)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(batch, channels, h, w) to (batch, channels, *size) by bilinear interpolation, pixel centres fixed."""
    return (
        x if tuple(x.shape[-2:]) == tuple(size) else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    )
