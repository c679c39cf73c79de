from pathlib import Path

import pytest

from ddss_lightning.files import default_cache_dir, replacing, why_no_folder


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.json"
    with replacing(path) as partial:
        partial.write_text("old")
        assert not path.exists()
    with pytest.raises(UnicodeEncodeError), replacing(path) as partial:
        partial.write_text("ne\ud800", encoding="utf-8")
    assert path.read_text() == "old"
    with replacing(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["table.json"]


def test_folders_that_can_be_written_to(tmp_path, monkeypatch):
    assert not why_no_folder(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "a"):
        assert why_no_folder(path) == f"'{path}' is no folder, for '{tmp_path / 'file'}' is a file; give another"
    assert not why_no_folder(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)
    assert f"you may not write to '{tmp_path}'" in why_no_folder(tmp_path / "a")


def test_the_cache_is_never_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "ddss_lightning"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_cache_dir() == Path.home() / ".cache" / "ddss_lightning"
