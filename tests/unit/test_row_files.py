"""Claims about data files: the forms that are read, what is in memory, and the order of rows."""

from __future__ import annotations

import builtins
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsync.errors import ConfigError
from workers.row_files import BadRow, RowFiles

ROWS = [{"a": 'x"],\\', "b": [1, {"c": "]"}]}, {"a": "é\n"}, 5, None, "[", {}]


def written(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def all_rows(*paths: str) -> list[Any]:
    files = RowFiles(paths)
    return [files.read(i) for i in range(len(files))]


def parquet(path: Path, rows: list[dict[str, Any]], group: int = 10) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return str(path)


def test_lines_and_arrays_hold_the_same_rows(tmp_path: Path) -> None:
    lines = written(tmp_path / "a.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n  \n")
    for indent in (None, 2):
        array = written(tmp_path / "a.json", "\ufeff " + json.dumps(ROWS, indent=indent))
        assert [content for _, content in all_rows(array)] == [content for _, content in all_rows(lines)] == ROWS
    assert [where for where, _ in all_rows(lines)] == [f"{lines}:{1 + 2 * i}" for i in range(6)]
    assert [where for where, _ in all_rows(array)] == [f"{array}[{i}]" for i in range(6)]


def test_a_folder_is_all_data_files_below_it_by_name(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/c.jsonl", "a.jsonl", "z.txt"):
        written(tmp_path / name, f'"{name}"\n')
    assert [content for _, content in all_rows(str(tmp_path))] == ["a.jsonl", "b/c.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no file named"):
        RowFiles([str(tmp_path / "empty")])


def test_a_row_that_is_not_json_is_bad_and_the_others_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", b'1\n{"a": \n"\xff"\n2')
    found = [content for _, content in all_rows(path)]
    assert [str(content) for content in found if isinstance(content, BadRow)] == [
        "not JSON: Expecting value: line 1 column 7 (char 6)", "not UTF-8: byte 2 is 0xff",
    ]  # fmt: skip
    assert found[0] == 1 and found[3] == 2


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'{"a": 1}', "holds no array"),
        ("a.json", b"[1, 2", "the array does not end"),
        ("a.json", b"[1] 2", "something follows the array"),
        ("a.json", b"[]", "no rows in this file"),
        ("a.jsonl", b"\n \n", "no rows in this file"),
        ("a.jsonl", b"\x1f\x8b....", "is a gzip file"),
        ("a.jsonl", b"PAR1....", "is a Parquet file; name such files, and no others, .parquet"),
        ("a.parquet", b"{}", "is not a Parquet file"),
    ],
)
def test_files_that_are_something_else_are_refused(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        RowFiles([written(tmp_path / name, content)])


def test_rows_are_read_one_by_one_and_stay_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.jsonl", "".join(json.dumps({"i": i, "text": "x" * 500}) + "\n" for i in range(20000)))
    np.random.default_rng(0)  # numpy imports it when it is asked for
    tracemalloc.start()
    files = RowFiles([path])
    files.order(0, shuffle=True, seed=0)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Where a row begins, where it ends, its line, and its place as a block: five numbers of eight bytes.
    assert held < 20000 * 6 * 8 < 2**20 and (tmp_path / "a.jsonl").stat().st_size > 10 * 2**20
    opened: list[Any] = []
    real = builtins.open
    monkeypatch.setattr(Path, "open", lambda self, mode: opened.append(self) or real(self, mode))
    assert [files.read(i)[1]["i"] for i in (19999, 0, 7)] == [19999, 0, 7] and len(opened) == 3


def test_the_fingerprint_is_of_content_in_its_order(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a.jsonl", "1\n2\n"), written(tmp_path / "b.jsonl", "1\n3\n")
    (tmp_path / "c").mkdir()
    moved = written(tmp_path / "c" / "x.jsonl", "1\n2\n")
    prints = {RowFiles(paths).fingerprint() for paths in ([a], [b], [a, b], [b, a])}
    assert len(prints) == 4 and RowFiles([moved]).fingerprint() == RowFiles([a]).fingerprint()


def test_orders_are_of_seed_and_epoch_alone(tmp_path: Path) -> None:
    files = RowFiles([written(tmp_path / "a.jsonl", "0\n" * 100)])
    orders = [files.order(epoch, shuffle=True, seed=seed).tolist() for epoch in (0, 1) for seed in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders) and len({tuple(order) for order in orders}) == 4
    assert files.order(1, shuffle=True, seed=1).tolist() == orders[3]
    assert files.order(3, shuffle=False, seed=1).tolist() == list(range(100))


def test_parquet_rows_are_as_those_of_json_with_bytes(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "image": {"bytes": bytes([i]), "path": None}, "choices": ["a", "b"], "answer": i % 2} for i in range(25)]
    path = parquet(tmp_path / "a.parquet", rows)
    assert all_rows(path) == [(f"{path}[{i}]", row) for i, row in enumerate(rows)]
    other = parquet(tmp_path / "b.parquet", [{**row, "answer": 0} for row in rows])
    assert RowFiles([path]).fingerprint() != RowFiles([other]).fingerprint()
    with pytest.raises(ConfigError, match=r"c\.parquet cannot be read"):
        RowFiles([written(tmp_path / "c.parquet", Path(path).read_bytes()[:-9])])


def test_a_parquet_row_that_python_cannot_have_is_bad_and_the_others_are_read(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = {
        "'utf-8' codec can't decode byte 0xff": pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")),
        "date value out of range": pa.array([2**62], pa.timestamp("us")),
        "duplicate field names": pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]),
    }
    for i, (reason, value) in enumerate(values.items()):
        table = pa.table({"i": [0, 1], "x": pa.concat_arrays([value, pa.nulls(1, value.type)])})
        pq.write_table(table, tmp_path / f"{i}.parquet")
        [(where, bad), (_, good)] = all_rows(str(tmp_path / f"{i}.parquet"))
        assert where.endswith(f"{i}.parquet[0]") and isinstance(bad, BadRow) and reason in str(bad)
        assert good == {"i": 1, "x": None}


