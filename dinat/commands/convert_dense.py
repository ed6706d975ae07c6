"""`dinat convert` with a model for dense prediction: a weights file to a model folder of ours or of transformers."""

from __future__ import annotations

from pathlib import Path

from dinat import dense
from dinat.errors import UserError


def convert_dense(source: Path, folder: Path, name: str, to: str) -> str:
    """Writes the folder; returns what it holds, in words.

    Args:
        name: of a published model.
        to: a value of `dinat.commands.weights.Layout`.

    Raises:
        UserError: weights that do not fit, or a model that transformers has not.
    """
    model = dense.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(source)})
    described = dense.describe(name)
    folder.mkdir(parents=True, exist_ok=True)
    if to == "timm":
        dense.save(model, described, folder)
    else:
        from dinat.dense.huggingface import save_pretrained

        try:
            save_pretrained(model, folder, described["label_names"], own_backbone=to == "huggingface")
        except UserError as error:
            raise UserError(f"--to {to}: {name}: {error}") from error
    return f"{name}: {len(model.state_dict())} tensors, {model.num_classes} classes, in {folder}"
