"""A file is there whole, or as it was before."""

import json

import pytest

from zofo_optim.whole import whole, write_json


def test_a_block_that_ends_well_replaces_the_file(tmp_path):
    file = tmp_path / "some.txt"
    for text in ("first", "second"):
        with whole(file) as fresh:
            fresh.write_text(text)
            assert not file.exists() or file.read_text() == "first"
        assert file.read_text() == text
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_file_as_it_was(error, tmp_path):
    file = tmp_path / "some.txt"
    file.write_text("before")
    with pytest.raises(error), whole(file) as fresh:  # noqa: PT012
        fresh.write_text("half")
        raise error
    assert file.read_text() == "before"


def test_json_makes_its_folder_and_what_is_no_json_changes_no_file(tmp_path):
    file = tmp_path / "new" / "folder" / "some.json"
    write_json(file, {"loss": 0.5})
    assert file.read_text(encoding="utf-8") == '{\n "loss": 0.5\n}\n'
    with pytest.raises(TypeError):
        write_json(file, {"loss": object()})
    assert json.loads(file.read_text(encoding="utf-8")) == {"loss": 0.5}
