"""Files that are whole or not there: written aside, then put in place."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dinat.errors import UserError

FULL = 1 << 16  # bytes that are free on a disk without room for a file


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)` and puts the finished file in `path`'s place; readers see the old or the new one.

    Raises:
        OSError: the disk is full, among others; whatever else `write` raises.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with telling_full_disk(path):
            write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself must survive a power cut
    finally:
        os.close(folder)


@contextmanager
def telling_full_disk(path: Path) -> Iterator[None]:
    """Within, what a library says when the disk has no room for `path` becomes the OSError that it is."""
    try:
        yield
    except Exception as error:  # PyTorch's is a RuntimeError about an unexpected position, safetensors quotes it
        full = os.strerror(errno.ENOSPC)
        if full in str(error) or shutil.disk_usage(path.parent).free < FULL:
            raise OSError(errno.ENOSPC, full, str(path)) from error
        raise


def read_json(path: Path) -> Any:
    """What a JSON file says. Raises UserError where it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON, perhaps cut off: {error}") from error


def write_text(path: Path, text: str) -> None:
    """`write_atomically` for a string."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with a header, atomically; all rows have the first one's columns."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def digest_of(path: Path, algorithm: str) -> str:
    """Hexadecimal digest of a file's content, by an algorithm of hashlib; not for secrets."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
