"""Forged folders: each function turns a copy of an honest run into something hostile."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from culpa.trajectory.reader import COLUMNS
from culpa.trajectory.schema import LOG, MANIFEST, PACK, state_name
from hostile.forge import edit_manifest, sql

Forgery = Callable[[Path], None]
CORPUS: dict[str, Forgery] = {}
DEEP = 10_000
TERABYTE = 2**40
STATE = state_name(2)


def forgery(function: Forgery) -> Forgery:
    """Add a function to the corpus under its name."""
    CORPUS[function.__name__.replace("_", " ")] = function
    return function


def add(name: str, function: Forgery) -> None:
    CORPUS[name] = function


# States: forged safetensors headers.


def header(path: Path, text: bytes, size: int | None = None, body: bytes = b"") -> None:
    claimed = len(text) if size is None else size
    (path / STATE).write_bytes(claimed.to_bytes(8, "little") + text + body)


def tensor(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = msgspec.json.encode({"params/head.bias": entry})
    return text + b" " * (-len(text) % 8)


HEADERS: dict[str, tuple[bytes, int | None]] = {
    "empty": (b"", None),
    "claims 2^63 bytes": (b"{}", 2**63),
    "claims more than the file": (tensor(), 4096),
    "is no JSON": (b"\x80\x04cos\nsystem\n(S'id'\ntR.", None),
    "is deep": (b'{"a":' * DEEP + b"}" * DEEP, None),
    "is an array": (b"[]      ", None),
    "has metadata": (b'{"__metadata__":{"a":"b"}}      ', None),
    "has a tensor twice": (tensor()[:-1] + b"," + tensor()[1:], None),
    "unknown dtype": (tensor("X9"), None),
    "negative dimension": (tensor(shape=(-1,)), None),
    "terabytes by shape": (tensor(shape=(2**38,), offsets=(0, TERABYTE)), None),
    "product overflows": (tensor(shape=(2**40,) * 8), None),
    "ten thousand dimensions": (tensor(shape=(1,) * DEEP), None),
    "dimension is text": (tensor(shape=("1",)), None),
    "dimension is a fraction": (tensor(shape=(1.5,)), None),
    "offsets reversed": (tensor(offsets=(4, 0)), None),
    "offsets negative": (tensor(offsets=(-4, 0)), None),
    "offsets past the end": (tensor(offsets=(0, 2**60)), None),
    "path for a name": (tensor().replace(b"params/head.bias", b"../../../etc/x.y"), None),
    "odd utf-8": (tensor().replace(b"head", b"\xff\xfe\xfd\xfc"), None),
    "tabs for spaces": (tensor().replace(b" ", b"\t"), None),
}
for _name, (_text, _size) in HEADERS.items():
    add(f"header {_name}", lambda path, t=_text, s=_size: header(path, t, s, bytes(4)))


@forgery
def terabyte_of_holes_as_a_state(path: Path) -> None:
    header(path, tensor(shape=(2**38,), offsets=(0, TERABYTE)))
    os.truncate(path / STATE, (path / STATE).stat().st_size + TERABYTE)


@forgery
def terabyte_of_holes_as_the_pack(path: Path) -> None:
    os.truncate(path / PACK, TERABYTE)


# The log: another schema, other types, references to nowhere, loops.


for _file in (MANIFEST, LOG, PACK, STATE):
    add(f"{_file} is noise", lambda path, f=_file: (path / f).write_bytes(bytes(range(1, 250)) * 9))
    add(f"{_file} is empty", lambda path, f=_file: (path / f).write_bytes(b""))
    add(f"{_file} is missing", lambda path, f=_file: (path / f).unlink())
    add(f"{_file} is a folder", lambda path, f=_file: _folder(path / f))
    add(f"{_file} is a pipe", lambda path, f=_file: _pipe(path / f))
    add(f"{_file} is a link", lambda path, f=_file: _link(path / f))


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _link(file: Path) -> None:
    """To the very bytes that belong there, but outside."""
    outside = file.parents[1] / f"outside-{file.name}"
    file.rename(outside)
    file.symlink_to(outside)


@forgery
def states_is_a_link(path: Path) -> None:
    (path / "states").rename(path.parent / "elsewhere")
    (path / "states").symlink_to(path.parent / "elsewhere")


@forgery
def link_beside_the_log(path: Path) -> None:
    edit_manifest(path, lambda m: m.update(status="recording", root_digest=""))
    (path.parent / "target").write_bytes(b"precious")
    (path / f"{LOG}-wal").symlink_to(path.parent / "target")


STATEMENTS: dict[str, list[str]] = {
    "trigger": ["CREATE TRIGGER t AFTER INSERT ON step BEGIN SELECT randomblob(99999999); END"],
    "extra table": ["CREATE TABLE more (a)"],
    "extra index": ["CREATE INDEX more ON step (digest)"],
    "missing table": ["DROP TABLE stage"],
    "view for a table": [
        "ALTER TABLE step RENAME TO hidden",
        "CREATE VIEW step AS SELECT k, optimizer, hypers, zeroblob(1000000000) AS micro_batches,"
        " detail, digest, fingerprints, chain FROM hidden",
    ],
    "endless view": [
        "DROP TABLE stage",
        "CREATE VIEW stage AS WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c)"
        " SELECT 'x' || n AS name, n AS start, n + 1 AS stop FROM c",
    ],
    "column with a default": ["ALTER TABLE state ADD COLUMN more DEFAULT 7"],
    "generated column": [
        "ALTER TABLE stage ADD COLUMN more AS (zeroblob(1000000000)) VIRTUAL",
    ],
    "negative update": ["UPDATE step SET k = -1 WHERE k = 0"],
    "huge update": ["UPDATE step SET k = 9223372036854775807 WHERE k = 5"],
    "update missing": ["DELETE FROM step WHERE k = 2"],
    "last update missing": ["DELETE FROM step WHERE k = 5"],
    "no updates": ["DELETE FROM step"],
    "updates swapped": [
        "UPDATE step SET k = 99 WHERE k = 1",
        "UPDATE step SET k = 1 WHERE k = 2",
        "UPDATE step SET k = 2 WHERE k = 99",
    ],
    "negative state": ["UPDATE state SET k = -2 WHERE k = 2"],
    "state of nowhere": ["UPDATE state SET k = 5 WHERE k = 4"],
    "state missing": ["DELETE FROM state WHERE k = 2"],
    "first state missing": ["DELETE FROM state WHERE k = 0"],
    "states swapped": [
        "UPDATE state SET digest = (SELECT digest FROM state WHERE k = 4) WHERE k = 2"
    ],
    "size of a state": ["UPDATE state SET size = size + 1 WHERE k = 2"],
    "negative example": ["UPDATE example SET id = -1 WHERE id = 3"],
    "example missing": ["DELETE FROM example WHERE id = 8"],
    "examples swapped": [
        "UPDATE example SET id = 99 WHERE id = 1",
        "UPDATE example SET id = 1, offset = 20 WHERE id = 2",
        "UPDATE example SET id = 2, offset = 40 WHERE id = 99",
    ],
    "example added": ["INSERT INTO example VALUES (9, x'00', 0, 180, 20)"],
    "negative offset": ["UPDATE example SET offset = -20 WHERE id = 3"],
    "offset past the end": ["UPDATE example SET offset = 1099511627776 WHERE id = 3"],
    "size of an example": ["UPDATE example SET size = 1099511627776 WHERE id = 3"],
    "layout of nowhere": ["UPDATE example SET layout = 7"],
    "negative layout": ["UPDATE example SET layout = -1"],
    "layout added": ["INSERT INTO layout VALUES (1, (SELECT json || ' ' FROM layout))"],
    "random added": ["INSERT INTO random VALUES (99, x'00')"],
    "random missing": ["DELETE FROM random WHERE id = 1"],
    "random damaged": ["UPDATE random SET state = x'c1' WHERE id = 1"],
    "randoms swapped": [
        "UPDATE random SET id = 99 WHERE id = 1",
        "UPDATE random SET id = 1 WHERE id = 2",
        "UPDATE random SET id = 2 WHERE id = 99",
    ],
    "optimizer of nowhere": ["UPDATE step SET optimizer = 3"],
    "negative optimizer": ["UPDATE step SET optimizer = -1"],
    "hypers of nowhere": ["UPDATE step SET hypers = 3"],
    "stage renamed": ["UPDATE stage SET name = '../../../etc/passwd' WHERE start = 0"],
    "stage moved": ["UPDATE stage SET stop = 2 WHERE start = 0"],
    "stage removed": ["DELETE FROM stage WHERE start = 3"],
    "stage added": [
        "UPDATE stage SET stop = 5 WHERE start = 3",
        "INSERT INTO stage VALUES ('x', 5, 6)",
    ],
    "stages overlap": ["INSERT INTO stage VALUES ('x', 2, 4)"],
    "negative stage": ["UPDATE stage SET start = -5 WHERE start = 0"],
    "stage past the end": ["UPDATE stage SET stop = 1099511627776 WHERE start = 3"],
    "point to go on from added": ["INSERT INTO resume VALUES (0, x'00')"],
    "seal missing": ["DELETE FROM resume"],
    "seal of nothing": ["UPDATE resume SET content = zeroblob(32)"],
    "chain removed": ["UPDATE step SET chain = x''"],
    "digest cut": ["UPDATE step SET digest = substr(digest, 1, 31) WHERE k = 3"],
    "fingerprints cut": ["UPDATE step SET fingerprints = x'00' WHERE k = 3"],
}
for _name, _statements in STATEMENTS.items():
    add(_name, lambda path, s=_statements: sql(path, *s))

WRONG: dict[str, Any] = {"text": "x", "number": -7, "fraction": 0.5, "blob": b"\xff" * 9}
for _table, _columns in COLUMNS.items():
    for _column in _columns:
        for _kind, _value in WRONG.items():
            add(
                f"{_kind} in {_table}.{_column}",
                lambda path, t=_table, c=_column, v=_value: _set_one(path, t, c, v),
            )


def _set_one(path: Path, table: str, column: str, value: Any) -> None:
    """Set one row's column; a key that SQLite keeps from other types becomes a negative one."""
    statement = f"UPDATE {table} SET {column} = ? WHERE rowid = (SELECT max(rowid) FROM {table})"
    try:
        sql(path, statement, values=(value,))
    except sqlite3.IntegrityError:
        sql(path, statement, values=(-7,))


