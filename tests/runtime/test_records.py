"""Lines that a run has written: what a kill or a crash of the machine leaves is passed over, and
nothing else.
"""

import json

import pytest

from ssp_jax.runtime import records

FIELDS = {"step": (int,), "value": (float, type(None)), "ok": (bool, type(None))}
GOOD = {"step": 1, "value": 0.5, "ok": True}


def read(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(records.read_lines(path, FIELDS))


def test_whole_lines_come_with_where_the_next_one_begins(tmp_path):
    first, second = (
        json.dumps(GOOD | {"text": "São"}, ensure_ascii=False) + "\n",
        json.dumps(GOOD) + "\r\n",
    )
    found = read(tmp_path / "x", first + second + '{"step": 3, "val')
    assert [line.record for line in found] == [GOOD | {"text": "São"}, GOOD]
    assert [line.raw for line in found] == [first.encode(), second.encode()]
    assert found[-1].next == len((first + second).encode())


@pytest.mark.parametrize(
    "spoilt",
    [
        b"",
        b"\0" * 40,
        b"\0\0" + json.dumps(GOOD).encode(),
        json.dumps(GOOD).encode() * 2,
        json.dumps(GOOD).encode()[:-9] + json.dumps(GOOD).encode(),
        b'{"step": 1, "value": 0.5, "ok": true, "text": "\xff"}',
        b"[" * 100_000,
        b"null",
        b"[1]",
        b"{}",
        b'{"step": 1.0, "value": 0.5, "ok": true}',
        b'{"step": true, "value": 0.5, "ok": true}',
        b'{"step": "1", "value": 0.5, "ok": true}',
        b'{"step": null, "value": 0.5, "ok": true}',
        b'{"step": 1, "value": 0.5}',
        b'{"step": 1, "value": NaN, "ok": true}',
        b'{"step": 1, "value": 1e999, "ok": true}',
        b'{"step": 1, "value": 0.5, "ok": 1}',
        b'{"step": 1, "value": 0.5, "ok": true, "more": Infinity}',
        b'{"step": ' + b"9" * 5000 + b', "value": 0.5, "ok": true}',
    ],
)
def test_a_spoilt_line_costs_no_other_one(tmp_path, spoilt):
    good = json.dumps(GOOD | {"value": None, "ok": None}).encode() + b"\n"
    found = read(tmp_path / "x", good + spoilt + b"\n" + good)
    assert [line.record is None for line in found] == [False, True, False]


def test_a_line_without_end_is_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_LINE", 64)
    good = json.dumps(GOOD) + "\n"
    found = read(tmp_path / "x", good + "\0" * 200 + "\n" + good + "\0" * 200)
    assert [line.record for line in found] == [GOOD, None, GOOD]
    assert max(len(line.raw) for line in found) <= 64 and found[-1].next == len(good) * 2 + 201
    assert read(tmp_path / "x", "") == []


def test_a_half_written_line_is_cut_off_before_more_are_written(tmp_path):
    path = tmp_path / "x"
    good = json.dumps(GOOD) + "\n"
    path.write_text(good + "spoilt\n" + good + good[:9])
    assert records.read_to_append(path, FIELDS) == ([GOOD, GOOD], 1)
    assert path.read_text() == good + "spoilt\n" + good
    path.write_text(good[:9])
    assert records.read_to_append(path, FIELDS) == ([], 0) and path.read_text() == ""


def test_a_document_is_there_as_a_whole(tmp_path):
    path = tmp_path / "step_000001.json"
    records.write_document(path, {"a": 1})
    records.write_document(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2} and list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        records.write_document(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 2}
