"""Rows of JSON, CSV, TSV and Parquet files are documents; what is not a row of text is refused by name."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pondera.core.errors import UserError
from pondera.data.row_files import READERS
from pondera.data.text import open_text
from pondera.evaluation.long_text import documents

ROWS = [{"text": f'He said: "{n}", é.\nShe left.\t{n}', "id": str(n)} for n in range(5)]


def lines(rows: list[dict]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def table(rows: list[dict], delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(rows: list[dict]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=2)
    return out.getvalue()


WRITERS: dict[str, Callable[[list[dict]], bytes]] = {
    ".jsonl": lines,
    ".ndjson": lines,
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".csv": table,
    ".tsv": lambda rows: table(rows, "\t"),
    ".parquet": parquet,
}
ENDINGS = pytest.mark.parametrize("ending", list(WRITERS))


def write(path: Path, content: bytes) -> str:
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    with opener(path, "wb") as file:
        file.write(content)
    return str(path)


def test_every_ending_is_tested():
    assert set(WRITERS) == set(READERS)


@pytest.mark.parametrize("packed", ["", ".gz", ".XZ"])
@pytest.mark.parametrize("upper", [False, True])
@ENDINGS
def test_rows_are_documents_named_by_title_or_number(ending: str, upper: bool, packed: str, tmp_path: Path):
    name = f"a{ending.upper() if upper else ending}{packed}"
    path = write(tmp_path / name, WRITERS[ending]([*ROWS[:3], {**ROWS[3], "text": " "}, ROWS[4]]))
    found = list(open_text(path).read())
    assert [document.text for document in found] == [ROWS[n]["text"] for n in (0, 1, 2, 4)]
    assert [document.name for document in found] == [f"{name}:{n}" for n in (1, 2, 3, 5)]
    titled = write(tmp_path / f"b{ending}", WRITERS[ending]([{"title": f"T{n}", **row} for n, row in enumerate(ROWS)]))
    assert [document.name for document in open_text(titled).read()] == [f"T{n}" for n in range(5)]
    assert list(documents(open_text(path), path)) == [document.text for document in found], (
        "rows are texts of their own"
    )


@ENDINGS
def test_another_column(ending: str, tmp_path: Path):
    path = write(tmp_path / f"a{ending}", WRITERS[ending]([{"body": row["text"], "id": row["id"]} for row in ROWS]))
    assert [document.text for document in open_text(path, "body").read()] == [row["text"] for row in ROWS]
    with pytest.raises(UserError, match="did you mean 'body'"):
        list(open_text(path, "bdy").read())
    with pytest.raises(UserError, match=r"text field of a\..*\(allowed: body, id\)"):
        list(open_text(path).read())


@ENDINGS
def test_in_a_folder_they_are_read_as_rows_too(ending: str, tmp_path: Path):
    write(tmp_path / f"a{ending}", WRITERS[ending](ROWS))
    (tmp_path / "b.txt").write_text("plain")
    assert [document.text for document in open_text(str(tmp_path)).read()] == [*(row["text"] for row in ROWS), "plain"]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1, max_size=4))
def test_csv_gives_back_any_text(texts: list[str]):
    for delimiter, ending in ((",", ".csv"), ("\t", ".tsv")):
        file = io.BytesIO(table([{"text": text, "id": 1} for text in texts], delimiter))
        assert [row["text"] for _, row in READERS[ending](file, "x", ("text",))] == texts


def test_a_csv_field_may_be_long_and_the_limit_of_the_process_stays(tmp_path: Path):
    before, text = csv.field_size_limit(), "word " * 60_000
    path = write(tmp_path / "a.csv", table([{"text": text}]))
    assert [document.text for document in open_text(path).read()] == [text]
    assert csv.field_size_limit() == before < len(text)


def test_json_lines_called_json_and_one_object(tmp_path: Path):
    assert len(list(open_text(write(tmp_path / "a.json", lines(ROWS))).read())) == 5
    assert [d.text for d in open_text(write(tmp_path / "b.json", json.dumps(ROWS[0]).encode())).read()] == [
        ROWS[0]["text"]
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "empty"),
        ("a.json", b'{"name": "x", "version": 1}', "neither a list of rows nor an object with the field 'text'"),
        ("a.json", b"3", "neither a list of rows"),
        ("a.json", b'["one", "two"]', "a.json:1: expected an object such as"),
        ("a.json", b'[{"text": "a"}', "a.json: not valid JSON"),
        ("a.json", b"[" * 200_000, "a.json: not valid JSON"),
        ("a.ndjson", b'{"text": "a"}\n{"text', "a.ndjson:2: not valid JSON"),
        ("a.csv", b"", "empty"),
        ("a.csv", b"id,text\n1,Well, no", "a.csv:1: 3 fields under a header of 2; quote texts"),
        ("a.csv", b"id,text\n1", "a.csv:1: 1 fields under a header of 2"),
        ("a.csv", b'text\n"a" b', "a.csv: not valid CSV"),
        ("a.csv", "text\ngröße".encode("latin-1"), "not UTF-8"),
        ("a.csv", b"id;text\n1;no", "allowed: id;text"),
        ("a.parquet", b"text", "Parquet"),
        ("a.parquet", b"", "Parquet"),
        ("a.parquet", parquet([{"text": 3}]), "a.parquet:1 has type int, not text"),
        (
            "a.jsonl.zst",
            b"\x28\xb5\x2f\xfd",
            r"give UTF-8 text or rows \(.jsonl, .ndjson, .json, .csv, .tsv, .parquet\)",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(name: str, content: bytes, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        list(open_text(write(tmp_path / name, content)).read())


def test_settings_in_a_folder_of_code_are_left_out(tmp_path: Path):
    write(tmp_path / "package.json", b'{"name": "x"}')
    write(tmp_path / "a.py", b"pass")
    source = open_text(str(tmp_path))
    assert [document.name for document in source.read()] == ["a.py"]
    assert "neither a list of rows" in next(iter(source.skips()))


def test_rows_of_nothing_in_parquet_are_passed_over(tmp_path: Path):
    path = write(tmp_path / "a.parquet", parquet([{"text": "a"}, {"text": None}, {"text": "b"}]))
    assert [document.name for document in open_text(path).read()] == ["a.parquet:1", "a.parquet:3"]


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.parquet", parquet(ROWS))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        list(open_text(path).read())


@ENDINGS
def test_a_file_that_is_not_there(ending: str, tmp_path: Path):
    with pytest.raises(UserError, match="no such file or folder"):
        open_text(f"books{ending.upper()}")
