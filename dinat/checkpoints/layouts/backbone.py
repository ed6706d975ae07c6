"""The layouts in which weights of these models exist, brought to the models' own names and back.

Published .pth files, Hugging Face NAT and DiNAT (classifiers and backbones), detection and segmentation checkpoints
(mm*, detectron2, Mask2Former, OneFormer; nested and prefixed), and checkpoints of timm's training script.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinat.checkpoints.reading import unwrap
from dinat.errors import CheckpointError

# the first weight of a backbone; what precedes it is the prefix of the whole backbone
STEM = re.compile(r"(?:^|(?<=\.))(?:patch_embed\.proj|embeddings\.patch_embeddings\.projection)(?:\.0)?\.weight$")

# other layouts' names -> ours, in this order
NAMES = [
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.", ""),
    (r"^hidden_states_norms\.stage(\d+)\.", lambda match: f"norm{int(match[1]) - 1}."),
    (r"^layernorm\.", "norm."),
    (r"^(?:classifier|head)\.(weight|bias)$", r"head.fc.\1"),
    (r"^layers\.(\d+)\.(?=blocks|layers|downsample)", r"levels.\1."),  # DiNAT_s
    (r"^layers\.(\d+)\.", r"levels.\1.blocks.0."),  # isotropic: every block is a level of ours
    (r"^(levels\.\d+)\.layers\.", r"\1.blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
]

# ours -> Hugging Face's, for what has one counterpart there
HUGGINGFACE_NAMES = [
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^norm(\d+)\.", lambda match: f"hidden_states_norms.stage{int(match[1]) + 1}."),
    (r"^norm\.", "layernorm."),
    (r"^levels\.(\d+)\.downsample\.", lambda match: f"encoder.levels.{int(match[1]) - 1}.downsample."),
    (r"^levels\.(\d+)\.blocks\.", r"encoder.levels.\1.layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.rpb$", ".attention.self.rpb"),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]


def backbone_prefix(keys: Iterable[str]) -> str:
    """What the names of the backbone begin with. Raises CheckpointError unless there is one of these families."""
    keys = list(keys)
    prefixes = {key[: match.start()] for key in keys if (match := STEM.search(key))}
    if len(prefixes) != 1:
        found = f"{len(prefixes)} backbones, {', '.join(sorted(prefixes))}" if prefixes else "no backbone"
        raise CheckpointError(f"the checkpoint holds {found} of the NAT family; its keys begin {keys[:3]}.")
    return prefixes.pop()


def to_native(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of any of the layouts above under the models' own names, which pass through unchanged.

    What lies around a backbone (necks, decoders, detection heads) is left out. Published downsamplers sit at the end
    of a level, ours at the start of the next one. The index buffers of full attention are dropped.

    Raises:
        CheckpointError: no backbone of these families in it, or more than one.
    """
    state = unwrap(checkpoint)
    prefix = backbone_prefix(state)
    classifier = re.sub(r"(^|\.)(di)?nat\.$", r"\1", prefix) + "classifier."  # Hugging Face's is beside the backbone
    backbone = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    backbone |= {f"head.fc.{key.rsplit('.')[-1]}": state[key] for key in state if key.startswith(classifier)}
    renamed = {rename(key, NAMES): value for key, value in backbone.items()}

    ends_with_downsample = any(key.startswith("levels.0.downsample.") for key in renamed)
    out = {}
    for key, value in renamed.items():
        if key.endswith(".relative_position_index") or ".attn.key." in key or ".attn.value." in key:
            continue
        if ends_with_downsample:
            key = re.sub(r"^levels\.(\d+)\.downsample\.", lambda m: f"levels.{int(m[1]) + 1}.downsample.", key)
        if ".attn.query." in key:
            parts = [renamed[key.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            out[key.replace(".query.", ".qkv.")] = torch.cat(parts)
        elif key.endswith(".layer_scale_parameters"):
            block = key.removesuffix("layer_scale_parameters")
            out[f"{block}ls1.gamma"], out[f"{block}ls2.gamma"] = value.unbind()
        else:
            out[key] = value
    return out


def to_huggingface(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The models' own state dict under the names of transformers' NAT and DiNAT; the reverse of `to_native`.

    Args:
        state: of a NAT or DiNAT; transformers has no DiNAT_s or isotropic models.
        prefix: of the backbone there, "nat." or "dinat."; "" for a bare backbone.
    """
    out = {}
    for key, value in state.items():
        name = prefix + rename(key, HUGGINGFACE_NAMES)
        if key.startswith("head.fc."):
            out[key.replace("head.fc", "classifier")] = value
        elif ".attn.qkv." in key:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[name.replace(".attn.qkv.", f".attention.self.{part}.")] = rows.clone()
        elif key.endswith(".ls1.gamma"):
            scales = torch.stack([value, state[key.replace(".ls1.", ".ls2.")]])
            out[name.replace(".ls1.gamma", ".layer_scale_parameters")] = scales
        elif not key.endswith(".ls2.gamma"):
            out[name] = value
    return out


def rename(key: str, names: list[tuple]) -> str:
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    return key


@dataclass(frozen=True)
class Shape:
    """What the shapes of a state dict in our layout tell of the architecture; dilations are not in the weights.

    `kernel_size` is (height, width) per level, in tokens, or (depth, height, width); `num_classes` is 0 without a
    classifier.
    """

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    kernel_size: tuple[tuple[int, ...], ...]
    mlp_ratio: float
    layer_scale: bool
    stage_norm: bool
    num_classes: int
    in_chans: int

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Shape:
        """Raises CheckpointError for a state dict without the blocks of these models."""
        try:
            tables: list[list[Tensor]] = []
            while (table := f"levels.{len(tables)}.blocks.0.attn.rpb") in state:
                level = table.removesuffix("0.attn.rpb")
                depth = sum(key.startswith(level) and key.endswith(".rpb") for key in state)
                tables.append([state[f"{level}{i}.attn.rpb"] for i in range(depth)])
            stem = state.get("patch_embed.proj.0.weight", state.get("patch_embed.proj.weight"))
            hidden, dim = state["levels.0.blocks.0.mlp.fc1.weight"].shape
        except KeyError as error:
            raise CheckpointError(f"the checkpoint lacks {error}, so it is none of the NAT family.") from error
        return cls(
            embed_dim=dim,
            depths=tuple(map(len, tables)),
            num_heads=tuple(level[0].shape[0] for level in tables),
            kernel_size=tuple(tuple((side + 1) // 2 for side in level[0].shape[1:]) for level in tables),
            mlp_ratio=hidden / dim,
            layer_scale="levels.0.blocks.0.ls1.gamma" in state,
            stage_norm=any(re.match(r"norm\d", key) for key in state),
            num_classes=len(state["head.fc.weight"]) if "head.fc.weight" in state else 0,
            in_chans=stem.shape[1],
        )
