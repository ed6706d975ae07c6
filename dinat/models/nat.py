"""Neighborhood Attention Transformer (NAT) and Dilated Neighborhood Attention Transformer (DiNAT).

Papers:
    Neighborhood Attention Transformer - https://arxiv.org/abs/2204.07143 (CVPR 2023)
    Dilated Neighborhood Attention Transformer - https://arxiv.org/abs/2209.15001

Weights by SHI Labs, https://github.com/SHI-Labs/Neighborhood-Attention-Transformer, MIT licence.
"""

import math
import numbers
from collections.abc import Callable, Sequence

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_act_layer
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    load_pretrained,
    named_apply,
    register_model,
    register_model_deprecations,
)
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from torch import nn

from dinat import checkpoints
from dinat.errors import CheckpointError

from .layers import (
    CONV,
    GELU,
    LAYER_NORM,
    Dilations,
    NATBlock,
    init_weights,
    resize_window,
    resolve_dilations,
    to_sizes,
)

try:
    from timm.models._input import update_model_input_size
except ImportError:  # timm < 1.0.30 keeps no record of the input size

    def update_model_input_size(model: nn.Module, img_size, **model_args) -> None: ...


__all__ = ["NAT"]


class ConvStem(nn.Module):
    """Two overlapping convolutions, 3 tokens wide, with nothing between them, then LayerNorm (NAT, section 3.3)."""

    def __init__(
        self, in_chans: int, dim: int, stride: int | Sequence[int] = 4, rank: int = 2, device=None, dtype=None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        strides = to_sizes("stem_stride", stride, rank)
        if not {*strides} <= {1, 2, 4}:
            raise ValueError(f"stem_stride must be 1, 2 or 4, or one of them for each axis, got {stride}")
        first = tuple(min(2, side) for side in strides)
        second = tuple(side // taken for side, taken in zip(strides, first, strict=True))
        self.proj = nn.Sequential(
            CONV[rank](in_chans, dim // 2, 3, stride=first, padding=1, **dd),
            CONV[rank](dim // 2, dim, 3, stride=second, padding=1, **dd),
        )
        self.norm = LAYER_NORM[rank](dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)  # channels last, as the blocks have them
        return self.norm(self.proj(x))


class ConvDownsample(nn.Module):
    """Overlapping convolution, 3 tokens wide, with stride 2, then LayerNorm."""

    def __init__(self, dim: int, dim_out: int, rank: int = 2, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.reduction = CONV[rank](dim, dim_out, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = LAYER_NORM[rank](dim_out, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.reduction(x))


class NATStage(nn.Module):
    """An optional downsampler followed by blocks; channels first in and out, channels last in memory.

    `strides` are those of its tokens, in pixels of the image, one per axis.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[NATBlock], strides: tuple[int, ...]) -> None:
        super().__init__()
        self.strides = strides
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x).movedim(1, -1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.movedim(-1, 1)


class NAT(nn.Module):
    """Backbone of neighborhood attention: NAT, DiNAT and, with another stem and downsampler, DiNAT_s and isotropic
    models.

    Features are (batch, channels, height, width) with channels_last strides at every level boundary.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head; 0 for none.
        global_pool: pooling of the head, "avg" and others of timm's `ClassifierHead`; "" for none.
        output_stride: only the natural one (32 for the published models) is possible.
        img_size: nominal image size in pixels, int or (height, width). Dilation policies refer to it; any other size
            runs with the same dilations.
        embed_dim: channels of the first level; each further level doubles them, unless `isotropic`.
        depths: blocks per level.
        num_heads: attention heads per level.
        mlp_ratio: hidden channels of the MLP relative to the level's channels.
        kernel_size: attention window in tokens, for all levels or one per level. None for the whole map, that is full
            attention with relative position bias, which needs images of exactly `img_size`.
        dilations: see `resolve_dilations`; an explicit list of an isotropic model is flat, one entry per block.
        qkv_bias: bias in the qkv projection.
        ls_init_value: initial layer scale, None for no layer scale.
        stem_stride: pixels per token of the first level, or one for each axis; 1, 2 or 4 with the convolutional stem.
        isotropic: levels neither downsample nor widen. One block each, they make every block a feature level, as in
            ViTs.
        stage_norm: LayerNorm on each intermediate feature map (`norm0`, `norm1`, ...), for dense prediction, as in the
            published detection and segmentation models.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the attention projection and in the MLP.
        attn_drop_rate: dropout of attention weights; slower, since it runs outside the fused operator.
        drop_path_rate: stochastic depth rate of the last block; grows linearly from 0.
        act_layer: activation of the MLP, class or name.  The default computes in place in inference mode: a hook that
            keeps the output of `fc1` finds it activated there.
        norm_layer: norm of the blocks, on channels-last tensors.
        stem_layer: called with (in_chans, dim); downsample_layer: called with (dim, dim_out).
        backend: attention backend, see `dinat_kernels.na2d`.

    Raises:
        ValueError: an impossible `output_stride`, `img_size` or `kernel_size`, or `dilations` that do not fit `depths`.
    """

    rank = 2  # axes of the image
    size_argument = "img_size"
    inflation: str | None = None  # how weights of a model of maps enter one of volumes, see `checkpoints.fit`

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int | None = None,
        img_size: int | tuple[int, int] = 224,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        kernel_size: int | Sequence[int] | None = 7,
        dilations: Dilations = 1,
        qkv_bias: bool = True,
        ls_init_value: float | None = None,
        stem_stride: int | Sequence[int] = 4,
        isotropic: bool = False,
        stage_norm: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: str | Callable[..., nn.Module] = GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        stem_layer: Callable[..., nn.Module] = ConvStem,
        downsample_layer: Callable[..., nn.Module] = ConvDownsample,
        backend: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        num_levels = len(depths)
        if len(num_heads) != num_levels:
            raise ValueError(f"num_heads must have one entry per level, {num_levels} as depths, got {num_heads}")
        growth = [1 if isotropic else 2**i for i in range(num_levels)]
        strides = to_sizes("stem_stride", stem_stride, self.rank)
        natural = max(strides) * growth[-1]
        if output_stride not in (None, natural):
            raise ValueError(f"output_stride must be {natural}, the natural one of this model, got {output_stride}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.output_fmt = "NCHW"
        self.isotropic = isotropic
        dims = [embed_dim * g for g in growth]
        self.num_features = dims[-1]
        self.feature_info = [
            dict(num_chs=dim, reduction=max(strides) * g, strides=tuple(g * s for s in strides), module=f"levels.{i}")
            for i, (dim, g) in enumerate(zip(dims, growth, strict=True))
        ]
        self.img_size = to_sizes(self.size_argument, img_size, self.rank)
        self.full_attention = kernel_size is None
        self.dilation_policy = dilations
        kernel_sizes = self._kernel_sizes(kernel_size)
        self.dilations = self._dilations(depths, kernel_sizes)

        self.patch_embed = stem_layer(in_chans, embed_dim, stride=stem_stride, **dd)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.levels = nn.Sequential(
            *(
                NATStage(
                    nn.Identity() if isotropic or i == 0 else downsample_layer(dim // 2, dim, **dd),
                    [
                        NATBlock(
                            dim,
                            num_heads[i],
                            kernel_sizes[i],
                            dilation,
                            mlp_ratio=mlp_ratio,
                            qkv_bias=qkv_bias,
                            ls_init_value=ls_init_value,
                            proj_drop=proj_drop_rate,
                            attn_drop=attn_drop_rate,
                            drop_path=drop_path,
                            act_layer=get_act_layer(act_layer),
                            norm_layer=norm_layer,
                            backend=backend,
                            rank=self.rank,
                            **dd,
                        )
                        for dilation, drop_path in zip(self.dilations[i], drop_paths[i], strict=True)
                    ],
                    strides=tuple(growth[i] * stride for stride in strides),
                )
                for i, dim in enumerate(dims)
            )
        )
        self.stage_norm = stage_norm
        if stage_norm:
            for i, dim in enumerate(dims):
                self.add_module(f"norm{i}", LAYER_NORM[self.rank](dim, **dd))
        self.norm = LAYER_NORM[self.rank](self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        named_apply(init_weights, self)

    def _feature_sizes(self) -> list[tuple[int, ...]]:
        """The sides of each level's map at `img_size`, in tokens."""
        return [
            tuple(math.ceil(side / stride) for side, stride in zip(self.img_size, info["strides"], strict=True))
            for info in self.feature_info
        ]

    def _kernel_sizes(self, kernel_size: int | Sequence[int | Sequence[int]] | None) -> list[tuple[int, ...]]:
        """The sides of each level's window, in tokens."""
        if self.full_attention:
            return self._feature_sizes()
        if not isinstance(kernel_size, Sequence) or isinstance(kernel_size, str):
            kernel_size = [kernel_size] * len(self.feature_info)
        if len(kernel_size) != len(self.feature_info):
            raise ValueError(
                f"kernel_size must be one int or one per level, {len(self.feature_info)}, got {kernel_size}"
            )
        return [to_sizes("kernel_size", window, self.rank) for window in kernel_size]

    def _dilations(self, depths: Sequence[int], kernel_sizes: Sequence[tuple[int, ...]]) -> list[list]:
        """The dilation of every block, one list per level."""
        policy, sizes, per_axis = self.dilation_policy, self._feature_sizes(), self.rank > 2
        if not self.isotropic:
            return resolve_dilations(policy, depths, kernel_sizes, sizes, per_axis)
        if not isinstance(policy, (numbers.Integral, str)):  # flat, or one list per level as in `self.dilations`
            policy = [[d[0] if isinstance(d, Sequence) and len(d) == 1 else d for d in policy]]
        return [[d] for d in resolve_dilations(policy, [sum(depths)], kernel_sizes[:1], sizes[:1], per_axis)[0]]

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        kernel_size: int | Sequence[int] | None = None,
        dilations: Dilations | None = None,
    ) -> None:
        """Adapt the windows to another image size; weights stay, bias tables are resized if `kernel_size` changes.

        Models run at any size without this call, with the dilations they have. It recomputes them.

        Args:
            img_size: image size in pixels, the current one if None.
            kernel_size: window for all levels or one per level, the current ones if None (always the map in models of
                full attention).
            dilations: a policy or explicit list (see `resolve_dilations`), the policy of construction if None; an
                explicit list of construction is kept.

        Raises:
            ValueError: `img_size`, `kernel_size` or `dilations` do not fit the model, which is then left as it was.
        """
        self._set_windows(img_size, kernel_size, dilations)
        update_model_input_size(self, self.img_size, kernel_size=kernel_size, dilations=dilations)

    def _set_windows(
        self, size: int | Sequence[int] | None, kernel_size: int | Sequence[int] | None, dilations: Dilations | None
    ) -> None:
        before = self.img_size, self.dilation_policy
        self.img_size = self.img_size if size is None else to_sizes(self.size_argument, size, self.rank)
        self.dilation_policy = self.dilation_policy if dilations is None else dilations
        try:
            current = [tuple(level.blocks[0].attn.kernel_size) for level in self.levels]
            kernel_sizes = (
                current if kernel_size is None and not self.full_attention else self._kernel_sizes(kernel_size)
            )
            self.dilations = self._dilations([len(level.blocks) for level in self.levels], kernel_sizes)
        except ValueError:  # leave the model as it was
            self.img_size, self.dilation_policy = before
            raise
        for level, level_kernel, level_dilations in zip(self.levels, kernel_sizes, self.dilations, strict=True):
            for block, dilation in zip(level.blocks, level_dilations, strict=True):
                resize_window(block.attn, level_kernel, dilation)

    @torch.jit.ignore
    def load_pretrained(self, path: str) -> None:
        """Load a weights file of any known layout, read by us and adapted by timm; called by timm for `custom_load`."""
        cfg = self.pretrained_cfg | {"state_dict": checkpoints.read_checkpoint(path)}
        load_pretrained(self, cfg, self.num_classes, self.in_chans, checkpoint_filter_fn)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"*.rpb"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups for layer-wise learning rate decay, see timm's `param_groups_layer_decay`."""
        return dict(
            stem=r"^patch_embed",
            blocks=r"^levels\.(\d+)"
            if coarse
            else [
                (r"^levels\.(\d+)\.downsample", (0,)),
                (r"^levels\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for level in self.levels:
            level.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier (0: remove it); the pooling stays unless `global_pool` is given."""
        like = next(self.parameters())
        self.num_classes = num_classes
        pool_type = self.head.global_pool.pool_type if global_pool is None else global_pool
        self.head = ClassifierHead(
            self.num_features,
            num_classes,
            pool_type=pool_type,
            drop_rate=self.drop_rate,
            device=like.device,
            dtype=like.dtype,
        ).train(self.training)
        named_apply(init_weights, self.head)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Features of the selected levels, each taken before the next level's downsampler.

        Args:
            x: images (batch, in_chans, *sides).
            indices: the last n levels if int, all if None, these if a sequence (negative ones count from the end).
            norm: apply the final norm to the last level's features (`stage_norm` models norm all of them regardless).
            stop_early: do not run the levels after the last one selected.
            output_fmt: "NCHW": channels first, whatever the number of axes.
            intermediates_only: return the intermediate features only.

        Returns:
            Intermediates (batch, channels, *sides), preceded by the final features unless `intermediates_only`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt must be "NCHW", got {output_fmt!r}')
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        last = len(self.levels) - 1
        intermediates = []
        x = self._embed(x)
        for i, level in enumerate(self.levels[: max_index + 1] if stop_early else self.levels):
            x = level(x)
            if i in take_indices:
                if self.stage_norm:
                    intermediates.append(self.get_submodule(f"norm{i}")(x))
                else:
                    intermediates.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        if i == last:
            x = self.norm(x)
        return x, intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the selected intermediate features do not need; returns their indices."""
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        prune_end = max_index < len(self.levels) - 1
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        for i in range(len(self.levels)):
            if i not in take_indices and hasattr(self, f"norm{i}"):  # a norm without gradient would stop DDP
                delattr(self, f"norm{i}")
        self.levels = self.levels[: max_index + 1]
        self.feature_info = self.feature_info[: max_index + 1]
        self.dilations = self.dilations[: max_index + 1]
        if not isinstance(self.dilation_policy, (int, str)):
            self.dilation_policy = self.dilation_policy[: max_index + 1]
        self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        if self.full_attention:
            message = f"images must have the size of the bias tables, {self.img_size}; call set_input_size for another"
            for axis, side in enumerate(self.img_size, start=2):
                torch._assert(x.shape[axis] == side, message)
        return self.patch_embed(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (batch, in_chans, *sides) to normed features (batch, num_features, *sides / 32)."""
        return self.norm(self.levels(self._embed(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features to logits (batch, num_classes), or to pooled features (batch, num_features)."""
        if self.head.global_pool.pool_type:  # timm's pools are of two axes, and all that there are is one of them
            x = x.flatten(2, -2)
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of any layout that these models exist in, ready for `model`; see `dinat.checkpoints.fit`."""
    return checkpoints.fit(state_dict, model, model.inflation)


def create_nat(variant: str, pretrained: bool = False, *, family: type[NAT] = NAT, **kwargs) -> NAT:
    """Build a model; `kwargs` are those of `family` and of timm's `build_model_with_cfg` (`features_only`, ...).

    Published weights are found and read by `dinat.checkpoints`, and loaded by timm.
    """
    feature_cfg = {"out_indices": tuple(range(len(kwargs["depths"]))), "flatten_sequential": True}
    if kwargs.get("isotropic"):
        feature_cfg["out_indices"] = 3  # the last three blocks, as timm's ViTs
    if kwargs.get("isotropic") or kwargs.get("stage_norm"):
        feature_cfg["feature_cls"] = "getter"  # stage norms are not on the path from one level to the next
    if kwargs.get("stage_norm") and kwargs.get("feature_cls", "getter") != "getter":
        raise ValueError(f'stage_norm needs feature_cls="getter", got {kwargs["feature_cls"]!r}')
    path = None
    if pretrained:
        overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
        source = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), dict(overlay))
        found = checkpoints.pretrained_overlay(source, kwargs.get("cache_dir"))
        path = found.get("file")
        kwargs["pretrained_cfg_overlay"] = overlay | found
    try:
        return build_model_with_cfg(
            family,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=feature_cfg,
            **kwargs,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}" if path else str(error)) from error


def cfg(path: str = "", hub: str = "", **kwargs) -> dict:
    """Pretrained configuration; `path` is that of the weights on the publisher's server, `hub` their repository."""
    return {
        "url": f"https://shi-labs.com/projects/{path}" if path else "",
        "hf_hub_id": f"shi-labs/{hub}" if hub else None,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "paper_ids": "arXiv:2209.15001",
        "paper_name": "Dilated Neighborhood Attention Transformer",
        **kwargs,
    }


def cfg_384(path: str, hub: str = "", **kwargs) -> dict:
    return cfg(path, hub, input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0, **kwargs)


def _nat_cfg(path: str, hub: str) -> dict:
    return cfg(path, hub, paper_ids="arXiv:2204.07143", paper_name="Neighborhood Attention Transformer")


def _small_cfg(size: int = 32, pool: int = 4) -> dict:
    return cfg(input_size=(3, size, size), pool_size=(pool, pool), crop_pct=1.0)


default_cfgs = generate_default_cfgs(
    {
        "nat_mini.shi_in1k": _nat_cfg("nat/checkpoints/CLS/nat_mini.pth", "nat-mini-in1k-224"),
        "nat_tiny.shi_in1k": _nat_cfg("nat/checkpoints/CLS/nat_tiny.pth", "nat-tiny-in1k-224"),
        "nat_small.shi_in1k": _nat_cfg("nat/checkpoints/CLS/nat_small.pth", "nat-small-in1k-224"),
        "nat_base.shi_in1k": _nat_cfg("nat/checkpoints/CLS/nat_base.pth", "nat-base-in1k-224"),
        "dinat_mini.shi_in1k": cfg("dinat/checkpoints/imagenet1k/dinat_mini_in1k_224.pth", "dinat-mini-in1k-224"),
        "dinat_tiny.shi_in1k": cfg("dinat/checkpoints/imagenet1k/dinat_tiny_in1k_224.pth", "dinat-tiny-in1k-224"),
        "dinat_small.shi_in1k": cfg("dinat/checkpoints/imagenet1k/dinat_small_in1k_224.pth", "dinat-small-in1k-224"),
        "dinat_base.shi_in1k": cfg("dinat/checkpoints/imagenet1k/dinat_base_in1k_224.pth", "dinat-base-in1k-224"),
        "dinat_large.shi_in22k_ft_in1k": cfg(
            "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_224.pth", "dinat-large-in22k-in1k-224"
        ),
        "dinat_large.shi_in22k": cfg("dinat/checkpoints/imagenet22k/dinat_large_in22k_224.pth", num_classes=21841),
        "dinat_large_384.shi_in22k_ft_in1k": cfg_384(
            "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384.pth", "dinat-large-in22k-in1k-384"
        ),
        "dinat_large_384_11x11.shi_in22k_ft_in1k": cfg_384(
            "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384_11x11.pth", "dinat-large-11x11-in22k-in1k-384"
        ),
        "dinat_large_384_11x11.shi_in22k": cfg(
            "dinat/checkpoints/imagenet22k/dinat_large_in22k_224_11x11interp.pth", num_classes=21841
        ),
        "dinat_pico.untrained": _small_cfg(),
        "dinat_pico_patch4.untrained": _small_cfg(96, 6),
        "dinat_nano.untrained": _small_cfg(),
    }
)


@register_model
def nat_mini(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0)
    return create_nat("nat_mini", pretrained, **dict(model_args, **kwargs))


@register_model
def nat_tiny(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=64, depths=(3, 4, 18, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0)
    return create_nat("nat_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def nat_small(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2.0, ls_init_value=1e-5)
    return create_nat("nat_small", pretrained, **dict(model_args, **kwargs))


@register_model
def nat_base(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=128, depths=(3, 4, 18, 5), num_heads=(4, 8, 16, 32), mlp_ratio=2.0, ls_init_value=1e-5)
    return create_nat("nat_base", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_mini(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0, dilations="max")
    return create_nat("dinat_mini", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=64, depths=(3, 4, 18, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0, dilations="max")
    return create_nat("dinat_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_small(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2.0, dilations="max")
    return create_nat("dinat_small", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_base(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(
        embed_dim=128,
        depths=(3, 4, 18, 5),
        num_heads=(4, 8, 16, 32),
        mlp_ratio=2.0,
        dilations="max",
        ls_init_value=1e-5,
    )
    return create_nat("dinat_base", pretrained, **dict(model_args, **kwargs))


_LARGE = dict(embed_dim=192, depths=(3, 4, 18, 5), num_heads=(6, 12, 24, 48), mlp_ratio=2.0, dilations="max")


@register_model
def dinat_large(pretrained: bool = False, **kwargs) -> NAT:
    return create_nat("dinat_large", pretrained, **dict(_LARGE, **kwargs))


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(_LARGE, img_size=384)
    return create_nat("dinat_large_384", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(_LARGE, img_size=384, kernel_size=11)
    return create_nat("dinat_large_384_11x11", pretrained, **dict(model_args, **kwargs))


_PICO = dict(embed_dim=32, depths=(2, 2, 6), num_heads=(1, 2, 4), mlp_ratio=3.0, kernel_size=3, dilations="max")


@register_model
def dinat_pico(pretrained: bool = False, **kwargs) -> NAT:
    """For images of 32 to 96 pixels; ours, not published."""
    model_args = dict(_PICO, img_size=32, stem_stride=2)
    return create_nat("dinat_pico", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_pico_patch4(pretrained: bool = False, **kwargs) -> NAT:
    """For dense prediction on small images, with strides of 4, 8 and 16; ours, not published.

    Its MLPs tell its weights from those of dinat_pico, which a stride does not.
    """
    model_args = dict(_PICO, img_size=96, mlp_ratio=2.0)
    return create_nat("dinat_pico_patch4", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_nano(pretrained: bool = False, **kwargs) -> NAT:
    """For images of 32 to 96 pixels; ours, not published."""
    model_args = dict(
        img_size=32,
        embed_dim=64,
        depths=(2, 2, 4),
        num_heads=(2, 4, 8),
        mlp_ratio=3.0,
        kernel_size=3,
        dilations="max",
        stem_stride=2,
    )
    return create_nat("dinat_nano", pretrained, **dict(model_args, **kwargs))


register_model_deprecations(
    __name__,
    {
        "dinat_large_21k": "dinat_large.shi_in22k",
        "dinat_large_21k_11x11": "dinat_large_384_11x11.shi_in22k",
    },
)
