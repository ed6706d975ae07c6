"""Feature maps of any timm model, as the heads here take them."""

from __future__ import annotations

import inspect
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from dinat.errors import UserError, nearest

LEVELS = 4  # of the finest levels of a backbone with more, the first ones are left out


class Features(nn.Module):
    """Feature maps of a timm model, for images of any size.

    Images (batch, 3, height, width) to a list of (batch, channels, h, w), finest first.

    Args:
        name: a timm model that has `features_only`.
        pretrained: with the weights timm or this package has for it.
        stage_norm: LayerNorm on each map. Models of this package have it unless told otherwise, as in the published
            dense models; others have it if told so.
        kwargs: of `timm.create_model`. `out_indices` are the last four levels unless given.

    Attributes:
        channels, strides: of each map; strides in pixels.
        pretrained_cfg: timm's, with the mean and std of the images.

    Raises:
        UserError: an unknown name, or arguments that the model does not take.
    """

    def __init__(self, name: str, pretrained: bool = False, stage_norm: bool | None = None, **kwargs: Any) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise UserError(f"backbone={name}: no such model.{nearest(name.partition('.')[0], timm.list_models())}")
        own = {key: value for key, value in kwargs.items() if key not in ("out_indices", "feature_cls")}
        try:
            with torch.device("meta"):
                plain = timm.create_model(name, **own)
            if getattr(plain, "rank", 2) != 2:
                raise ValueError("it takes volumes, not images")
            takes = inspect.signature(type(plain)).parameters
            if "strict_img_size" in takes:
                kwargs.setdefault("strict_img_size", False)
            elif "dynamic_img_size" in takes:
                kwargs.setdefault("dynamic_img_size", True)
            has_norm = "stage_norm" in takes
            if has_norm:
                kwargs["stage_norm"] = stage_norm is None or stage_norm
            if len(plain.feature_info) > LEVELS and len({level["reduction"] for level in plain.feature_info}) > LEVELS:
                levels = range(len(plain.feature_info))
                kwargs.setdefault("out_indices", tuple(levels[-LEVELS:]))
            self.model = timm.create_model(name, pretrained=pretrained, features_only=True, **kwargs)
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"backbone={name} with backbone_kwargs={kwargs} cannot be built: {error}") from error
        self.channels = list(self.model.feature_info.channels())
        self.strides = list(self.model.feature_info.reduction())
        self.pretrained_cfg = plain.pretrained_cfg
        self.channels_last = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")
        add_norm = stage_norm and not has_norm
        self.norms = nn.ModuleList(LayerNorm2d(width, eps=1e-5) for width in self.channels) if add_norm else None

    @property
    def timm_model(self) -> tuple[str, nn.Module]:
        """What its parameters' names begin with here, and the model; timm's extractor where that took it apart."""
        whole = hasattr(self.model, "model")
        return ("model.model.", self.model.model) if whole else ("model.", self.model)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.model(images)
        if self.channels_last:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        if self.norms is not None:
            maps = [norm(x) for norm, x in zip(self.norms, maps, strict=True)]
        return maps
