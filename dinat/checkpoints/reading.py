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
from timm.models import clean_state_dict
from torch import Tensor

from dinat.errors import CheckpointError

AVERAGED = ("state_dict_ema", "model_ema")
NESTS = (
    "state_dict",
    "model",
    "model_state_dict",
    "module",
    "net",
)  # where several keys hold a state dict: in this order
TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # the number that files of torch.save before 1.6 begin with, pickled


def read_checkpoint(path: str | Path, use_ema: bool = True) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file, on the CPU and mapped into memory where the format allows.

    What a file is, its content says, whatever its name ends in.

    Args:
        use_ema: see `unwrap`.

    Raises:
        CheckpointError: no such file, a web page, a damaged file, one that needs code to be read, or none with tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: {'a folder, not a file' if Path(path).is_dir() else 'no such file'}.")
    refuse_web_page(path)
    with open(path, "rb") as file:
        start = file.read(16)
    is_safetensors = start[8:9] == b"{"  # what follows the length of its header
    if re.match(rb"\x80[\x02-\x05]", start) and not is_safetensors and TORCH_MAGIC not in start:
        raise CheckpointError(
            f"{path}: a plain pickle, as the .pkl files of detectron2 are, which cannot be read without running code. "
            "Start from the .pth or .safetensors file that it was made from."
        )
    try:
        if is_safetensors:
            content = load_file(path)
        else:
            mmap = zipfile.is_zipfile(path) and path.suffix != ".safetensors"  # torch.load believes that ending
            # timm's training checkpoints hold a Namespace
            with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file surfaces as anything from EOFError to UnpicklingError
        raise CheckpointError(f"{path}: not a readable checkpoint, or cut short: {_gist(error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict.")
    try:
        return unwrap(content, use_ema)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def unwrap(checkpoint: Mapping[str, Any], use_ema: bool = True) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, however deep it holds its state dict, without the prefixes of wrappers.

    The state dict is under one of the keys that training scripts use, or at the top, or under the only key that holds
    one.

    Args:
        use_ema: prefer averaged weights where there are both.

    Raises:
        CheckpointError: no tensors, or several state dicts; the message lists the keys.
    """
    nests = {key: value for key, value in checkpoint.items() if isinstance(value, Mapping) and _holds_tensors(value)}
    preferred = (*AVERAGED, *NESTS) if use_ema else (*NESTS, *AVERAGED)
    if found := next((key for key in preferred if key in nests), None):
        return unwrap(nests[found], use_ema)
    if tensors := _tensors(checkpoint):
        return clean_state_dict(tensors)
    if len(nests) == 1:
        return unwrap(*nests.values(), use_ema)
    what = f"holds {len(nests)} state dicts, so which is meant is open" if nests else "holds no tensors"
    raise CheckpointError(f"the checkpoint {what}; its top-level keys: {', '.join(map(str, checkpoint)) or 'none'}.")


def _tensors(checkpoint: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in checkpoint.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _holds_tensors(checkpoint: Mapping[Any, Any]) -> bool:
    """Whether there are tensors by name in it, at any depth; an optimizer's state is by number."""
    nested = (value for key, value in checkpoint.items() if isinstance(key, str) and isinstance(value, Mapping))
    return bool(_tensors(checkpoint)) or any(map(_holds_tensors, nested))


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
