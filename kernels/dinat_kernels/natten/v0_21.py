"""The layers of NATTEN 0.20 and 0.21: strides, no bias."""

from __future__ import annotations

import logging

from torch import Tensor

from .. import modules
from ..functional import Bools, Ints
from ..geometry import make_neighborhood
from . import checks, fused, switches, types, weights
from .fused import given, na1d, na2d, na3d
from .release import Release, public

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "check_all_args",
    "na1d",
    "na2d",
    "na3d",
]


def check_all_args(
    na_dim: int, kernel_size: Ints, stride: Ints | None, dilation: Ints | None, is_causal: Bools | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """The arguments as tuples of one entry for each axis; a ValueError names one that is none."""
    window = make_neighborhood(na_dim, kernel_size, given(dilation, 1), given(stride, 1), given(is_causal, False))
    return window.kernel_size, window.stride, window.dilation, window.is_causal


def _no_configurations(query: Tensor, key: Tensor, value: Tensor) -> list:
    """Configurations of one of NATTEN's kernels that these tensors could take: the kernels are not here."""
    return []


class _Layer:
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Ints,
        stride: Ints | None = 1,
        dilation: Ints | None = 1,
        is_causal: Bools | None = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            kernel_size,
            given(dilation, 1),
            given(stride, 1),
            given(is_causal, False),
            rel_pos_bias=False,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            proj_drop=proj_drop,
        )


class NeighborhoodAttention1D(_Layer, modules.NeighborhoodAttention1d):
    """`dinat_kernels.NeighborhoodAttention1d` with the arguments of NATTEN 0.21."""


class NeighborhoodAttention2D(_Layer, modules.NeighborhoodAttention2d):
    """`dinat_kernels.NeighborhoodAttention2d` with the arguments of NATTEN 0.21."""


class NeighborhoodAttention3D(_Layer, modules.NeighborhoodAttention3d):
    """`dinat_kernels.NeighborhoodAttention3d` with the arguments of NATTEN 0.21."""


_KERNELS = [
    f"{library}_{kind}" for library in ("cutlass", "cutlass_hopper", "cutlass_blackwell") for kind in ("fna", "fmha")
]
_CONFIGURATIONS = [
    *(f"get_{step}configs_for_{kernel}" for step in ("", "bwd_") for kernel in _KERNELS),
    "get_configs_for_flex_fna",
    "get_configs_for_flex_fmha",
]
_LAYERS = public(globals(), "Neighborhood")
_CHECKS = public(vars(checks)) | public(globals(), "check")
RELEASE = Release(
    "0.21.7",
    {
        "natten": _LAYERS
        | {name: x for name, x in public(vars(fused)).items() if name != "neighborhood_attention_generic"}
        | public(vars(switches))
        | dict.fromkeys(_CONFIGURATIONS, _no_configurations)
        | {"HAS_LIBNATTEN": False},
        "natten.context": public(vars(switches)),
        "natten.functional": public(vars(weights)) | public(vars(fused)),
        "natten.modules": _LAYERS,
        "natten.types": public(vars(types)),
        "natten.utils": {},
        "natten.utils.checks": _CHECKS,
        "natten.utils.log": {"get_logger": logging.getLogger},
        "natten.utils.tensor": _CHECKS,
        "natten.utils.tuples": public(vars(checks), "create"),
        "natten.version": {},
    },
)
