"""Reading and writing the versioned JSON records that the packages exchange.

A record is a frozen dataclass that checks its own invariants; pydantic adds types, unknown keys and
the path of the field. Every failure is one :class:`InputError` with the file, field, value and limit.
"""

import dataclasses
import difflib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic

from costmodel.errors import InputError

T = TypeVar("T")

Flag = Annotated[bool, pydantic.Strict()]
"""A JSON boolean, and no word or number that could stand for one."""

STRICT = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


@cache
def _adapter(cls: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(cls)


def from_dict(cls: type[T], data: object, *, where: str) -> T:
    """Validate ``data`` as a ``cls``; ``where`` (a file or flag) opens every message."""
    schema: Any = cls
    try:
        record: T = _adapter(schema).validate_python(data)
    except pydantic.ValidationError as error:
        raise InputError(f"{where}: {_explain(error)}") from None
    return record


def _explain(error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "missing":
        return f"field {field!r} is missing{more}"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"field {field!r} is not part of the schema{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{field}: {message}{more}" if field else f"{message}{more}"
    return f"field {field!r} is {_shown(first['input'])}: {message[:1].lower()}{message[1:]}{more}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parse a JSON file; a missing, unreadable or truncated one is an :class:`InputError`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot be read: it is not UTF-8 text") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read: {reason}") from None
    return parse_json(text, where=str(path))


def parse_json(text: str, *, where: str) -> Any:
    """Parse JSON text; the message of a failure names the line and column."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{where}: not valid JSON at {place}: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise InputError(f"{where}: not valid JSON: {error}") from None


def check_schema(data: object, expected: str, *, where: str) -> dict[str, Any]:
    """Return ``data`` without its ``schema`` key after checking that it is ``expected``."""
    if not isinstance(data, dict):
        raise InputError(f'{where}: a JSON object with "schema": "{expected}" is expected, not {_shown(data)}')
    found = data.get("schema")
    if found is None:
        raise InputError(
            f'{where}: field \'schema\' is missing: such a file has "schema": "{expected}" (docs/file-formats.md)'
        )
    if found != expected:
        raise InputError(f"{where}: field 'schema' is {_shown(found)}: this version of tierwise reads \"{expected}\"")
    return {key: value for key, value in data.items() if key != "schema"}


def to_dict(record: Any) -> dict[str, Any]:
    """The record as JSON-ready data; fields that are ``None`` are left out."""
    return {key: _plain(value) for key, value in _fields(record) if value is not None}


def _fields(record: Any) -> Iterable[tuple[str, Any]]:
    return ((field.name, getattr(record, field.name)) for field in dataclasses.fields(record))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def write_json(data: object, path: str | os.PathLike[str]) -> None:
    """Write JSON so that ``path`` holds either its old or its whole new content, never a part."""
    write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write UTF-8 text atomically: temporary name, fsync, rename."""
    write_bytes(text.encode(), path)


def write_bytes(content: bytes, path: str | os.PathLike[str]) -> None:
    """Write bytes atomically (a device or pipe plainly); an unwritable place is an :class:`InputError`."""
    target = Path(os.path.realpath(path))  # a link stays a link: what it points to is replaced
    temporary = None
    try:
        if target.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        if target.exists() and not target.is_file():  # /dev/stdout or a pipe is written to, never replaced
            target.write_bytes(content)
            return
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def nearest(name: str, known: Iterable[str], *, what: str) -> InputError:
    """An error for an unknown name that suggests the closest known one."""
    names = sorted(known)
    likely = closest(name, names)
    hint = "" if likely is None else f"did you mean {likely!r}? "
    return InputError(f"unknown {what} {name!r}: {hint}known: {', '.join(names)}")


def closest(name: str, known: Iterable[str], *, cutoff: float = 0.4) -> str | None:
    """The known name that is spelled most alike, in any case; None if none is alike by ``cutoff``, in [0, 1]."""
    by_spelling = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), by_spelling, n=1, cutoff=cutoff)
    return by_spelling[close[0]] if close else None
