import pytest

from ddss_lightning.files import replacing, why_no_folder


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


def test_a_folder_that_can_be_made_is_not_left_behind(tmp_path):
    assert not why_no_folder(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "a"):
        assert "is no folder and cannot be made" in why_no_folder(path)
    assert not why_no_folder(tmp_path)
