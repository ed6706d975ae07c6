"""What the families share: the transformer block, the dilation policies, the change of a window."""

import math
import numbers
import operator
from collections.abc import Callable, Sequence

import torch
from dinat_kernels import NeighborhoodAttention2d
from dinat_kernels.ops import is_watched
from timm.layers import DropPath, LayerScale, Mlp, use_fused_attn
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from dinat.checkpoints import resize_rpb

register_notrace_module(NeighborhoodAttention2d)  # its padding depends on the map size, which FX cannot trace

Dilations = int | str | Sequence[Sequence[int | tuple[int, int]]]


class GELU(nn.Module):
    """GELU that overwrites its input in inference mode, where half of its time would go into fresh memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript compiles nothing under this condition alone
            if not is_watched(x) and x.is_inference():
                return torch.ops.aten.gelu_(x)
        return F.gelu(x)


register_notrace_module(GELU)


class NATBlock(nn.Module):
    """Pre-norm transformer block on (batch, height, width, dim), with optional layer scale."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | tuple[int, int] = 7,
        dilation: int | tuple[int, int] = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ls_init_value: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        backend: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if backend is None and not use_fused_attn():  # TIMM_FUSED_ATTN=0, or timm's exportable mode
            backend = "torch"
        self.norm1 = norm_layer(dim, **dd)
        self.attn = NeighborhoodAttention2d(
            dim,
            num_heads,
            kernel_size,
            dilation,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            backend=backend,
            **dd,
        )
        # None rather than Identity, whose calls take time
        self.ls1 = None if ls_init_value is None else LayerScale(dim, ls_init_value, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else None
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        if not proj_drop:  # calling an idle Dropout takes three times as long
            self.mlp.drop1 = self.mlp.drop2 = nn.Identity()
        self.ls2 = None if ls_init_value is None else LayerScale(dim, ls_init_value, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attn(self.norm1(x))
        if self.ls1 is not None:
            y = self.ls1(y)
        if self.drop_path1 is not None:
            y = self.drop_path1(y)
        x = x + y

        y = self.mlp(self.norm2(x))
        if self.ls2 is not None:
            y = self.ls2(y)
        if self.drop_path2 is not None:
            y = self.drop_path2(y)
        return x + y


def to_pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """A length or (height, width) as (height, width). Raises ValueError, naming the argument, unless both are >= 1."""
    try:
        pair = (value, value) if isinstance(value, str) or not isinstance(value, Sequence) else value
        height, width = map(operator.index, pair)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise ValueError(f"{name} must be a positive int or two of them, (height, width), got {value!r}")
    return height, width


def init_weights(module: nn.Module, name: str = "") -> None:
    """Published initialization: linear weights truncated normal 0.02; convolutions and norms keep PyTorch's default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def resize_window(
    attn: NeighborhoodAttention2d, kernel_size: int | Sequence[int], dilation: int | Sequence[int]
) -> None:
    """Change the window of a layer in place, and its bias table with it."""
    attn.set_window(kernel_size, dilation)
    rpb = resize_rpb(attn.rpb, attn.kernel_size)
    if rpb is not attn.rpb:
        attn.rpb = nn.Parameter(rpb, requires_grad=attn.rpb.requires_grad)


def resolve_dilations(
    dilations: Dilations,
    depths: Sequence[int],
    kernel_sizes: Sequence[tuple[int, int]],
    feature_sizes: Sequence[tuple[int, int]],
) -> list[list[int | tuple[int, int]]]:
    """The dilation of every block, one list per level (DiNAT, Hassani & Shi 2022, section 3.4).

    Args:
        dilations: an int for every block (1: NAT). "max": odd blocks take the largest dilation that fits the level's
            map, `side // kernel_size` of its shorter side, as in ImageNet training. "gradual": odd blocks grow from
            half of the maximum to the maximum in cycles of three, the last level stays at the maximum, as in the
            published detection models. Or an explicit list of one list per level with one dilation per block.
        depths: blocks per level.
        kernel_sizes: (height, width) of each level's window, in tokens.
        feature_sizes: (height, width) of each level's map, in tokens.

    Raises:
        ValueError: unknown policy, or a list that does not have the shape of `depths`.
    """
    if isinstance(dilations, numbers.Integral):
        return [[dilations] * depth for depth in depths]
    if isinstance(dilations, str):
        if dilations not in ("max", "gradual"):
            raise ValueError(f'dilations must be an int, "max", "gradual" or a list of lists, got {dilations!r}')
        levels = []
        for i, (depth, kernel, size) in enumerate(zip(depths, kernel_sizes, feature_sizes, strict=True)):
            largest = max(1, min(side // k for side, k in zip(size, kernel, strict=True)))
            steps = 1 if dilations == "max" or i == len(depths) - 1 else min(3, depth // 2)
            cycle = [math.floor(largest / 2 * (1 + j / (steps - 1))) for j in range(steps)] if steps > 1 else [largest]
            levels.append([max(1, cycle[j // 2 % len(cycle)]) if j % 2 else 1 for j in range(depth)])
        return levels
    if not isinstance(dilations, Sequence) or [len(d) if isinstance(d, Sequence) else d for d in dilations] != list(
        depths
    ):
        raise ValueError(
            f"dilations must be one list per level with one entry per block, {list(depths)} entries, got {dilations!r}"
        )
    return [list(level) for level in dilations]
