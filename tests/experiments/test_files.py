"""Files of rows: CSV, TSV and JSON Lines as people write them, and what is wrong with some."""

import csv
import json
import warnings

import datasets
import pytest

from experiments.files import DataError, read_rows


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.csv", "text,label\na,1\nb,x\n", [dict(text="a", label="1"), dict(text="b", label="x")]),
        ("a.csv", '\n"te xt"\n"1, ""2""\n3"\n', [{"te xt": '1, "2"\n3'}]),
        ("a.csv", "text,label\nNA,null\n", [dict(text="NA", label="null")]),
        ("a.csv", "text,label\nNaN,\n", [dict(text="NaN", label="")]),
        ("a.csv", "text,label\r\n01,1.0\r\n", [dict(text="01", label="1.0")]),
        ("a.csv", "\ufefftext\né\n", [dict(text="é")]),
        ("a.csv", ",text\n0,a\n", [{"Unnamed: 0": "0", "text": "a"}]),
        ("a.tsv", "text\tlabel\na,b\t1\n", [dict(text="a,b", label="1")]),
        ("a.tsv", "text\tlabel\nfine \u2028film\t1\n", [dict(text="fine \u2028film", label="1")]),
        ("a.jsonl", '{"a": "b"}\n{"c": 1}\n', [dict(a="b", c=None), dict(a=None, c=1)]),
        ("a.jsonl", '{"a": true}\n', [dict(a=True)]),
        ("a.json", '[{"text": "a", "label": 0.5}]', [dict(text="a", label=0.5)]),
    ],
)
def test_rows(name, content, rows, tmp_path):
    assert read_rows(written(tmp_path, name, content)) == rows


def test_quotation_marks_may_be_text(tmp_path):
    path = written(tmp_path, "a.tsv", 'text\tlabel\n"a"\t1\n"b\t0\n')
    rows = [dict(text='"a"', label="1"), dict(text='"b', label="0")]
    assert read_rows(path, quoted=False) == rows
    with pytest.raises(DataError, match=r"a\.tsv: EOF inside string"):
        read_rows(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "text\na\n", r"a\.txt: the file must be one of \.csv, \.tsv, \.jsonl, \.json"),
        ("a.csv", " \n", "the file is empty"),
        ("a.csv", "text,label\n", r"no rows below the header \['text', 'label'\]"),
        ("a.csv", "text,text\na,b\n", r"must not name a column twice, got \['text', 'text'\]"),
        ("a.csv", "text,label\na,1\nb, b,1\n", "Expected 2 fields in line 3, saw 3"),
        ("a.csv", "text,label\na, a,1\nb, b,1\n", "more cells than the header: enclose texts in"),
        ("a.csv", 'text,label\n"a,1\nb,0\n', "EOF inside string"),
        ("a.csv", b"text,label\n\xff,1\n", r"a\.csv: must be UTF-8"),
        ("a.csv", b"\xff,label\na,1\n", r"a\.csv: must be UTF-8"),
        ("a.jsonl", '{"text": "a"}\nb\n', "JSON parse error: .* row 1"),
        ("a.jsonl", "{}\n", "the file has no rows"),
    ],
)
def test_bad_files(name, content, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_rows(written(tmp_path, name, content))


def test_no_such_file(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv: no such file"):
        read_rows(tmp_path / "a.csv")


def test_what_spreadsheets_write(tmp_path):
    """Any text goes through a CSV, with newlines and quotation marks, in the order of the file."""
    texts = ['said "no", and', "two\nlines", "tab\there", "", " padded ", "1,5", "é ü 漢"] * 20
    rows = [dict(text=text, label=str(i)) for i, text in enumerate(texts)]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    assert read_rows(tmp_path / "a.csv") == read_rows(tmp_path / "a.jsonl") == rows


def test_nothing_is_left_behind(tmp_path, monkeypatch, capfd):
    """No copies in a cache, no lines on the terminal; the library's settings are as before."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    before = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_rows(written(tmp_path, "a.csv", "text\na\n"))
    with pytest.raises(DataError):
        read_rows(written(tmp_path, "a.csv", "text\na,b\nc,d\n"))
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == before
    assert not (tmp_path / "cache").exists()
    assert capfd.readouterr() == ("", "")
