"""Where the files of one's own data lie, and how their images are read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors

from dinat.data.images import count_endings, open_image, walk_data
from dinat.data.sources import SYNONYMS
from dinat.errors import UserError

log = logging.getLogger("dinat")


def split_names(split: str) -> tuple[str, ...]:
    """The name of a split and its usual synonyms, the best first."""
    return (split, *SYNONYMS.get(split, ()))


def first_existing(candidates: Iterable[Path], what: str) -> Path:
    """The first of the files or folders that exists.

    Raises:
        UserError: where none does; it lists where was looked.
    """
    candidates = list(dict.fromkeys(candidates))
    for path in candidates:
        if path.exists():
            return path
    raise UserError(f"{what}: not found. Looked for {', '.join(map(str, candidates))}.")


def existing_root(root: str | Path | None) -> Path:
    """`data.root` as a path.

    Raises:
        UserError: where it is not set or no folder.
    """
    if root is None:
        raise UserError("data.root is not set. Set it to the folder that holds the data.")
    if not Path(root).is_dir():
        raise UserError(f"data.root={root}: no such folder.")
    return Path(root)


def read_image(path: Path) -> tv_tensors.Image:
    """An image file as uint8 (3, H, W)."""
    pixels = np.array(open_image(path))
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())


def named_files(folder: Path, endings: Collection[str]) -> dict[str, Path]:
    """Path below the folder, without its ending -> file, sorted; files with other endings are left out, and said.

    Raises:
        UserError: where there is none, or two have the same name.
    """
    files: dict[str, Path] = {}
    left_out: Counter[str] = Counter()
    for path in sorted(below / name for below, _, names in walk_data(folder) for name in names):
        place = path.relative_to(folder).as_posix()
        ending = next((ending for ending in endings if place.lower().endswith(ending.lower())), None)
        if ending is None:
            left_out[path.suffix.lower()] += 1
            continue
        if (name := place[: -len(ending)]) in files:
            raise UserError(f"{path} and {files[name].name} have the same name.")
        files[name] = path
    if left_out:
        log.info("%s: %s", folder, count_endings(left_out, "with other endings"))
    if not files:
        raise UserError(f"{folder}: holds no files of the kinds {', '.join(sorted(endings))}.")
    return files


def pair_files(images: dict[str, Path], masks: dict[str, Path]) -> list[tuple[Path, Path]]:
    """Images and masks of the same names.

    Raises:
        UserError: for one without the other.
    """
    alone = [f"{path}: has no mask" for name, path in images.items() if name not in masks]
    alone += [f"{path}: has no image" for name, path in masks.items() if name not in images]
    if alone:
        raise UserError(f"{alone[0]} of the same name ({len(alone)} such files). Add or remove them.")
    return [(path, masks[name]) for name, path in images.items()]


def refuse_other_classes(source: str, own: Sequence[str], classes: Sequence[str] | None) -> None:
    """Raises UserError unless the training data had the classes that this source has, or there was none (None)."""
    if classes is not None and list(classes) != list(own):
        raise UserError(f"{source} has other classes than in training: {list(own)}, not {list(classes)}.")
