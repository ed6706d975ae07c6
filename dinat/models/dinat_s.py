"""DiNAT_s: dilated neighborhood attention in Swin's frame, with patch embedding and patch merging.

Paper: Dilated Neighborhood Attention Transformer, section 3.5 - https://arxiv.org/abs/2209.15001
Weights by SHI Labs, https://github.com/SHI-Labs/Neighborhood-Attention-Transformer, MIT licence.
"""

from functools import partial

import torch
from timm.layers import LayerNorm2d
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from torch import nn
from torch.nn import functional as F

from .nat import NAT, cfg, cfg_384, create_nat

__all__: list[str] = []


class PatchEmbed(nn.Module):
    """Convolution of non-overlapping patches, then LayerNorm; images are zero-padded at the bottom and right."""

    def __init__(self, in_chans: int, dim: int, stride: int = 4, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.patch_size = stride
        self.proj = nn.Conv2d(in_chans, dim, stride, stride=stride, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, _, height, width = x.shape
        p = self.patch_size
        return self.norm(self.proj(F.pad(x, (0, -width % p, 0, -height % p))))


class PatchMerging(nn.Module):
    """Concatenate 2x2 neighbors, norm, project (Swin, Liu et al. 2021, section 3.1); odd maps are zero-padded."""

    def __init__(self, dim: int, dim_out: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, dim_out, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        batch, height, width, dim = x.shape
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        batch, height, width, dim = x.shape
        # Channels in the published order: row offset fastest, then column offset.
        x = x.reshape(batch, height // 2, 2, width // 2, 2, dim).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


_create = partial(create_nat, stem_layer=PatchEmbed, downsample_layer=PatchMerging)
_cfg = partial(cfg, first_conv="patch_embed.proj")
_cfg_384 = partial(cfg_384, first_conv="patch_embed.proj")


default_cfgs = generate_default_cfgs(
    {
        "dinat_s_tiny.shi_in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_s_tiny_in1k_224.pth"),
        "dinat_s_small.shi_in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_s_small_in1k_224.pth"),
        "dinat_s_base.shi_in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_s_base_in1k_224.pth"),
        "dinat_s_large.shi_in22k_ft_in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_s_large_in1k_224.pth"),
        "dinat_s_large.shi_in22k": _cfg("dinat/checkpoints/imagenet22k/dinat_s_large_in22k_224.pth", num_classes=21841),
        "dinat_s_large_384.shi_in22k_ft_in1k": _cfg_384("dinat/checkpoints/imagenet1k/dinat_s_large_in1k_384.pth"),
    }
)


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), mlp_ratio=4.0, dilations="max")
    return _create("dinat_s_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), mlp_ratio=4.0, dilations="max")
    return _create("dinat_s_small", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), mlp_ratio=4.0, dilations="max")
    return _create("dinat_s_base", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), mlp_ratio=4.0, dilations="max")
    return _create("dinat_s_large", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(
        img_size=384, embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), mlp_ratio=4.0, dilations="max"
    )
    return _create("dinat_s_large_384", pretrained, **dict(model_args, **kwargs))


register_model_deprecations(__name__, {"dinat_s_large_21k": "dinat_s_large.shi_in22k"})
