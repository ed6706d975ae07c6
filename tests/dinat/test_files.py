"""Files that are whole or not there."""

import os
import stat

import pytest

from dinat.files import write_atomically, write_text


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "file.txt", "old")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        write_atomically(tmp_path / "file.txt", fail)
    assert (tmp_path / "file.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_content_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    done, replace = [], os.replace

    def fsync(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "content")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("name"), replace(*names)))
    write_text(tmp_path / "file.txt", "new")
    assert (tmp_path / "file.txt").read_text() == "new"
    assert done == ["content", "name", "folder"]
