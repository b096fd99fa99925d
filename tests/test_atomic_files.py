import subprocess
import sys

import pytest

from stages.files import open_atomic, replace_folder, write_atomic


def test_a_file_holds_what_was_written_last(tmp_path):
    path = tmp_path / "new folder" / "é.txt"
    write_atomic(path, "ä text\n")
    assert path.read_bytes() == "ä text\n".encode()
    write_atomic(path, b"\0bytes")
    assert path.read_bytes() == b"\0bytes"
    assert [child.name for child in path.parent.iterdir()] == ["é.txt"]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def write_half() -> None:
        with open_atomic(path) as file:
            file.write(b"half of the new one")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    script = f"""
import os
from pathlib import Path
from stages.files import open_atomic
with open_atomic(Path({str(path)!r})) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert path.read_text() == "old"


def test_a_folder_gives_way_to_another(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").write_text("old")
    (tmp_path / "new" / "deep").mkdir(parents=True)
    (tmp_path / "new" / "deep" / "file").write_text("new")
    replace_folder(tmp_path / "new", tmp_path / "final")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["final", "final/deep", "final/deep/file"]
