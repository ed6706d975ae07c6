"""A dense model as a folder, model.safetensors and config.json: all that is needed to make it anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from dinat.errors import UserError
from dinat.files import read_json, write_atomically, write_text

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save(model: nn.Module, described: Mapping[str, Any], folder: Path) -> None:
    """Writes a model folder.

    Args:
        described: what config.json says: `task`; `model`, with `name`, `backbone` and `kwargs` of
            `dinat.dense.create_model`; `num_classes`, `label_names`, `category_ids` (the training data's id of each
            class) and `preprocessing`.
    """
    write_files(model.state_dict(), json.dumps(described, indent=2) + "\n", folder)


def write_files(state: Mapping[str, Tensor], config: str, folder: Path) -> None:
    """Writes weights, and the text of config.json."""
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    content = to_bytes(state, metadata={"format": "pt"})  # its save_file makes files that only their owner can read
    write_atomically(folder / WEIGHTS, lambda temporary: temporary.write_bytes(content))
    write_text(folder / CONFIG, config)


def is_dense(folder: str | Path) -> bool:
    """Whether it is the folder of a dense model."""
    config = Path(folder) / CONFIG
    return config.is_file() and "task" in read_json(config)


def read_config(folder: str | Path) -> dict[str, Any]:
    """What config.json of a model folder says.

    Raises:
        UserError: for a folder without one, a damaged one, or one of another kind of model.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: holds no {CONFIG}; give the folder of a dense model.")
    described = read_json(path)
    if "model" not in described or "task" not in described:
        raise UserError(f"{path}: is not of a dense model. timm.create_model('local-dir:{folder}') may read it.")
    return described


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Loads the weights of a model folder, all of them."""
    model.load_state_dict(load_file(Path(folder) / WEIGHTS))
