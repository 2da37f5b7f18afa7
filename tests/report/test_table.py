"""Tables survive kills and full disks, maps can be read back, files stay in the output folder."""

import csv
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchsvdd_fast.report import table as table_module
from patchsvdd_fast.report.table import COLUMNS, Table, require_parquet, write_parquet
from processes import largest_file

SUFFIXES = ("csv", "jsonl")
ODD_NAMES = (
    'new\nline, "quoted", and comma.png',
    "\r\n.png",
    os.fsdecode(b"no \xff\xfe text.png"),
    "=1+1.png",
    "-@+\t.png",
    "\t.png",
    "ünïcödé 画像 \U0001f600.png",
    " spaces .png",
    "'';--<script>.png",
    "\x1b[31mred.png",
    "a;b; c.png",
    "\\n.png",
    "NaN",
    "#.png",
    "\ufeffmark.png",
    "/abs/x.png",
    "x" * 3000 + ".png",
)
THRESHOLD = 0.1 + 0.2


def row_of(name, number=0, **more):
    score = np.float32(1.1 + number / 7).item()
    row = {"image": name, "score": score, "relative_score": score / THRESHOLD}
    row |= {"p_value": 1 / 3, "threshold": THRESHOLD}
    row |= {"verdict": "anomalous", "level": "K32", "unusual": ["darker, by far", "x\ny"]}
    return row | {"regions": [{"left": 1, "peak": score}]} | more


def read_csv(path):
    content = path.read_bytes().decode("utf-8", "surrogateescape")
    rows = list(csv.DictReader(io.StringIO(content, newline="")))
    assert all(tuple(row) == COLUMNS for row in rows)
    return rows


def read_rows(path):
    if path.suffix == ".csv":
        return read_csv(path)
    return [json.loads(line) for line in path.read_text().splitlines()]


def names_of(path):
    return [str(Path(row["image"])) for row in read_rows(path)]


def write_table(path, rows, threshold=THRESHOLD, resume=False):
    with Table(path, threshold, resume) as table:
        for row in rows:
            table.add(row)
    return path


# --- tables ---------------------------------------------------------------------------------------


def test_csv_has_every_value_to_the_last_digit(tmp_path):
    row = row_of("a.png", 3)
    (read,) = read_csv(write_table(tmp_path / "scores.csv", [row]))
    for column in ("score", "relative_score", "p_value", "threshold"):
        assert float(read[column]) == row[column]
    assert (read["verdict"], read["level"]) == ("anomalous", "K32")
    assert read["unusual"] == "darker, by far; x\ny"
    assert read["error"] == ""


def test_json_lines_are_the_rows(tmp_path):
    rows = [row_of(name, number) for number, name in enumerate(ODD_NAMES)]
    path = write_table(tmp_path / "scores.jsonl", rows)
    assert read_rows(path) == rows
    path.read_text(encoding="ascii")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_odd_names_come_back(tmp_path, suffix):
    rows = [row_of(name) for name in ODD_NAMES]
    path = write_table(tmp_path / f"scores.{suffix}", rows)
    assert names_of(path) == [str(Path(name)) for name in ODD_NAMES]
    before = path.read_bytes()
    table = Table(path, THRESHOLD, resume=True)
    assert table.done == set(ODD_NAMES)
    table.close()
    assert path.read_bytes() == before