def blob(path: Path, table: str, column: str, value: bytes, where: str = "") -> None:
    sql(path, f"UPDATE {table} SET {column} = ? {where}", values=(value,))


LAYOUTS: dict[str, bytes] = {
    "deep": b'{"per_row":true,"root":' + b'{"items":[' * DEEP + b'],"kind":"list"}' * DEEP + b"}",
    "a little deep": b'{"per_row":true,"root":'
    + b'{"items":[' * 100
    + b'],"kind":"list"}' * 100
    + b"}",
    "names a function": b'{"per_row":true,"root":{"device":"cpu","dtype":"load","kind":"tensor",'
    b'"shape":[5]}}',
    "terabytes": b'{"per_row":true,"root":{"device":"cpu","dtype":"float32","kind":"tensor",'
    b'"shape":[1099511627776]}}',
    "product overflows": b'{"per_row":true,"root":{"device":"cpu","dtype":"float32",'
    b'"kind":"tensor","shape":[1099511627776,1099511627776,0]}}',
    "negative": b'{"per_row":true,"root":{"device":"cpu","dtype":"float32","kind":"tensor",'
    b'"shape":[-5]}}',
    "another device": b'{"per_row":true,"root":{"items":[{"device":"meta","dtype":"float32",'
    b'"kind":"tensor","shape":[3]},{"device":"../x","dtype":"int64","kind":"tensor","shape":[]}],'
    b'"keys":["x","y"],"kind":"dict"}}',
    "unknown kind": b'{"per_row":true,"root":{"kind":"object","module":"os","name":"system"}}',
    "keys repeated": b'{"per_row":true,"root":{"items":[{"kind":"value","value":1},'
    b'{"kind":"value","value":2}],"keys":["a","a"],"kind":"dict"}}',
    "keys missing": b'{"per_row":true,"root":{"items":[],"keys":["a"],"kind":"dict"}}',
    "whole batch": b'{"per_row":false,"root":{"device":"cpu","dtype":"uint8","kind":"tensor",'
    b'"shape":[20]}}',
    "array": b"[]",
}
for _name, _json in LAYOUTS.items():
    add(f"layout {_name}", lambda path, j=_json: blob(path, "layout", "json", j))

