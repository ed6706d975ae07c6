"""Models of `dinat.dense` as folders of transformers, which `from_pretrained` reads.

With our backbone, `import dinat.integrations.transformers` has to come before it. With transformers' own DiNAT, as in
the three OneFormers of the hub, `dinat.integrations.transformers.enable()` has to.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import DinatConfig, OneFormerConfig

from dinat import checkpoints
from dinat.checkpoints import Shape
from dinat.errors import UserError
from dinat.models.nat import ConvStem

from .folder import write_files
from .model import DenseModel


def save_pretrained(model: DenseModel, folder: Path, labels: Sequence[str], own_backbone: bool = True) -> None:
    """Writes config.json and model.safetensors for transformers.

    Args:
        model: a UPerNet, Mask2Former or OneFormer.
        labels: names of the classes.
        own_backbone: ours, with all its arguments; otherwise transformers' DiNAT.

    Raises:
        UserError: transformers has no such model.
    """
    if not hasattr(model, "network"):
        raise UserError(f"transformers has no {type(model).__name__}; it has UPerNet, Mask2Former and OneFormer.")
    prefix, backbone = model.timm_model
    prefix = prefix.removeprefix("network.")
    config, state = copy.deepcopy(model.network.config), model.network.state_dict()
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.architectures = [type(model.network).__name__]
    if isinstance(config, OneFormerConfig):  # of training with texts; a model that reads them there cannot predict
        config.is_training = False
        state = {key: value for key, value in state.items() if not key.startswith("model.text_mapper.")}
        state.setdefault("criterion.logit_scale", torch.tensor(1 / config.contrastive_temperature).log())
    if not own_backbone:
        config.backbone_config = dinat_config(backbone)
        there = prefix[: prefix.index("features.")]
        state = {key: value for key, value in state.items() if not key.startswith(prefix)}
        state |= checkpoints.to_huggingface(backbone.state_dict(), there)
    write_files(state, config.to_json_string(), folder)


def dinat_config(backbone: nn.Module) -> DinatConfig:
    """transformers' configuration of a NAT or DiNAT. Raises UserError for a backbone that it has not."""
    shape = Shape.of(backbone.state_dict())
    windows = {max(window) for window in shape.kernel_size}
    if len(windows) > 1 or not isinstance(backbone.patch_embed, ConvStem):
        raise UserError("transformers' own DiNAT has one window, and it has no DiNAT_s. Use --to huggingface.")
    return DinatConfig(
        num_channels=shape.in_chans,
        embed_dim=shape.embed_dim,
        depths=list(shape.depths),
        num_heads=list(shape.num_heads),
        kernel_size=windows.pop(),
        dilations=[list(level) for level in backbone.dilations],
        mlp_ratio=shape.mlp_ratio,
        layer_norm_eps=1e-5,
        layer_scale_init_value=1e-5 if shape.layer_scale else 0.0,
        out_features=[f"stage{i + 1}" for i in range(len(shape.depths))],
    )
