"""Images in class folders, on disk or in a .tar file: the class is the first folder below the split, at any depth."""

from __future__ import annotations

import io
import logging
import os
import re
import tarfile
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader

from dinat.data.images import image_endings, is_data, pick_images, walk_data
from dinat.errors import UserError

log = logging.getLogger("dinat")

BLOCK = 512  # bytes; a whole archive has one of zeros behind its last file
Span = tuple[int, int]  # where a file begins in an archive, and its length


class ClassFolders(Reader):
    """A reader as timm's, of `(open file, class index)`.

    Names that begin with a dot and `__MACOSX` are no data. Archives may hold archives, which count as folders, and may
    have one folder of their own name around everything.

    Args:
        root: the folder or .tar file of a split.
        class_map: class name -> index, or a file of it; None numbers the classes in natural order.
        known_from: where `class_map` comes from, for messages.
        complete: refuse class folders without images, which would have to count.
        endings: of files that are images; None for all that Pillow opens.

    Attributes:
        samples: (path, class index) in natural order; in an archive, the path is that of the member.
        class_to_idx: class name -> index.

    Raises:
        UserError: for an image without a class, a class that is not in `class_map`, two that look alike, one without
            images, or no images at all; for an archive that was cut short or holds links.
    """

    def __init__(
        self, root: str | Path, class_map: Mapping[str, int] | str | None = None, *, known_from: str = "data.class_map",
        complete: bool = True, endings: Collection[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.root = Path(root)
        files, folders = _list_archive(self.root) if self.root.is_file() else _list_folder(self.root)
        images, left_out = pick_images(files, endings)
        if left_out:
            log.info("data.root: %s: %s", root, left_out)
        if not images:
            readable = ", ".join(sorted(endings or image_endings()))
            raise UserError(
                f"data.root={root} cannot be opened: Found 0 images in its class folders. Readable are {readable}."
            )
        if stray := sorted(path for path in images if "/" not in path):
            raise UserError(
                f"data.root: images beside the class folders of {root} have no class ({len(stray)} of {len(images)}): "
                f"{_some(stray)}. Move them into a class folder, or away."
            )
        used = {path.partition("/")[0] for path in images}
        known = load_class_map(class_map, str(root)) if class_map else None
        self._check_classes(used | (folders if complete else set()), used, known, known_from)
        self.class_to_idx = dict(known or {name: index for index, name in enumerate(sorted(used, key=natural_key))})
        self.samples = [(path, self.class_to_idx[path.partition("/")[0]]) for path in sorted(images, key=natural_key)]
        self._spans = [files[path] for path, _ in self.samples] if self.root.is_file() else None
        if self._spans is None:
            self.samples = [(os.path.join(root, path), target) for path, target in self.samples]

    def _check_classes(self, found: set[str], used: set[str], known: Mapping[str, int] | None, known_from: str) -> None:
        spelled = {unicodedata.normalize("NFC", name): name for name in known or ()}
        for name in sorted(found, key=natural_key):
            where, composed = self.root / name, unicodedata.normalize("NFC", name)
            twin = spelled.setdefault(composed, name) if known is None else spelled.get(composed, name)
            if twin != name and name not in (known or ()):
                raise UserError(
                    f"data.root: class folder {where} looks like another class and has other characters: "
                    f"{name!a} here, {twin!a} there (Unicode's composed and decomposed forms). Rename one."
                )
            if known is not None and name not in known:
                raise UserError(
                    f"data.root: class folder {where} is not among the {len(known)} {known_from}, "
                    "so its images have no class. Rename it or move it away."
                )
            if name not in used:
                raise UserError(f"data.root: class folder {where} holds no images. Remove it or fill it.")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, target = self.samples[index]
        if self._spans is None:
            return open(path, "rb"), target
        start, length = self._spans[index]
        with self.root.open("rb") as archive:
            archive.seek(start)
            return io.BytesIO(archive.read(length)), target

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        if basename:
            return os.path.basename(path)
        if self._spans is None:
            return path if absolute else os.path.relpath(path, self.root)
        return f"{self.root}/{path}" if absolute else path


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts numbers in names by their value, as timm does; no two names are equal, and none is refused."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def _list_folder(root: Path) -> tuple[dict[str, None], set[str]]:
    """The files below a folder, as paths with slashes, and the folders directly in it."""
    files, folders = {}, set()
    for folder, below, names in walk_data(root):
        inner = folder.relative_to(root).as_posix()
        prefix = "" if inner == "." else f"{inner}/"
        folders.update(() if prefix else below)
        files.update(dict.fromkeys(prefix + name for name in names))
    return files, folders


def _list_archive(root: Path) -> tuple[dict[str, Span], set[str]]:
    """The same of an archive, with the place of each file in it."""
    files, folders = {}, set()
    with root.open("rb") as stream:
        for path, span in _walk_archive(stream, PurePosixPath(), 0):
            if all(map(is_data, path.parts)):
                if span:
                    files[path.as_posix()] = span
                folders.update(path.parts[: len(path.parts) - bool(span)][:1])
    if folders == {root.stem} and all("/" in path for path in files):  # tar cf train.tar train
        files = {path.partition("/")[2]: span for path, span in files.items()}
        folders = {path.partition("/")[0] for path in files if "/" in path}
    return files, folders


def _walk_archive(stream: BinaryIO, prefix: PurePosixPath, start: int) -> Iterator[tuple[PurePosixPath, Span | None]]:
    """All files and, with None, folders of an archive that begins at `start`."""
    end, path = 0, prefix
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        for member in archive:
            path = prefix / member.name
            end = member.offset_data + (-(-member.size // BLOCK) * BLOCK if member.isfile() else 0)
            if member.islnk() or member.issym() or member.issparse():
                raise UserError(
                    f"data.root: {path} in an archive is a link or a sparse file, not the image itself. "
                    "Write the archive anew with tar --dereference --hard-dereference."
                )
            if member.isdir():
                yield path, None
            elif member.isfile() and path.suffix.lower() == ".tar":
                inner = archive.extractfile(member)
                yield from _walk_archive(inner, path.with_suffix(""), start + member.offset_data)
            elif member.isfile():
                yield path, (start + member.offset_data, member.size)
    stream.seek(end)
    if stream.read(BLOCK) != bytes(BLOCK):  # tarfile takes an archive that was cut short for a whole one
        raise UserError(f"data.root: an archive ends early, after {path}. Copy or write it anew.")


def _some(names: Sequence[str], count: int = 8) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