GROUP = '[{"lr": %s}]'
HYPERS: dict[str, str] = {
    "not a number": GROUP % "NaN",
    "infinite": GROUP % "1e999",
    "nested": GROUP % ("[" * DEEP + "]" * DEEP),
    "object": GROUP % '{"a": 1}',
    "parameters": '[{"params": [1]}]',
    "no groups": "[]",
    "two groups": "[{}, {}]",
    "text": '"x"',
}
for _name, _text in HYPERS.items():
    add(f"hypers {_name}", lambda path, t=_text: blob(path, "hypers", "json", t.encode()))

OPTIMIZERS: dict[str, bytes] = {
    "unknown parameter": b'{"name":"AdamW","groups":[["no.such"]]}',
    "parameter twice": b'{"name":"AdamW","groups":[["head.bias","head.bias"]]}',
    "unknown field": b'{"name":"AdamW","groups":[["head.bias"]],"code":"x"}',
    "name is a number": b'{"name":1,"groups":[["head.bias"]]}',
}
for _name, _json in OPTIMIZERS.items():
    add(f"optimizer {_name}", lambda path, j=_json: blob(path, "optimizer", "json", j))


def ids(*numbers: int) -> bytes:
    return b"".join(n.to_bytes(4, "little") for n in numbers)


MICRO: dict[str, Any] = {
    "none": [],
    "text": "x",
    "layout of nowhere": [(9, ids(0), None, ())],
    "negative layout": [(-1, ids(0), None, ())],
    "example of nowhere": [(0, ids(2**32 - 1), None, ())],
    "broken ids": [(0, b"\0\0\0", None, ())],
    "random of nowhere": [(0, ids(0), 12345, ())],
    "negative random": [(0, ids(0), -1, ())],
    "one row a million times": [(0, ids(0) * 2**24, None, ())],
    "strides of terabytes": [(0, ids(0, 1), None, ((0, (2**40, 1)), (0, (1,))))],
    "strides negative": [(0, ids(0, 1), None, ((0, (-4, 1)), (0, (1,))))],
    "too many strides": [(0, ids(0, 1), None, ((0, (1, 1, 1)), (0, (1,))))],
    "too few placements": [(0, ids(0, 1), None, ((0, (3, 1)),))],
    "address odd": [(0, ids(0, 1), None, ((3, (3, 1)), (1, (1,))))],
    "address huge": [(0, ids(0, 1), None, ((2**62, (3, 1)), (0, (1,))))],
}
for _name, _value in MICRO.items():
    add(
        f"micro-batch {_name}",
        lambda path, v=_value: blob(
            path, "step", "micro_batches", msgspec.msgpack.encode(v), "WHERE k = 3"
        ),
    )
