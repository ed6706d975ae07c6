"""MedMNIST (arXiv:2110.14795) and its corrupted test sets (MedMNIST-C, arXiv:2406.17536), without their packages.

A published FILE.npz is verified, and unpacked once to a folder FILE beside it, whose arrays are memory-mapped from then
on: those within a compressed file cannot be, and the largest have ten gigabytes.
"""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import WeakFileLock
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import Dataset

from dinat.errors import UserError, nearest
from dinat.files import digest_of, write_text

log = logging.getLogger("dinat")
URL = "https://zenodo.org/records/10519652/files"
SPLITS = ("train", "val", "test")


@lru_cache
def known_sets() -> dict[str, dict[str, Any]]:
    """Facts of the sets by name: see medmnist.yaml."""
    return OmegaConf.to_container(OmegaConf.load(Path(__file__).with_suffix(".yaml")))


class MedMNIST(Dataset):
    """A split of a set: `(PIL image, label)`, or `(volume, label)` with a volume of uint8 (depth, height, width).

    Labels are class indices, or vectors of zeros and ones where a set has several per image.

    Attributes:
        class_to_idx: class names and their indices.
        label_kind: "multi_hot" where there are several per image, else None.
        volumes: whether the set is of volumes.
        ranking: that the published figures are AUC and accuracy.

    Args:
        name: "medmnist/SET@SIZE" with a size of 28 (unless given), 64, 128 or 224, read from ROOT/SET.npz or
            ROOT/SET_SIZE.npz; or "medmnist_c/SET/CORRUPTION", from ROOT/SET/CORRUPTION.npz.
        part: "train", "val" or "test", the only one of corrupted sets.
        download: whether to fetch a file that is not there.

    Raises:
        UserError: an unknown name or split, a file that is missing, changed, or not as it should be.
    """

    ranking = True  # scored by AUC

    def __init__(self, name: str, root: str | Path | None, part: str, download: bool = False) -> None:
        kind, _, rest = name.partition("/")
        corrupted = kind == "medmnist_c"
        rest, _, variant = rest.partition("/" if corrupted else "@")
        sets = known_sets()
        if rest not in sets:
            raise UserError(f"data.name={name}: no such set. Known: {', '.join(sets)}.{nearest(rest, sets)}")
        facts = sets[rest]
        sizes = [224] if corrupted else list(facts["md5"])
        size = "224" if corrupted else variant or "28"
        if corrupted and not variant:
            raise UserError(f"data.name={name}: which corruption? Write medmnist_c/{rest}/CORRUPTION.")
        if size not in map(str, sizes):
            raise UserError(f"data.name={name}: {rest} has the sizes {', '.join(map(str, sizes))}.")
        parts = SPLITS[2:] if corrupted else SPLITS
        if part not in parts:
            raise UserError(f"data: no split '{part}' in {name}. It has {', '.join(parts)}.")
        if root is None:
            raise UserError(f"data.root is not set. Set it to the folder that holds {rest}.npz and others.")
        if corrupted:
            file, md5 = Path(root, rest, f"{variant}.npz"), None
        else:
            file, md5 = Path(root, f"{rest}.npz" if size == "28" else f"{rest}_{size}.npz"), facts["md5"][int(size)]
        folder = unpacked(file, md5, download)
        self.images, self.targets = (load(folder, f"{part}_{what}", file) for what in ("images", "labels"))
        self.volumes = facts["channels"] == 0
        several = facts["task"].startswith("multi-label")
        self.label_kind = "multi_hot" if several else None
        self.class_to_idx = {label: index for index, label in enumerate(facts["classes"])}
        side, colours = int(size), (3,) * (facts["channels"] == 3)
        check_shape(
            self.images, (len(self.images), *[side] * (3 if self.volumes else 2), *colours), file, part, "images"
        )
        columns = len(self.class_to_idx) if several else 1
        check_shape(self.targets, (len(self.images), columns), file, part, "labels")
        log.info("%s, %s: %d %s, licence %s", name, part, len(self), *describe(facts))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image | np.ndarray, int | np.ndarray]:
        image, target = np.array(self.images[index]), self.targets[index].astype(int)
        return image if self.volumes else Image.fromarray(image), target if self.label_kind else target.item()


def describe(facts: dict[str, Any]) -> tuple[str, str]:
    """What a set is of, and its licence."""
    licence = facts["licence"]
    what = "volumes" if facts["channels"] == 0 else "images"
    return what, f"{licence} (non-commercial use only)" if "NC" in licence else licence


def load(folder: Path, array: str, file: Path) -> np.ndarray:
    """One of the unpacked arrays, memory-mapped."""
    path = folder / f"{array}.npy"
    if not path.is_file():
        found = ", ".join(sorted(path.stem for path in folder.glob("*.npy"))) or "nothing"
        raise UserError(f"{file}: lacks {array}; it holds {found}.")
    return np.load(path, mmap_mode="r")


def check_shape(array: np.ndarray, shape: tuple[int, ...], file: Path, part: str, what: str) -> None:
    """Raises UserError for an array of another shape, or images that are not uint8."""
    wrong_type = what == "images" and array.dtype != np.uint8
    if array.shape != shape or wrong_type:
        raise UserError(
            f"{file}: {part}_{what} is {array.dtype} {tuple(array.shape)}, not {'uint8 ' * (what == 'images')}{shape}."
        )


def unpacked(file: Path, md5: str | None, download: bool) -> Path:
    """The folder with the arrays of a .npz file, which is fetched, verified and unpacked where that is still to do."""
    folder = file.with_suffix("")
    record = folder / "md5.txt"
    if not file.parent.is_dir():
        raise UserError(f"data.root: {file.parent} is no folder, {file.name} should be in it.")
    if not record.is_file():
        with WeakFileLock(file.with_name(f".{file.name}.lock")):
            if not record.is_file():  # nor has another process been faster
                if not file.is_file():
                    fetch(file, md5, download)
                unpack(file, folder, md5)
    if md5 not in (None, digest := record.read_text().strip()):
        raise UserError(f"{folder} was unpacked from a file of MD5 {digest}, not {md5} as published. Delete it.")
    return folder


def fetch(file: Path, md5: str | None, download: bool) -> None:
    """Downloads a published file, or says where it is."""
    if md5 is None:
        raise UserError(f"{file}: no such file. The package medmnistc makes it from the files of 224 pixels.")
    url = f"{URL}/{file.name}?download=1"
    if not download:
        raise UserError(f"{file}: no such file. data.download=true fetches it from {url}")
    try:
        torch.hub.download_url_to_file(url, str(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be fetched from {url}: {error}. Put it there by hand.") from error


def unpack(file: Path, folder: Path, md5: str | None) -> None:
    """Writes the arrays of a .npz file into `folder`, which is complete as soon as there is one."""
    digest = digest_of(file, "md5")
    if md5 not in (None, digest):
        raise UserError(f"{file}: its MD5 is {digest}, not {md5} as published. Delete it and fetch it again.")
    log.info("unpacking %s, once", file)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(file) as archive:
            archive.extractall(temporary)
        write_text(temporary / "md5.txt", f"{digest}\n")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except zipfile.BadZipFile as error:
        raise UserError(f"{file}: not a .npz file: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
