"""What a model's name stands for: an entry of the catalogue, a file, or a model on the Hugging Face hub.

The only place that decides it, for planning and running alike. An entry of the catalogue has a name of its own
and the ids of the hub that it holds for, so that a known id needs no network.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from costmodel import hub, records
from costmodel.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model's name and parsed ``config.json`` (checked to be JSON, no more); ``where`` opens messages about it.

    ``hub_id`` is where the catalogue's entry, or the file, comes from; None for a file of one's own.
    """

    name: str
    config: Any
    where: str
    hub_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model of the catalogue; ``hub_ids``: ids that share its ``config.json``, but for the fields given there."""

    name: str
    config: Mapping[str, Any]
    hub_ids: Mapping[str, Mapping[str, Any]]


@cache
def entries() -> Mapping[str, Entry]:
    """The catalogue, by name."""
    folder = resources.files("costmodel.catalog") / "models"
    found = {}
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.name.endswith(".json"):
            data = records.parse_json(item.read_text(encoding="utf-8"), where=f"catalogue {item.name}")
            config = {field: value for field, value in data.items() if not field.startswith("_")}
            name = item.name.removesuffix(".json")
            found[name] = Entry(name=name, config=config, hub_ids=data["_hub"])
    return found


def in_catalog(name: str) -> Source | None:
    """The catalogue's model of that name or hub id, in any case; of a known id the organisation may be left out."""
    return _index().get(name.strip().lower())


def from_catalog(name: str) -> Source:
    """The same; an unknown name is an :class:`InputError` with the nearest one."""
    found = in_catalog(name)
    if found is None:
        raise _unknown(name)
    return found


def find(name_or_path: str | os.PathLike[str]) -> Source:
    """What a name, a hub id or a path stands for.

    Text with a slash is a path first, if there is something at that path; a bare name is the catalogue's first.
    An id of the form ``organisation/name`` whose name is that of a known id is a copy of that model: the hub is full
    of them, under other organisations. Only what neither knows is looked up there. Raises :class:`InputError` where
    there is nothing of that name.
    """
    text = os.fspath(name_or_path)
    exists = text != "" and kind_of(Path(text)) != "nothing"
    is_path = exists and (not isinstance(name_or_path, str) or Path(text).name != text)
    known = None if is_path else in_catalog(text)
    if known is not None:
        return known
    if exists:
        return from_file(text)
    if isinstance(name_or_path, str) and hub.is_id(text):
        return _copied(text) or _from_hub(text)
    there = f"{text[:60]!r} is none" if text else "none is given"
    raise InputError(
        f"{_unknown(text)}; an id of the Hugging Face hub, or the path of a config.json or of its folder, works too, "
        f"but {there}"
    )


def from_file(path: str | os.PathLike[str]) -> Source:
    """A ``config.json``, or the one in a folder; the model takes the folder's name."""
    file = Path(path) / "config.json" if kind_of(Path(path)) == "folder" else Path(path)
    folder = file.parent if file.parent.name not in ("", "..") else file.parent.resolve()
    name = folder.name if file.name == "config.json" else file.stem
    return Source(name=name or "model", config=records.read_json(file), where=str(file))


def kind_of(path: Path) -> Literal["folder", "file", "nothing"]:
    """What is there; text that no file system takes for a path, such as a very long one, is nothing."""
    try:
        if path.is_dir():
            return "folder"
        return "file" if path.exists() else "nothing"
    except (OSError, ValueError):
        return "nothing"


def _copied(hub_id: str) -> Source | None:
    """The catalogue's model that an id of another organisation is named after, which needs no network."""
    source = _hub_names().get(hub_id.partition("/")[2].lower())
    return None if source is None else replace(source, hub_id=hub_id)


def _from_hub(name: str) -> Source:
    likely = records.closest(name, [hub_id for entry in entries().values() for hub_id in entry.hub_ids], cutoff=0.8)
    known = "" if likely is None else f"; the catalogue has {likely!r}"
    file = hub.config_file(name, instead=f"the path of a config.json works as well, but that is none{known}")
    config = records.read_json(file)
    return Source(name=name.partition("/")[2], config=config, where=f"config.json of {name}", hub_id=name)


@cache
def _index() -> Mapping[str, Source]:
    """Every spelling in lower case: ids without and with their organisation, and, above all, the entries' names."""
    found: dict[str, Source] = {}
    for entry in entries().values():
        for hub_id, changes in entry.hub_ids.items():
            found[hub_id.lower()] = _source(entry, hub_id.partition("/")[2].lower(), changes, hub_id)
    names = {entry.name: _source(entry, entry.name, {}, next(iter(entry.hub_ids))) for entry in entries().values()}
    return {**found, **_hub_names(), **names}


@cache
def _hub_names() -> Mapping[str, Source]:
    """The known ids without their organisation, in lower case; of two organisations' the catalogue's first."""
    found: dict[str, Source] = {}
    for entry in entries().values():
        for hub_id, changes in entry.hub_ids.items():
            name = hub_id.partition("/")[2].lower()
            found.setdefault(name, _source(entry, name, changes, hub_id))
    return found


def _source(entry: Entry, name: str, changes: Mapping[str, Any], hub_id: str) -> Source:
    return Source(name=name, config={**entry.config, **changes}, where=f"catalogue {entry.name}.json", hub_id=hub_id)


def _unknown(name: str) -> InputError:
    bare = re.sub(r"^[a-z0-9][\w.-]*/(?=[^/]+$)", "", name.strip(), flags=re.IGNORECASE)
    return records.nearest(bare, entries(), what="model")
