"""Reading checkpoint files: tensors only, never code."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dinat.errors import CheckpointError

NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")  # averaged weights first, as timm does


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file, on the CPU and mapped into memory where the format allows.

    Raises:
        CheckpointError: no such file, a web page, a damaged file, one that needs code to be read, or none with tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    refuse_web_page(path)
    try:
        with open(path, "rb") as file:
            header = file.read(9)[8:]
        if header == b"{":  # what follows the length in a safetensors file
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training checkpoints hold one
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file surfaces as anything from EOFError to UnpicklingError
        raise CheckpointError(f"{path}: not a readable checkpoint, or cut short: {_gist(error)}") from error
    tensors = unwrap(content) if isinstance(content, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors, so it is not a checkpoint.")
    return tensors


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose state dict is nested under one of timm's or the detection libraries' keys."""
    while nested := next((checkpoint[key] for key in NESTS if isinstance(checkpoint.get(key), Mapping)), None):
        checkpoint = nested
    return {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}


def refuse_web_page(path: Path) -> None:
    """Raises CheckpointError for HTML: what servers answer instead of a file."""
    with open(path, "rb") as file:
        start = file.read(256).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path}: a web page, not a checkpoint.")


def _gist(error: Exception) -> str:
    """The line of an error that says what is wrong; torch puts general advice around it."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line for line in lines if re.search(r"\bunsupported\b", line, re.IGNORECASE)), lines[0])
