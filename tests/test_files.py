import pytest

from ddss_lightning.files import replacing


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
