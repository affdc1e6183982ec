import json
import os

import pytest

from ruvjax.core.files import write_atomic, write_json


def test_writes_text_and_bytes(tmp_path):
    path = tmp_path / "new folder" / "note.txt"
    assert write_atomic(path, "naïve") == path
    assert path.read_bytes() == "naïve".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(path.parent) == ["note.txt"]


def test_permissions_are_those_of_a_plain_file(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    assert write_atomic(tmp_path / "ours", "x").stat().st_mode == plain.stat().st_mode
    plain.chmod(0o640)
    assert write_atomic(plain, "y").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen"])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = write_atomic(tmp_path / "state", "old")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state"]


def test_json(tmp_path):
    path = write_json(tmp_path / "a.json", {"größe": [1, 2.5, None]})
    assert json.loads(path.read_text("utf-8")) == {"größe": [1, 2.5, None]}
    assert path.read_text("utf-8").endswith("}\n")
    with pytest.raises(ValueError):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text("utf-8")) == {"größe": [1, 2.5, None]}
