"""What the families share, for maps (rank 2) and volumes (rank 3): block, dilation policies, change of a window."""

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from functools import partial

import torch
from dinat_kernels import NeighborhoodAttention2d, NeighborhoodAttention3d
from dinat_kernels.ops import is_watched
from timm.layers import DropPath, LayerNorm2d, LayerScale, Mlp, use_fused_attn
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from dinat.checkpoints import resize_rpb

AXES = ("depth", "height", "width")
Dilations = int | str | Sequence[Sequence[int | tuple[int, ...]]]


class LayerNorm3d(nn.LayerNorm):
    """LayerNorm of the channels of volumes (batch, channels, depth, height, width), as timm's LayerNorm2d of maps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)


# by rank
ATTENTION = {2: NeighborhoodAttention2d, 3: NeighborhoodAttention3d}
CONV = {2: nn.Conv2d, 3: nn.Conv3d}
LAYER_NORM = {2: partial(LayerNorm2d, eps=1e-5), 3: partial(LayerNorm3d, eps=1e-5)}

for attention in ATTENTION.values():
    register_notrace_module(attention)  # its padding depends on the map size, which FX cannot trace


class GELU(nn.Module):
    """GELU that overwrites its input in inference mode, where half of its time would go into fresh memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript compiles nothing under this condition alone
            if not is_watched(x) and x.is_inference():
                return torch.ops.aten.gelu_(x)
        return F.gelu(x)


register_notrace_module(GELU)


class NATBlock(nn.Module):
    """Pre-norm transformer block on (batch, *spatial, dim), with optional layer scale; `rank` spatial axes."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | tuple[int, ...] = 7,
        dilation: int | tuple[int, ...] = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ls_init_value: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        backend: str | None = None,
        rank: int = 2,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        fused = backend is not None or use_fused_attn()  # False: TIMM_FUSED_ATTN=0, or timm's exportable mode
        self.norm1 = norm_layer(dim, **dd)
        self.attn = ATTENTION[rank](
            dim,
            num_heads,
            kernel_size,
            dilation,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            fused=fused,
            backend=backend if fused else "torch",
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


def to_sizes(name: str, value: int | Sequence[int], rank: int = 2) -> tuple[int, ...]:
    """A length for all axes, or one per axis, as one per axis.

    Raises:
        ValueError: not `rank` of them, or not positive; names the argument.
    """
    try:
        sizes = (value,) * rank if isinstance(value, str) or not isinstance(value, Sequence) else value
        sizes = tuple(map(operator.index, sizes))
    except TypeError:
        sizes = ()
    if len(sizes) != rank or min(sizes) < 1:
        count, axes = {2: "two", 3: "three"}[rank], ", ".join(AXES[-rank:])
        raise ValueError(f"{name} must be a positive int or {count} of them, ({axes}), got {value!r}")
    return sizes


def init_weights(module: nn.Module, name: str = "") -> None:
    """Published initialization: linear weights truncated normal 0.02; convolutions and norms keep PyTorch's default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def resize_window(
    attn: NeighborhoodAttention2d | NeighborhoodAttention3d,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
) -> None:
    """Change the window of a layer in place, and its bias table with it."""
    attn.set_window(kernel_size, dilation)
    rpb = resize_rpb(attn.rpb, attn.kernel_size)
    if rpb is not attn.rpb:
        attn.rpb = nn.Parameter(rpb, requires_grad=attn.rpb.requires_grad)


def resolve_dilations(
    dilations: Dilations,
    depths: Sequence[int],
    kernel_sizes: Sequence[tuple[int, ...]],
    feature_sizes: Sequence[tuple[int, ...]],
    per_axis: bool = False,
) -> list[list[int | tuple[int, ...]]]:
    """The dilation of every block, one list per level (DiNAT, Hassani & Shi 2022, section 3.4).

    Args:
        dilations: an int for every block (1: NAT). "max": odd blocks take the largest dilation that fits the level's
            map, `side // kernel_size` of its shorter side, as in ImageNet training. "gradual": odd blocks grow from
            half of the maximum to the maximum in cycles of three, the last level stays at the maximum, as in the
            published detection models. Or an explicit list of one list per level with one dilation per block.
        depths: blocks per level.
        kernel_sizes: of each level's window along each axis, in tokens.
        feature_sizes: of each level's map along each axis, in tokens.
        per_axis: whether the policies go by each axis instead of the shorter side, and give one dilation per axis.

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
            fitting = [max(1, side // k) for side, k in zip(size, kernel, strict=True)]
            steps = 1 if dilations == "max" or i == len(depths) - 1 else min(3, depth // 2)
            if per_axis:
                levels.append(list(zip(*(_alternate(largest, depth, steps) for largest in fitting), strict=True)))
            else:
                levels.append(_alternate(min(fitting), depth, steps))
        return levels
    if not isinstance(dilations, Sequence) or [len(d) if isinstance(d, Sequence) else d for d in dilations] != list(
        depths
    ):
        raise ValueError(
            f"dilations must be one list per level with one entry per block, {list(depths)} entries, got {dilations!r}"
        )
    return [list(level) for level in dilations]


def _alternate(largest: int, depth: int, steps: int) -> list[int]:
    """Dilations of `depth` blocks: even ones 1, odd ones grow from half of the largest to it in `steps`."""
    cycle = [math.floor(largest / 2 * (1 + j / (steps - 1))) for j in range(steps)] if steps > 1 else [largest]
    return [max(1, cycle[j // 2 % len(cycle)]) if j % 2 else 1 for j in range(depth)]