def test_no_cell_is_a_formula_to_a_spreadsheet(tmp_path):
    error = {"image": "=cmd|x.png", "error": "=cmd|x.png is not an image"}
    path = write_table(tmp_path / "scores.csv", [*map(row_of, ODD_NAMES), error])
    for row in read_csv(path):
        assert all(not cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in row.values())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_table_is_complete_after_each_row(tmp_path, suffix):
    path = tmp_path / f"scores.{suffix}"
    with Table(path, THRESHOLD) as table:
        assert read_rows(path) == []
        for count in range(1, 5):
            table.add(row_of(f"{count}.png"))
            assert len(read_rows(path)) == count
    assert not table.done  # of an earlier run, that is


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_resume_a_table_begins_anew(tmp_path, suffix):
    path = write_table(tmp_path / f"scores.{suffix}", [row_of("old.png")])
    write_table(path, [row_of("new.png")])
    assert names_of(path) == ["new.png"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_with_an_error_are_done_again(tmp_path, suffix):
    error = {"image": "bad.png", "error": "cannot read, \nsay"}
    path = write_table(tmp_path / f"scores.{suffix}", [row_of("a.png"), error, row_of("b.png")])
    assert names_of(path) == ["a.png", "bad.png", "b.png"]
    with Table(path, THRESHOLD, resume=True) as table:
        assert table.done == {"a.png", "b.png"}
    assert names_of(path) == ["a.png", "b.png"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_table_of_another_threshold_is_not_gone_on_with(tmp_path, suffix):
    path = write_table(tmp_path / f"scores.{suffix}", [row_of("a.png")])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"threshold 0.30000000000000004, this run has 0.5"):
        Table(path, 0.5, resume=True)
    with pytest.raises(ValueError, match=r"threshold 0.30000000000000004, this run has none"):
        Table(path, None, resume=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]  # noqa: PTH208
    unjudged = {"image": "a.png", "score": 1.0, "level": "K64"}
    write_table(path, [unjudged], threshold=None)
    with pytest.raises(ValueError, match=r"threshold none, this run has 0.5"):
        Table(path, 0.5, resume=True)
    with Table(path, None, resume=True) as table:
        assert table.done == {"a.png"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("scores.csv", b"name,value\nx,1\n"),
        ("scores.csv", b"\x89PNG\r\n\x1a\n\0\0\0\n"),
        ("scores.csv", b"x" * 200_000 + b"\n"),
        ("scores.jsonl", b"image,score\n"),
        ("scores.jsonl", b"[1, 2]\n"),
        ("scores.jsonl", b"5\n"),
        ("scores.jsonl", b'{"score": 1}\n'),
        ("scores.jsonl", b'{"image": 5}\n'),
        ("scores.jsonl", b"\xff\n"),
        ("scores.jsonl", b'{"image": "x", "threshold": [1]}\n'),
    ],
)
def test_what_is_no_table_is_left_alone(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        Table(tmp_path / name, THRESHOLD, resume=True)
    assert (tmp_path / name).read_bytes() == content


def test_an_empty_file_and_a_missing_one_are_gone_on_with(tmp_path):
    (tmp_path / "scores.csv").touch()
    (tmp_path / "scores.jsonl").touch()
    for name in ("scores.csv", "scores.jsonl", "new.csv", "new.jsonl"):
        path = write_table(tmp_path / name, [row_of("a.png")], resume=True)
        assert names_of(path) == ["a.png"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_run_killed_anywhere_is_gone_on_with(tmp_path, monkeypatch, suffix):
    """At every byte that may be the last: no row is lost that was complete, none is there twice."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes long, hundreds of times
    rows = [row_of(name, number) for number, name in enumerate(ODD_NAMES[:4])]
    rows.insert(2, {"image": "bad\n.png", "error": 'cannot read "bad\n.png"'})
    whole = write_table(tmp_path / f"whole.{suffix}", rows).read_bytes()
    expected = [row for row in read_rows(tmp_path / f"whole.{suffix}") if not row.get("error")]
    good = [row for row in rows if "error" not in row]
    end = {}  # of each row
    with Table(tmp_path / f"parts.{suffix}", THRESHOLD) as table:
        for row in rows:
            table.add(row)
            end[row["image"]] = table.path.stat().st_size
    path = tmp_path / f"scores.{suffix}"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with Table(path, THRESHOLD, resume=True) as table:
            assert table.done == {row["image"] for row in good if end[row["image"]] <= length}
            for row in good:
                if row["image"] not in table.done:
                    table.add(row)
        assert read_rows(path) == expected


NAMES = st.binary(min_size=1, max_size=12).map(
    lambda raw: os.fsdecode(raw.replace(b"\0", b"\n").replace(b"/", b'"'))
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(SUFFIXES),
    names=st.lists(NAMES, min_size=1, max_size=5, unique_by=lambda name: str(Path(name))),
    values=st.lists(st.floats(0, 1e9, width=32), min_size=5, max_size=5),
    notes=st.lists(st.text(st.characters(codec="utf-8"), max_size=5), max_size=2),
    cut=st.floats(0, 1),
)
def test_any_table_comes_back_however_it_was_cut(
    tmp_path, monkeypatch, suffix, names, values, notes, cut
):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    rows = [
        row_of(str(Path(name)), score=value, unusual=notes)
        for name, value in zip(names, values, strict=False)
    ]
    path = write_table(tmp_path / f"scores.{suffix}", rows)
    whole = read_rows(path)
    assert [float(row["score"]) for row in whole] == [row["score"] for row in rows]
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    with Table(path, THRESHOLD, resume=True) as table:
        done = table.done
        for row in rows:
            if row["image"] not in done:
                table.add(row)
    assert names_of(path) == [row["image"] for row in rows]
    assert read_rows(path) == whole


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_leaves_whole_rows(tmp_path, suffix):
    path = tmp_path / f"scores.{suffix}"
    table = Table(path, THRESHOLD)
    table.add(row_of("a.png"))
    whole = path.read_bytes()
    for room in (0, 1, 40):
        with largest_file(len(whole) + room):
            with pytest.raises(OSError, match=rf"^cannot write .*scores.{suffix}: File too large$"):
                table.add(row_of("b.png"))
            assert path.read_bytes() == whole
    table.add(row_of("b.png"))  # there is room again
    table.close()
    assert names_of(path) == ["a.png", "b.png"]
    with largest_file(10), pytest.raises(OSError, match=r"^cannot write"):
        Table(path, THRESHOLD, resume=True)
    assert names_of(path) == ["a.png", "b.png"]


# --- Parquet --------------------------------------------------------------------------------------


def test_parquet_reads_back(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(table_module, "_ROWS_AT_ONCE", 4)
    rows = [row_of(name, number) for number, name in enumerate(ODD_NAMES)]
    rows.insert(2, {"image": "bad.png", "error": "cannot read"})
    rows.insert(5, {"image": "unjudged.png", "score": 0.25, "level": "K64", "unusual": []})
    lines = write_table(tmp_path / "scores.jsonl", rows)
    write_parquet(lines, tmp_path / "scores.parquet")
    table = parquet.read_table(tmp_path / "scores.parquet")
    assert tuple(table.column_names) == COLUMNS
    kinds = ["string", *4 * ["double"], *4 * ["string"]]
    assert [str(kind) for kind in table.schema.types] == kinds
    read = table.to_pylist()
    assert len(read) == len(rows)
    for row, written in zip(read, rows, strict=True):
        name = written["image"].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        assert row["image"] == name
        for column in ("score", "relative_score", "p_value", "threshold"):
            assert row[column] == written.get(column)
        for column in ("verdict", "level", "error"):
            assert row[column] == written.get(column)
        assert row["unusual"] == ("; ".join(written.get("unusual", [])) or None)


def test_parquet_of_no_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_parquet(write_table(tmp_path / "scores.jsonl", []), tmp_path / "scores.parquet")
    table = parquet.read_table(tmp_path / "scores.parquet")
    assert (len(table), tuple(table.column_names)) == (0, COLUMNS)


def test_a_full_disk_leaves_the_old_parquet_file(tmp_path):
    pytest.importorskip("pyarrow")
    lines = write_table(tmp_path / "scores.jsonl", [row_of(str(n), n) for n in range(100)])
    path = tmp_path / "scores.parquet"
    path.write_text("old")
    with largest_file(1000), pytest.raises(OSError, match=r"cannot write .*scores\.parquet"):
        write_parquet(lines, path)
    assert path.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["scores.jsonl", "scores.parquet"]  # noqa: PTH208


def test_without_pyarrow_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        require_parquet()
