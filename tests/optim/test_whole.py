"""A file is there whole, or as it was before."""

import json
import math

import pytest

from zofo_optim.whole import strict, whole, write_json


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
    assert list(tmp_path.iterdir()) == [file]


def test_a_block_that_raises_before_it_writes(tmp_path):
    with pytest.raises(KeyError, match="first"), whole(tmp_path / "some.txt"):
        raise KeyError("first")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_none_in_json():
    found = {"curve": [{"loss": math.nan, "step": 1}], "worst": (math.inf, -math.inf, 2.0)}
    assert strict(found) == {"curve": [{"loss": None, "step": 1}], "worst": [None, None, 2.0]}


def test_json_makes_its_folder_and_what_is_no_json_changes_no_file(tmp_path):
    file = tmp_path / "new" / "folder" / "some.json"
    write_json(file, {"loss": 0.5})
    assert file.read_text(encoding="utf-8") == '{\n "loss": 0.5\n}\n'
    with pytest.raises(TypeError):
        write_json(file, {"loss": object()})
    assert json.loads(file.read_text(encoding="utf-8")) == {"loss": 0.5}
