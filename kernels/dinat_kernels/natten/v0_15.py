"""NATTEN 0.15: the layers of 0.14, and functions in which the first axis of a volume has a window of its own."""

from __future__ import annotations

from torch import Tensor

from . import checks, flops, switches, types, weights
from .release import Release, public
from .v0_14 import LAYERS, NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from .weights import na1d_qk, na2d_qk, natten3dqkrpb
from .weights import natten3dav as na3d_av
from .weights import natten3dqk as na3d_qk

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "na1d_qk_with_bias",
    "na2d_qk_with_bias",
    "na3d_av",
    "na3d_qk",
    "na3d_qk_with_bias",
]


def na1d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    dilation: int | None = 1,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`na1d_qk` with a bias."""
    return na1d_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na2d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    dilation: int | None = 1,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`na2d_qk` with a bias."""
    return na2d_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na3d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int | None = 1,
    dilation: int | None = 1,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`na3d_qk` with a bias."""
    return natten3dqkrpb(query, key, bias, kernel_size_d, kernel_size, dilation_d, dilation, additional_keys)


# Not "fused_na", which came with the functions that it stands for.
_KINDS = ["gemm", "tf32_gemm", "fp32_gemm", "fp64_gemm", "cuda", "half", "bfloat"]
_SWITCHES = {
    name: getattr(switches, name)
    for name in (
        "get_device_cc",
        *(f"has_{kind}" for kind in _KINDS),
        *(f"{turn}_{switch}" for turn in ("enable", "disable") for switch in ("tf32", "tiled_na", "gemm_na")),
    )
}
RELEASE = Release(
    "0.15.1",
    {
        "natten": LAYERS | _SWITCHES,
        "natten.flops": public(vars(flops)),
        "natten.functional": public(vars(weights)) | public(globals(), "na") | _SWITCHES,
        **{f"natten.natten{rank}d": LAYERS for rank in (1, 2, 3)},
        "natten.utils": public(vars(checks)) | public(vars(types)),
        "natten.utils.tensor": public(vars(checks)),
        "natten.utils.typing": public(vars(types)),
    },
)
