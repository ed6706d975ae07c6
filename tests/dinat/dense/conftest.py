"""Golden outputs of the original heads (golden/dense/README.md), and models with weights from their original keys."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dinat.dense
from dinat.checkpoints import fit_dense
from dinat.checkpoints.layouts import detectron2, mm

GOLDEN = Path(__file__).parents[2] / "golden" / "dense"
ROWS = {
    "mask_rcnn": mm.MASK_RCNN,
    "cascade_mask_rcnn": mm.CASCADE_MASK_RCNN,
    "upernet": mm.UPERNET,
    "mask2former": detectron2.MASK2FORMER,
    "oneformer": detectron2.ONEFORMER,
}
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
def fill():
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
def original(fill, keys) -> Callable[..., nn.Module]:
    """A model whose head has the golden weights, taken from their original names, and whose backbone yields maps."""

    def original(method: str, maps: list[torch.Tensor], wrap: Callable = list, **kwargs) -> nn.Module:
        with torch.device("meta"):  # all weights come from elsewhere
            model = dinat.dense.create_model(method, backbone_kwargs=SMALL, **kwargs)
        replace(model, model.backbone, Maps(maps, wrap))
        weights = {key: fill.tensor_for(key, tuple(shape)) for key, shape in keys[method].items()}
        weights = {key: value.long() if "num_batches" in key else value for key, value in weights.items()}
        if method in ("mask2former", "oneformer"):  # beside the heads in published files
            weights["criterion.empty_weight"] = torch.ones(134).index_fill(0, torch.tensor([133]), 0.1)
        if method == "oneformer":
            weights["criterion.logit_scale"] = torch.tensor(1 / 0.07).log()
        model.load_state_dict(fit_dense(weights, model, ROWS[method]), assign=True)
        return model.eval()

    return original


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, module in model.named_modules() if module is old)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


@pytest.fixture(scope="session")
def level_maps(fill) -> Callable[..., list[torch.Tensor]]:
    """The goldens' four feature maps of an image; `name` has the number of the level."""

    def level_maps(name: str, height: int, width: int, first: int = 0) -> list[torch.Tensor]:
        sides = [(-(-height // 2 ** (i + 2)), -(-width // 2 ** (i + 2))) for i in range(4)]
        shapes = [(1, 32 * 2**i, *side) for i, side in enumerate(sides)]
        return [fill.tensor_for_input(name.format(i + first), shape) for i, shape in enumerate(shapes)]

    return level_maps
