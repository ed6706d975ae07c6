"""Golden outputs of the original heads (golden/dense/README.md), and models with weights from their original keys."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dinat.dense
from dinat.checkpoints.layouts import HEADS, rename_heads
from dinat.dense import create_model

GOLDEN = Path(__file__).parents[2] / "golden" / "dense"
SMALL = dict(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))  # maps as the goldens': 32 to 256 channels


class Maps(nn.Module):
    """Feature maps that were made elsewhere, in the place of a backbone."""

    strides = (4, 8, 16, 32)

    def __init__(self, maps: list[torch.Tensor], wrap: Callable = list) -> None:
        super().__init__()
        self.maps, self.wrap = maps, wrap

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self.wrap(self.maps)


@pytest.fixture(scope="session")
def dense_fill():
    """golden/dense/fill.py."""
    spec = importlib.util.spec_from_file_location("golden_dense_fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def keys() -> dict[str, dict[str, list[int]]]:
    """Original state-dict keys of each method's head, with their shapes."""
    return json.loads((GOLDEN / "keys.json").read_text())


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="session")
def original(dense_fill, keys) -> Callable[..., nn.Module]:
    """A model whose head has the golden weights, taken from their original names, and whose backbone yields maps."""

    def original(method: str, maps: list[torch.Tensor], wrap: Callable = list, **kwargs) -> nn.Module:
        with torch.device("meta"):  # all weights come from elsewhere
            model = dinat.dense.create_model(method, backbone_kwargs=SMALL, **kwargs)
        replace(model, model.backbone, Maps(maps, wrap))
        weights = {key: dense_fill.tensor_for(key, tuple(shape)) for key, shape in keys[method].items()}
        weights = {key: value.long() if "num_batches" in key else value for key, value in weights.items()}
        if method in ("mask2former", "oneformer"):  # beside the heads in published files
            weights["criterion.empty_weight"] = torch.ones(134).index_fill(0, torch.tensor([133]), 0.1)
        if method == "oneformer":
            weights["criterion.logit_scale"] = torch.tensor(1 / 0.07).log()
        model.load_state_dict(rename_heads(weights, HEADS[method].rows), assign=True)
        return model.eval()

    return original


TINY_QUERIES = dict(width=32, heads=4, queries=5, encoder_layers=1, decoder_layers=2, encoder_mlp=32, decoder_mlp=32)
TINY_RCNN = dict(fpn_channels=16, box_channels=16, mask_channels=8)
TINY = {  # arguments that make a head small
    "mask_rcnn": TINY_RCNN,
    "cascade_mask_rcnn": TINY_RCNN,
    "upernet": dict(channels=16, auxiliary_channels=8),
    "mask2former": TINY_QUERIES,
    "oneformer": TINY_QUERIES,
}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    """Makes a small model under the name of a published one, from which it differs in nothing else."""

    def tiny(name: str, pretrained: bool = False, backbone_kwargs: dict | None = None, **kwargs) -> nn.Module:
        small = dict(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 1, 1, 1), kernel_size=3)
        small |= dict(dilations=[[1], [1, 2], [1], [1]]) | (backbone_kwargs or {})
        arguments = TINY[dinat.dense.PUBLISHED[name].method] | kwargs
        return create_model(name, pretrained, backbone_kwargs=small, **arguments)

    return tiny


@pytest.fixture(scope="session")
def randomized(tiny) -> Callable[..., tuple[nn.Module, dict[str, torch.Tensor]]]:
    """A model of `tiny` whose tensors all differ, and its state dict."""

    def randomized(name: str, **kwargs) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        model = tiny(name, **kwargs)
        for value in model.state_dict().values():
            value.copy_(torch.randn_like(value) if value.is_floating_point() else torch.full_like(value, 7))
        return model, {key: value.clone() for key, value in model.state_dict().items()}

    return randomized


@pytest.fixture(scope="session")
def as_published(keys) -> Callable[[nn.Module], dict[str, torch.Tensor]]:
    """A model's weights under their original names; those of heads are proven by the golden outputs."""

    def as_published(model: nn.Module) -> dict[str, torch.Tensor]:
        own, backbone, out = model.state_dict(), model.timm_model[1].state_dict(), {}
        for key, value in backbone.items():
            key = re.sub(r"levels\.(\d)\.downsample", lambda match: f"levels.{int(match[1]) - 1}.downsample", key)
            key = re.sub(r"ls([12])\.gamma", r"gamma\1", key)
            key = key.replace("levels.", "layers.") if "patch_embed.proj.weight" in backbone else key  # DiNAT_s
            out["backbone." + key] = value
        around = [*keys[model.method], "criterion.empty_weight"] if "former" in model.method else keys[model.method]
        for key in around:
            names = rename_heads({key: torch.zeros(3)}, HEADS[model.method].rows)
            if names.keys() <= own.keys():
                parts = [own[name] for name in names]
                out[key] = torch.cat(parts) if len(parts) > 1 else parts[0]
        return out

    return as_published


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, module in model.named_modules() if module is old)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


@pytest.fixture(scope="session")
def level_maps(dense_fill) -> Callable[..., list[torch.Tensor]]:
    """The goldens' four feature maps of an image; `name` has the number of the level."""

    def level_maps(name: str, height: int, width: int, first: int = 0) -> list[torch.Tensor]:
        sides = [(-(-height // 2 ** (i + 2)), -(-width // 2 ** (i + 2))) for i in range(4)]
        shapes = [(1, 32 * 2**i, *side) for i, side in enumerate(sides)]
        return [dense_fill.tensor_for_input(name.format(i + first), shape) for i, shape in enumerate(shapes)]

    return level_maps