RAW: dict[str, bytes] = {
    "claims 2^32 entries": b"\xdd\xff\xff\xff\xff",
    "claims 2^32 bytes": b"\x91\x94\x00\xc6\xff\xff\xff\xff",
    "deep": b"\x91" * DEEP + b"\x00",
    "extension type": b"\x91\xc7\x04\x2aabcd",
}
for _name, _raw in RAW.items():
    add(
        f"micro-batches {_name}",
        lambda path, r=_raw: blob(path, "step", "micro_batches", r, "WHERE k = 3"),
    )
for _name, _json in {
    "deep": b'{"weights":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "of another update": b'{"weights":[1.0],"clip_grad_norm":null,"reset":false,'
    b'"drew_randomness":true,"evaluating":[],"without_gradient":[]}',
    "weights of nobody": b'{"weights":[1.0,2.0,3.0],"clip_grad_norm":null,"reset":false,'
    b'"drew_randomness":true,"evaluating":[],"without_gradient":[]}',
    "unknown field": b'{"weights":null,"clip_grad_norm":null,"reset":false,"x":1,'
    b'"drew_randomness":true,"evaluating":[],"without_gradient":[]}',
}.items():
    add(f"detail {_name}", lambda path, j=_json: blob(path, "step", "detail", j, "WHERE k = 3"))


@forgery
def pages_that_repeat(path: Path) -> None:
    """Every child of an inner page of a table is the same page: a tree of endless rows."""
    connection = sqlite3.connect(path / LOG)
    with connection:
        rows = [(i, bytes(40)) for i in range(100, 20_000)]
        connection.executemany("INSERT INTO random VALUES (?, ?)", rows)
        inserted = [(i, i.to_bytes(32, "big"), 0, 180, 20) for i in range(9, 20_000)]
        connection.executemany("INSERT INTO example VALUES (?, ?, ?, ?, ?)", inserted)
    connection.execute("VACUUM")
    size = connection.execute("PRAGMA page_size").fetchone()[0]
    connection.close()
    data = bytearray((path / LOG).read_bytes())
    for start in range(size, len(data), size):
        if data[start] == 5:  # an inner page of a table: cells point at children
            count = int.from_bytes(data[start + 3 : start + 5], "big")
            cells = [
                int.from_bytes(data[start + 12 + 2 * i : start + 14 + 2 * i], "big")
                for i in range(count)
            ]
            child = data[start + cells[0] : start + cells[0] + 4]
            for cell in cells:
                data[start + cell : start + cell + 4] = child
            data[start + 8 : start + 12] = child
    (path / LOG).write_bytes(data)


@forgery
def pages_that_point_at_themselves(path: Path) -> None:
    data = bytearray((path / LOG).read_bytes())
    for start in range(4096, len(data), 4096):
        if data[start] == 13:  # a leaf becomes an inner page whose only child is itself
            page = (start // 4096 + 1).to_bytes(4, "big")
            data[start : start + 12] = b"\x05\0\0\0\0\0\0\0" + page
    (path / LOG).write_bytes(data)


# The manifest.


FIELDS: dict[str, dict[str, Any]] = {
    "version 1": {"format": 1},
    "version 3": {"format": 3},
    "version 0": {"format": 0},
    "version text": {"format": "1"},
    "version true": {"format": True},
    "version null": {"format": None},
    "version huge": {"format": 10**30},
    "status unknown": {"status": "fine"},
    "status complete": {"status": "interrupted"},
    "root removed": {"root_digest": ""},
    "root of another": {"root_digest": "0" * 64},
    "root no hex": {"root_digest": "x" * 64},
    "created": {"created": "1999-01-01T00:00:00+00:00"},
    "reason": {"reason": "none of your business"},
    "seconds": {"plain_seconds": 1.5},
    "seconds negative": {"plain_seconds": -1.5},
    "updates": {"num_steps": 5},
    "updates negative": {"num_steps": -6},
    "version of culpa": {"culpa_version": "99.0"},
    "examples": {"examples": "reference"},
    "examples unknown": {"examples": "somewhere"},
    "frozen": {"frozen": []},
    "parameters": {"parameters": {}},
    "parameters of terabytes": {"parameters": {"head.bias": "float32 [1099511627776]"}},
    "parameters no shape": {"parameters": {"head.bias": "../../x"}},
    "buffers": {"buffers": {}},
    "environment": {"environment": {"python": "2.7"}},
    "unknown field": {"execute": "rm -rf"},
}
for _name, _fields in FIELDS.items():
    add(f"manifest {_name}", lambda path, f=_fields: edit_manifest(path, lambda m: m.update(f)))
for _name, _raw in {
    "deep": b"[" * DEEP + b"]" * DEEP,
    "deep in format": b'{"format":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "array": b"[]",
    "null": b"null",
    "large": b'{"format":1,"x":"' + b"x" * 2**26 + b'"}',
    "odd utf-8": b'{"format":"\xff\xfe"}',
}.items():
    add(f"manifest {_name}", lambda path, r=_raw: (path / MANIFEST).write_bytes(r))


@forgery
def manifest_reformatted(path: Path) -> None:
    fields = msgspec.json.decode((path / MANIFEST).read_bytes())
    (path / MANIFEST).write_bytes(msgspec.json.encode(fields))


# The folder.

EXTRA = (
    *("culpa.json.tmp", "log.sqlite-wal", "log.sqlite-journal", "model.pkl", ".hidden"),
    *("states/2.safetensors", "states/000000003.safetensors", "states/000000002.safetensors.tmp"),
)
for _file in EXTRA:
    add(f"extra {_file}", lambda path, f=_file: (path / f).write_bytes(b"\0" * 32))
add("extra folder", lambda path: (path / "more").mkdir())
add("log longer", lambda path: os.truncate(path / LOG, (path / LOG).stat().st_size + 4096))
add("log a little longer", lambda path: os.truncate(path / LOG, (path / LOG).stat().st_size + 1))
add("pack longer", lambda path: os.truncate(path / PACK, (path / PACK).stat().st_size + 1))
add("pack shorter", lambda path: os.truncate(path / PACK, (path / PACK).stat().st_size - 1))
add("state longer", lambda path: os.truncate(path / STATE, (path / STATE).stat().st_size + 1))
add("state shorter", lambda path: os.truncate(path / STATE, (path / STATE).stat().st_size - 1))


@forgery
def state_files_swapped(path: Path) -> None:
    one, other = (path / state_name(2)).read_bytes(), (path / state_name(4)).read_bytes()
    (path / state_name(2)).write_bytes(other)
    (path / state_name(4)).write_bytes(one)
