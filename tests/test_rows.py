"""Files of each kind and the hub give rows; what cannot be read is named."""

import csv
import gzip
import json
import sys
import types

import pytest

from proxy_jax.errors import InputError
from proxy_jax.rows import Hub, Row, read_jsonl, read_rows, read_whole_lines

HUB = Hub("owner/set", "part", "test")
ROWS = [{"text": "é", "more": 'a "b"\nc'}, {"text": "b", "more": ""}]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_every_kind_of_file_reads_the_same(tmp_path):
    contents = {
        "a.jsonl": lines(ROWS).encode(),
        "b.jsonl.gz": gzip.compress(b"\n" + lines(ROWS).encode()),
        "c.json": json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
        "d.json.gz": gzip.compress(json.dumps({"Data": ROWS}).encode()),
        "e.json": lines(ROWS).encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with (tmp_path / "f.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    for name in (*contents, "f.csv"):
        assert [row.fields for row in read_rows(str(tmp_path / name), HUB)] == ROWS, name


def test_where_rows_are(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\r\n \n{"a": 2}')
    expected = [Row(f"{path}:1", 1, {"a": 1}), Row(f"{path}:3", 3, {"a": 2})]
    assert read_rows(str(path), None) == expected
    monkeypatch.setenv("ROWS", str(tmp_path))
    assert read_rows("$ROWS/rows.jsonl", None) == expected


def test_lines_are_read_as_they_are_needed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nnot JSON\n')
    rows = read_jsonl(path)
    assert next(rows).fields == {"a": 1}
    with pytest.raises(InputError, match=r"rows.jsonl:2: not JSON"):
        next(rows)


def test_a_half_written_line_is_none(tmp_path):
    path = tmp_path / "outputs.jsonl"
    path.write_bytes(lines(ROWS).encode() + '{"text": "é'.encode()[:-1])
    rows = [Row(f"{path}:{number}", number, fields) for number, fields in enumerate(ROWS, 1)]
    assert list(read_whole_lines(path)) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{}\n{"a"\n', "outputs.jsonl:2: not JSON"),
        (b"{}\n\xff{}\n", "outputs.jsonl:2: not UTF-8"),
        (b"{}\n\0\0\n", "outputs.jsonl:2: not JSON"),
        (b"{}\n" + b"[" * 100_000 + b"\n", "outputs.jsonl:2: not JSON"),
        (b"3\n", "outputs.jsonl:1: expected a JSON object, found int"),
    ],
)
def test_damaged_lines(tmp_path, content, message):
    path = tmp_path / "outputs.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_whole_lines(path))


def test_lines_of_no_file(tmp_path):
    with pytest.raises(InputError, match="absent: No such file"):
        list(read_whole_lines(tmp_path / "absent"))
    with pytest.raises(InputError, match="not a regular file"):
        list(read_whole_lines(tmp_path))


def test_hub(monkeypatch):
    asked = []

    def load_dataset(*names, **settings):
        asked.append((names, settings))
        return [{"a": 1}, {"a": 2}]

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    address = Hub("hf://datasets/owner/set/file.json")
    found = [read_rows(*given) for given in (("", HUB), ("other/copy", HUB), ("", address))]
    assert found[1] == [
        Row("other/copy:test:1", 1, {"a": 1}),
        Row("other/copy:test:2", 2, {"a": 2}),
    ]
    assert asked == [
        (("owner/set", "part"), {"split": "test"}),
        (("other/copy", "part"), {"split": "test"}),
        (("json",), {"data_files": address.id, "split": "train"}),
    ]


def test_hub_that_gives_nothing(monkeypatch):
    def load_dataset(*names, **settings):
        raise ConnectionError("no route\nat all")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match=r"owner/set: no such file, .* hub \(no route at all\)$"):
        read_rows("", HUB)
    empty = types.SimpleNamespace(load_dataset=lambda *names, **settings: [])
    monkeypatch.setitem(sys.modules, "datasets", empty)
    with pytest.raises(InputError, match="owner/set: no rows in split 'test'"):
        read_rows("", HUB)
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    with pytest.raises(InputError, match=r"need the datasets library \(pip install datasets\)$"):
        read_rows("", HUB)
    with pytest.raises(InputError, match="not on the hub; give its file"):
        read_rows("", None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a"\n', r"a.jsonl:2: not JSON \(Expecting ':' delimiter.*\)$"),
        ("a.jsonl", "[" * 100_000, r"a.jsonl:1: not JSON \(.*\)$"),
        ("a.jsonl", "\n\n[1]\n", "a.jsonl:3: expected a JSON object, found list$"),
        ("a.jsonl", '{"a": "\\ud800"}', r"a.jsonl:1: not valid Unicode \(.*surrogates not allowed"),
        ("a.jsonl", "\n", "a.jsonl: no rows$"),
        (
            "a.json",
            '{"Data": 1}',
            "a.json: expected a list of rows, or an object with a list 'Data'$",
        ),
        ("a.json", "[1]", "a.json: row 1: expected a JSON object, found int$"),
        ("a.json", "", "a.json: not JSON"),
        ("a.csv", "a,b\n", "a.csv: no rows$"),
        ("a.csv", "a\n" + "x" * 200_000, r"a.csv: not CSV \(field larger than field limit"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv: record 2: more values than the header has columns$"),
        ("a.parquet", "x", "a.parquet: expected a .jsonl, .json, .csv file, or one of those .gz$"),
        ("a.jsonl", b'{"a": "\xe9"}', "a.jsonl: not UTF-8"),
        ("a.jsonl.gz", "not compressed", "a.jsonl.gz: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b"{}" * 99, mtime=0)[:-4],
            "a.jsonl.gz: cannot be read .Compressed file ended before",
        ),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        read_rows(str(path), HUB)
    assert "\n" not in str(error.value)


def test_absent_file(tmp_path):
    with pytest.raises(InputError, match=r"b.jsonl: No such file or directory$"):
        read_rows(str(tmp_path / "b.jsonl"), HUB)
    with pytest.raises(InputError, match=r"^data/b.jsonl: No such file or directory$"):
        read_rows("data/b.jsonl", HUB)  # nobody's hub id


def test_fields():
    row = Row("data.jsonl:2", 2, {"a": "x", "b": " ", "c": ["x", "y"], "d": {"e": "z"}, "f": None})
    assert row.field("none", "f") is None
    assert row.text("none", "a") == "x"
    assert row.text("b", empty=True) == " "
    assert row.texts("c") == ["x", "y"]
    assert row.part("d").text("e") == "z"


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda row: row.field("q"), "no field 'q'; it has 'a', 'b', 'c'"),
        (lambda row: row.field("q", "r"), "no field 'q' or 'r'; it has 'a', 'b', 'c'"),
        (lambda row: Row("data.jsonl:2", 2, {}).field("q"), "no field 'q'; it has no field"),
        (lambda row: row.text("a"), "a must be a string, not int"),
        (lambda row: row.text("b"), "b is empty"),
        (lambda row: row.texts("c"), "c must be a list of strings, not []"),
        (lambda row: row.part("c"), "c must be an object, not []"),
    ],
)
def test_fields_that_cannot_be_used(read, message):
    with pytest.raises(InputError) as error:
        read(Row("data.jsonl:2", 2, {"a": 1, "b": " ", "c": []}))
    assert str(error.value) == f"data.jsonl:2: {message}"
