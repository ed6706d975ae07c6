"""Files that are whole or not there."""

import errno
import os
import shutil
import stat
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from dinat.errors import UserError, explain_os
from dinat.files import read_json, write_atomically, write_text


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "file.txt", "old")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        write_atomically(tmp_path / "file.txt", fail)
    assert (tmp_path / "file.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("message", "free"), [("unexpected pos 2008384 vs 2008272", 0), ("I/O error: No space left on device (28)", 9e9)]
)
def test_a_full_disk_is_told_whatever_a_library_says(tmp_path, monkeypatch, message, free):
    """torch.save's message, and that of safetensors, which takes back what it wrote."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(OSError, match="No space left on device") as error:
        write_atomically(tmp_path / "last.pt", Mock(side_effect=RuntimeError(message)))
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "last.pt"))
    assert explain_os(error.value) == f"{tmp_path}/last.pt: No space left on device."
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_of_settings_is_named(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"task": "detec')
    with pytest.raises(UserError, match=r"config\.json: not JSON, perhaps cut off: Unterminated string"):
        read_json(tmp_path / "config.json")


def test_the_content_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    done, replace = [], os.replace

    def fsync(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "content")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("name"), replace(*names)))
    write_text(tmp_path / "file.txt", "new")
    assert (tmp_path / "file.txt").read_text() == "new"
    assert done == ["content", "name", "folder"]
