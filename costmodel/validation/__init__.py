"""Validation: policies that were predicted and then run, and what that says of the cost model."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from costmodel import records, words
from costmodel.errors import InputError
from costmodel.hardware import Hardware
from costmodel.measurement import Measurement
from costmodel.validation.draw import Drawn, Space, draw
from costmodel.validation.statistics import Cause, Errors, Ranking, Summary, frame, summary

SCHEMA = "tierwise.validation/1"


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A validation at any moment: ``drawn`` is what is to be run, ``measurements`` the runs so far, in that order.

    ``request`` holds the flags that decide what is drawn and run; ``hardware`` is the machine as planned
    with, budgets included.
    """

    request: Mapping[str, Any]
    hardware: Hardware
    drawn: tuple[Drawn, ...]
    measurements: tuple[Measurement, ...] = ()

    def __post_init__(self) -> None:
        if len(self.measurements) > len(self.drawn):
            policies = words.counted(len(self.drawn), "policy", "policies")
            raise InputError(f"there are {policies}, but more measurements ({len(self.measurements)})")
        for place, (drawn, found) in enumerate(zip(self.drawn, self.measurements, strict=False)):
            if drawn.policy != found.policy:
                raise InputError(f"measurements[{place}] is not a run of policies[{place}]")

    @property
    def left(self) -> tuple[Drawn, ...]:
        """What is still to be run."""
        return self.drawn[len(self.measurements) :]

    def with_run(self, found: Measurement) -> "Validation":
        """A copy with one more run."""
        return dataclasses.replace(self, measurements=(*self.measurements, found))

    def summary(self) -> Summary:
        """What the runs so far say; at least one is needed."""
        return summary(self.measurements)

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON form."""
        return {
            "schema": SCHEMA,
            "request": dict(self.request),
            "summary": self.summary().to_dict() if self.measurements else None,
            "policies": [records.to_dict(one) for one in self.drawn],
            "measurements": [one.to_dict() for one in self.measurements],
            "hardware": self.hardware.to_dict(),
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write the validation file atomically."""
        records.write_json(self.to_dict(), path)

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> "Validation":
        """Read a validation file, finished or not."""
        data = records.check_schema(records.read_json(path), SCHEMA, where=str(path))
        try:
            return cls(
                request=data["request"],
                hardware=Hardware.from_dict(data["hardware"], where=f"{path}: hardware"),
                drawn=tuple(
                    records.from_dict(Drawn, one, where=f"{path}: policies[{place}]")
                    for place, one in enumerate(data["policies"])
                ),
                measurements=tuple(
                    Measurement.from_dict(one, where=f"{path}: measurements[{place}]")
                    for place, one in enumerate(data["measurements"])
                ),
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: this is no validation: {error}") from None


__all__ = [
    "Cause",
    "Drawn",
    "Errors",
    "Ranking",
    "Space",
    "Summary",
    "Validation",
    "draw",
    "frame",
    "summary",
]
