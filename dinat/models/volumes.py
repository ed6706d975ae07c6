"""DiNAT for volumes: the layers of NAT and DiNAT with one axis more, ours, without published weights.

Local and dilated neighborhood attention alternate as in Dilated Neighborhood Attention Transformer,
https://arxiv.org/abs/2209.15001; stem and downsamplers are convolutions of 3 x 3 x 3.
"""

from collections.abc import Sequence
from functools import partial

import torch
from timm.models import generate_default_cfgs, register_model

from .layers import Dilations
from .nat import NAT, ConvDownsample, ConvStem, cfg, checkpoint_filter_fn, create_nat, update_model_input_size

__all__ = ["VolumeNAT", "checkpoint_filter_fn"]

INFLATIONS = ("centre", "mean")


class VolumeNAT(NAT):
    """`NAT` on volumes (batch, in_chans, depth, height, width), with features (batch, channels, depth, height, width).

    Whatever `NAT` takes one of per level or axis, this takes with three axes: `kernel_size=[(3, 7, 7)] * 3` is one
    window for three levels. Dilation policies go by each axis: a flat volume is dilated more in its plane.

    Args:
        in_chans: channels of the volume.
        vol_size: nominal size in voxels, int or (depth, height, width); `img_size` is timm's word for two sides.
        stem_stride: voxels per token of the first level, 1, 2 or 4, or one for each axis. `feature_info` has `strides`
            for each axis; `reduction` is the largest of them.
        inflation: how weights of the 2-D model of the same arguments are taken, "centre" or "mean", see
            `dinat.checkpoints.fitting.inflate`.
        kwargs: further arguments of `NAT`.

    Raises:
        ValueError: as `NAT`, and for an unknown `inflation`.
    """

    rank = 3
    size_argument = "vol_size"

    def __init__(
        self, in_chans: int = 1, vol_size: int | Sequence[int] = 28, inflation: str = "centre", **kwargs
    ) -> None:
        if "img_size" in kwargs:
            raise TypeError(
                f"img_size is the size of images, volumes have vol_size, got img_size={kwargs['img_size']!r}"
            )
        if inflation not in INFLATIONS:
            raise ValueError(f'inflation must be "centre" or "mean", got {inflation!r}')
        kwargs.setdefault("stem_layer", partial(ConvStem, rank=3))
        kwargs.setdefault("downsample_layer", partial(ConvDownsample, rank=3))
        super().__init__(in_chans, img_size=vol_size, **kwargs)
        self.inflation = inflation

    @torch.jit.ignore
    def set_input_size(
        self,
        vol_size: int | Sequence[int] | None = None,
        kernel_size: int | Sequence[int] | None = None,
        dilations: Dilations | None = None,
    ) -> None:
        """`NAT.set_input_size` for another size in voxels."""
        self._set_windows(vol_size, kernel_size, dilations)
        update_model_input_size(self, None, vol_size=self.img_size, kernel_size=kernel_size, dilations=dilations)


def _cfg() -> dict:
    """timm has no field for a depth; volumes have no first convolution that it could adapt."""
    return cfg(
        num_classes=2,
        input_size=(1, 28, 28),
        pool_size=(4, 4),
        crop_pct=1.0,
        mean=(0.5,),
        std=(0.5,),
        interpolation="bilinear",
        first_conv=None,
        origin_url="",
    )


default_cfgs = generate_default_cfgs({"dinat_3d_pico.untrained": _cfg(), "dinat_3d_nano.untrained": _cfg()})

_create = partial(create_nat, family=VolumeNAT)
_SMALL = dict(in_chans=1, mlp_ratio=3.0, kernel_size=3, dilations="max", stem_stride=2)


@register_model
def dinat_3d_pico(pretrained: bool = False, **kwargs) -> VolumeNAT:
    """dinat_pico with one axis more, for volumes of 28 to 64 voxels; ours, not published."""
    model_args = dict(_SMALL, embed_dim=32, depths=(2, 2, 6), num_heads=(1, 2, 4))
    return _create("dinat_3d_pico", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_3d_nano(pretrained: bool = False, **kwargs) -> VolumeNAT:
    """dinat_nano with one axis more, for volumes of 28 to 64 voxels; ours, not published."""
    model_args = dict(_SMALL, embed_dim=64, depths=(2, 2, 4), num_heads=(2, 4, 8))
    return _create("dinat_3d_nano", pretrained, **dict(model_args, **kwargs))
