"""Reading and writing records: whole files or none, one sentence for every failure."""

import dataclasses
import json
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodel import records
from costmodel.errors import InfeasibleError, InputError, SolverError, TierwiseError


@dataclass(frozen=True, kw_only=True)
class Part:
    """A record with an invariant of its own."""

    __pydantic_config__ = records.STRICT

    share: float
    label: str | None = None

    def __post_init__(self) -> None:
        if self.share < 0:
            raise InputError(f"share is {self.share}: it must be at least 0")


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A record of records."""

    __pydantic_config__ = records.STRICT

    count: int
    parts: tuple[Part, ...] = ()
    by_name: dict[str, Part] | None = None


# ------------------------------------------------------------------ validation


def test_a_record_survives_the_round_trip() -> None:
    whole = Whole(count=3, parts=(Part(share=0.5), Part(share=2.0, label="x")), by_name={"a": Part(share=1.0)})
    data = records.to_dict(whole)
    assert data == {
        "count": 3,
        "parts": [{"share": 0.5}, {"share": 2.0, "label": "x"}],
        "by_name": {"a": {"share": 1.0}},
    }
    assert records.from_dict(Whole, json.loads(json.dumps(data)), where="x") == whole


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "field 'count' is missing"),
        ({"count": 1, "size": 2}, "field 'size' is not part of the schema"),
        ({"count": "many"}, "field 'count' is 'many': input should be a valid integer"),
        ({"count": 1, "parts": [{"share": 1}, {"share": -2}]}, "parts.1: share is -2.0: it must be at least 0"),
        ({"count": 1, "parts": [{"share": 1}, {}]}, "field 'parts.1.share' is missing"),
        ({"count": 1, "by_name": {"a": {"share": "x"}}}, "field 'by_name.a.share' is 'x'"),
        ({"count": 1, "parts": [{"share": float("inf")}]}, "field 'parts.0.share' is inf"),
        ({"count": 1, "parts": [{"share": float("nan")}]}, "field 'parts.0.share' is nan"),
        ({"count": 1.5, "size": 1}, "(and 1 more)"),
        ({"count": "x" * 500}, "field 'count' is 'xxx"),
        (7, "is 7"),
        (None, "is None"),
    ],
)
def test_a_failure_names_place_field_and_value(data: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        records.from_dict(Whole, data, where="file.json")
    text = str(caught.value)
    assert text.startswith("file.json: ")
    assert message in text
    assert len(text) < 250
    assert "\n" not in text
    assert "pydantic" not in text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"schema": "a/2"}, "file.json: field 'schema' is 'a/2': this version of tierwise reads \"a/1\""),
        ({}, 'file.json: field \'schema\' is missing: such a file has "schema": "a/1" (docs/file-formats.md)'),
        ("a/1", 'file.json: a JSON object with "schema": "a/1" is expected, not \'a/1\''),
    ],
)
def test_another_schema_is_refused(data: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        records.check_schema(data, "a/1", where="file.json")
    assert str(caught.value) == message


def test_the_right_schema_is_taken_off() -> None:
    data = {"schema": "a/1", "x": 1}
    assert records.check_schema(data, "a/1", where="file.json") == {"x": 1}
    assert data == {"schema": "a/1", "x": 1}


# ------------------------------------------------------------------ reading


def test_a_truncated_file_says_where_it_breaks(tmp_path: Path) -> None:
    path = tmp_path / "half.json"
    path.write_text('{\n  "count": ')
    with pytest.raises(InputError, match=rf"^{path}: not valid JSON at line 2, column 12: Expecting value$"):
        records.read_json(path)


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", '{"a": 1,}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_what_is_not_json_is_one_sentence(text: str) -> None:
    with pytest.raises(InputError, match=r"^x\.json: not valid JSON") as caught:
        records.parse_json(text, where="x.json")
    assert len(str(caught.value)) < 250


def test_a_missing_file_a_folder_and_bytes_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name, reason in (
        ("nowhere.json", "No such file or directory"),
        (".", "Is a directory"),
        ("bytes.json", "it is not UTF-8 text"),
    ):
        path = tmp_path / name
        with pytest.raises(InputError, match=rf"^{path}: cannot be read: {reason}$"):
            records.read_json(path)


# ------------------------------------------------------------------ writing


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_what_is_written_is_read_back(data: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.json"
        records.write_json(data, path)
        assert records.read_json(path) == data


def test_a_file_is_written_whole_with_usual_permissions(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    records.write_json({"µ": [1, 2.5]}, path)
    assert path.read_text(encoding="utf-8") == '{\n  "µ": [\n    1,\n    2.5\n  ]\n}\n'
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert [item.name for item in tmp_path.iterdir()] == ["out.json"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    records.write_json({"old": 1}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.write_json({"new": float("nan")}, path)
    with pytest.raises(TypeError):
        records.write_json({"new": object()}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"old": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["out.json"]


def test_a_failing_disk_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    records.write_text("old", path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=rf"^{path}: cannot be written: No space left on device$"):
        records.write_text("new", path)
    assert path.read_text(encoding="utf-8") == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["out.json"]


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for target, reason in (
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "out.json", "No such file or directory"),
        (tmp_path / "file" / "out.json", "Not a directory"),
    ):
        with pytest.raises(InputError, match=rf"^{target}: cannot be written: {reason}$"):
            records.write_text("x", target)
    assert (tmp_path / "file").read_text() == "x"


# ------------------------------------------------------------------ names and errors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("opt-30", "unknown model 'opt-30': did you mean 'opt-30b'? known: opt-13b, opt-30b"),
        ("OPT-13B", "unknown model 'OPT-13B': did you mean 'opt-13b'? known: opt-13b, opt-30b"),
        ("zzz", "unknown model 'zzz': known: opt-13b, opt-30b"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, message: str) -> None:
    assert str(records.nearest(name, ["opt-30b", "opt-13b"], what="model")) == message


def test_each_error_has_its_exit_code() -> None:
    codes = {TierwiseError: 1, InputError: 2, InfeasibleError: 3, SolverError: 4}
    assert {error: error.exit_code for error in codes} == codes
    assert all(issubclass(error, TierwiseError) for error in codes)
    assert issubclass(InputError, ValueError)
    assert InfeasibleError("no", reason={"limit": "memory"}).reason == {"limit": "memory"}
    assert InfeasibleError("no").reason == {}


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Part(share=1.0).share = 2.0  # type: ignore[misc]
