"""Isotropic NAT and DiNAT, and their full-attention counterpart, ViT with relative position bias (ViT+RPB).

Paper: Dilated Neighborhood Attention Transformer, section 4.3 and appendix - https://arxiv.org/abs/2209.15001
Weights by SHI Labs, https://github.com/SHI-Labs/Neighborhood-Attention-Transformer, MIT licence.
"""

from functools import partial

from timm.models import generate_default_cfgs, register_model

from .dinat_s import PatchEmbed
from .nat import NAT, cfg, create_nat

__all__: list[str] = []

_create = partial(
    create_nat,
    isotropic=True,
    stem_layer=PatchEmbed,
    stem_stride=16,
    depths=(1,) * 12,
    mlp_ratio=4.0,
)
_cfg = partial(cfg, pool_size=(14, 14), first_conv="patch_embed.proj")


default_cfgs = generate_default_cfgs(
    {
        "nat_isotropic_small.shi_in1k": _cfg("dinat/checkpoints/isotropic/nat_isotropic_small_in1k_224.pth"),
        "nat_isotropic_base.shi_in1k": _cfg("dinat/checkpoints/isotropic/nat_isotropic_base_in1k_224.pth"),
        "dinat_isotropic_small.shi_in1k": _cfg("dinat/checkpoints/isotropic/dinat_isotropic_small_in1k_224.pth"),
        "dinat_isotropic_base.shi_in1k": _cfg("dinat/checkpoints/isotropic/dinat_isotropic_base_in1k_224.pth"),
        "vitrpb_small.shi_in1k": _cfg("dinat/checkpoints/isotropic/vitrpb_small_in1k_224.pth", fixed_input_size=True),
        "vitrpb_base.shi_in1k": _cfg("dinat/checkpoints/isotropic/vitrpb_base_in1k_224.pth", fixed_input_size=True),
    }
)


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=384, num_heads=(12,) * 12)
    return _create("nat_isotropic_small", pretrained, **dict(model_args, **kwargs))


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=768, num_heads=(24,) * 12)
    return _create("nat_isotropic_base", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=384, num_heads=(12,) * 12, dilations="max")
    return _create("dinat_isotropic_small", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=768, num_heads=(24,) * 12, dilations="max")
    return _create("dinat_isotropic_base", pretrained, **dict(model_args, **kwargs))


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=384, num_heads=(12,) * 12, kernel_size=None)
    return _create("vitrpb_small", pretrained, **dict(model_args, **kwargs))


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=768, num_heads=(24,) * 12, kernel_size=None)
    return _create("vitrpb_base", pretrained, **dict(model_args, **kwargs))