def test_a_parquet_file_whose_footer_is_damaged_is_refused_or_read(tmp_path: Path) -> None:
    """Whatever byte of it is another one, as that of the number of rows, which may be below none then."""
    path = tmp_path / "a.parquet"
    whole = Path(parquet(path, [{"i": 1}] * 20)).read_bytes()
    reasons = []
    for at in range(len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), len(whole) - 8):
        path.write_bytes(whole[:at] + b"\x01" + whole[at + 1 :])
        try:
            all_rows(str(path))
        except ConfigError as error:
            reasons.append(str(error))
    assert all("cannot be read" in reason or "no rows" in reason for reason in reasons)
    assert any("a row group of it has fewer rows or bytes than none, so it is damaged" in reason for reason in reasons)


def test_row_groups_are_read_about_once_an_epoch_when_shuffled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five groups of 100 kB in windows of two: each is read once, or twice at the border of two windows."""
    random = np.random.default_rng(0)
    path = parquet(tmp_path / "a.parquet", [{"i": i, "x": random.bytes(10000)} for i in range(50)])
    import pyarrow.parquet

    from workers import row_files

    monkeypatch.setattr(row_files, "_WINDOW_BYTES", 210_000)
    monkeypatch.setattr(row_files.ParquetFile, "_tables", row_files.OrderedDict())
    reads: list[int] = []
    real = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile, "read_row_group", lambda self, group, **kwargs: reads.append(group) or real(self, group, **kwargs)
    )
    files = RowFiles([path])
    order = files.order(0, shuffle=True, seed=0)
    assert [files.read(int(row))[1]["i"] for row in order] == order.tolist() and sorted(order) == list(range(50))
    assert len(reads) <= 7 and len(set((order[:10] // 10).tolist())) > 1
    assert sum(table.nbytes for table in row_files.ParquetFile._tables.values()) <= 2 * 210_000


def test_without_pyarrow_a_parquet_file_is_refused_by_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match="which needs pyarrow: pip install pyarrow"):
        RowFiles([written(tmp_path / "a.parquet", b"PAR1...")])
