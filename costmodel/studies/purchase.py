"""Tokens for a dollar and for a kWh: throughput against prices and power that a person may edit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike

import pandas as pd

from costmodel.errors import InputError
from costmodel.hardware import Hardware, quantities
from costmodel.model import ModelSpec
from costmodel.overrides import with_overrides
from costmodel.quantity import Quantity
from costmodel.studies.policies import best
from costmodel.units import GiB
from costmodel.workload import Workload

UNITS = {
    "board_power": "W",
    "card_price": "USD",
    "instance_price": "USD/h",
    "instance_gpus": "GPUs",
    "instance_memory": "GiB",
    "electricity_price": "USD/kWh",
}
"""What a row of the inputs may be about, and its unit."""

COLUMNS = ("machine", "what", "value", "unit", "date", "source", "url")

HOURS_A_YEAR = 8766.0


@dataclass(frozen=True, kw_only=True)
class Ownership:
    """What owning a card means: for how long, how busy, and what else it costs.

    ``utilisation`` is the share of its life in which it computes; ``host_usd`` and ``host_w`` are price and
    power of the computer around it (0: the card alone).
    """

    lifetime_years: float
    utilisation: float
    usd_per_kwh: float
    host_usd: float = 0.0
    host_w: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise InputError(f"utilisation is {self.utilisation:g}: it must lie in (0, 1]")
        if not self.lifetime_years > 0:
            raise InputError(f"lifetime_years is {self.lifetime_years:g}: it must be greater than 0")
        for name in ("usd_per_kwh", "host_usd", "host_w"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name):g}: it must be at least 0")


def read_inputs(path: str | PathLike[str]) -> pd.DataFrame:
    """The table of prices and power: one number a row, each with date and source.

    Raises :class:`InputError` naming the row for a missing source or date, an unknown subject, a unit that is
    not the subject's, a number that is not positive, or a number given twice.
    """
    table = pd.read_csv(path, dtype={name: str for name in COLUMNS if name != "value"}, keep_default_na=False)
    if tuple(table.columns) != COLUMNS:
        raise InputError(f"{path}: the columns are {', '.join(table.columns)}: they must be {', '.join(COLUMNS)}")
    for line, row in enumerate(table.to_dict("records"), start=2):
        where = f"{path}: line {line} ({row['machine']}, {row['what']})"
        if row["what"] not in UNITS:
            raise InputError(f"{where}: unknown subject; it must be one of {', '.join(UNITS)}")
        if row["unit"] != UNITS[row["what"]]:
            raise InputError(f"{where}: the unit is {row['unit']!r}: it must be {UNITS[row['what']]!r}")
        if not isinstance(row["value"], int | float) or not row["value"] > 0:
            raise InputError(f"{where}: the value is {row['value']}: it must be a number greater than 0")
        for name in ("date", "source"):
            if not row[name].strip():
                raise InputError(f"{where}: {name} is missing: no number without its origin")
    twice = table[table.duplicated(["machine", "what"])]
    if len(twice):
        raise InputError(f"{path}: {twice.iloc[0]['machine']}, {twice.iloc[0]['what']} is given twice")
    return table


def given(inputs: pd.DataFrame, machine: str) -> dict[str, float]:
    """The numbers of one machine by subject."""
    rows = inputs[inputs["machine"] == machine]
    return {str(what): float(value) for what, value in zip(rows["what"], rows["value"], strict=True)}


def as_rented(hardware: Hardware, *, gpus: int, memory_gib: float) -> Hardware:
    """The share of a rented instance that one of its ``gpus`` has: memory, disk and the CPU's rates divided.

    The CPU's rates in the catalogue are those of one of two sockets where an instance has several GPUs.
    """
    machine = with_overrides(hardware, cpu_memory=memory_gib * GiB / gpus)
    if gpus == 1:
        return machine
    shared = {
        "disk.memory_bytes": gpus,
        "links.disk_read.bytes_per_s": gpus,
        "links.disk_write.bytes_per_s": gpus,
        "cpu.attention_bytes_per_s": gpus / 2,
        "cpu.dequantize_values_per_s": gpus / 2,
    }
    present = dict(quantities(machine))
    for path, parts in shared.items():
        if path in present:
            machine = machine.changed(path, lambda old, parts=parts: _divided(old, parts))  # type: ignore[misc]
    return machine


def _divided(old: Quantity, parts: float) -> Quantity:
    return replace(old, value=old.value / parts)


def machines(inputs: pd.DataFrame) -> list[Hardware]:
    """The machines that can be bought or rented by the inputs; a rented one has its share of the instance."""
    found = []
    for name in inputs["machine"].drop_duplicates():
        numbers = given(inputs, str(name))
        if "instance_price" in numbers:
            shape = {"gpus": int(numbers["instance_gpus"]), "memory_gib": numbers["instance_memory"]}
            found.append(as_rented(Hardware.from_catalog(str(name)), **shape))  # type: ignore[arg-type]
        elif "card_price" in numbers:
            found.append(Hardware.from_catalog(str(name)))
    return found


def throughputs(found: Sequence[Hardware], models: Sequence[str], workload: Workload) -> dict[tuple[str, str], float]:
    """Best certified throughput (token/s) by (machine, model); 0 where the model fits no tier."""
    speeds = {}
    for name in models:
        model = ModelSpec.from_catalog(name)
        for machine in found:
            result = best(machine, model, workload)
            speeds[machine.name, name] = 0.0 if result is None else result.estimate.throughput_tok_per_s
    return speeds


def purchase_table(inputs: pd.DataFrame, speeds: Mapping[tuple[str, str], float], ownership: Ownership) -> pd.DataFrame:
    """One row a machine and model: throughput, tokens for a dollar and for a kWh, and how it is paid for.

    A rented machine is paid by the hour and computes for all of it. What the inputs do not say is missing.
    """
    rows = []
    for (machine, model), speed in speeds.items():
        numbers = given(inputs, machine)
        rented = "instance_price" in numbers
        watts = numbers.get("board_power")
        rows.append(
            {
                "machine": machine,
                "model": model,
                "paid": "rented" if rented else "bought",
                "throughput_tok_per_s": speed,
                "tok_per_usd": _rented(speed, numbers) if rented else _bought(speed, numbers, ownership),
                "tok_per_kwh": None if watts is None else speed * 3.6e6 / (watts + ownership.host_w),
            }
        )
    return pd.DataFrame(rows).astype({"tok_per_usd": float, "tok_per_kwh": float})


_CRITERIA = (
    ("the fastest", "throughput_tok_per_s", "token/s", ("bought", "rented")),
    ("for a dollar, bought", "tok_per_usd", "tokens", ("bought",)),
    ("for a dollar, rented", "tok_per_usd", "tokens", ("rented",)),
    ("for a kWh", "tok_per_kwh", "tokens", ("bought", "rented")),
)


def winner_table(table: pd.DataFrame) -> pd.DataFrame:
    """The best machine for each model and criterion of a purchase table: ``machine``, ``value``, ``unit``."""
    rows = []
    for model, part in table.groupby("model", sort=False):
        for criterion, column, unit, paid in _CRITERIA:
            known = part[part["paid"].isin(paid)].dropna(subset=[column])
            if len(known):
                best_row = known.iloc[int(known[column].to_numpy(dtype=float).argmax())]
                value = float(best_row[column])
                winner = {"machine": best_row["machine"], "value": value, "unit": unit}
                rows.append({"model": model, "criterion": criterion, **winner})
    return pd.DataFrame(rows)


def _rented(speed: float, numbers: Mapping[str, float]) -> float:
    return speed * 3600 * numbers["instance_gpus"] / numbers["instance_price"]


def _bought(speed: float, numbers: Mapping[str, float], ownership: Ownership) -> float | None:
    """Tokens of a lifetime over the price and the electricity of it; ``None`` where a number is missing."""
    if "card_price" not in numbers or "board_power" not in numbers:
        return None
    busy_h = ownership.lifetime_years * HOURS_A_YEAR * ownership.utilisation
    energy_kwh = (numbers["board_power"] + ownership.host_w) / 1000 * busy_h
    usd = numbers["card_price"] + ownership.host_usd + energy_kwh * ownership.usd_per_kwh
    return speed * 3600 * busy_h / usd


def use_table(
    inputs: pd.DataFrame,
    speeds: Mapping[tuple[str, str], float],
    ownership: Ownership,
    utilisations: Sequence[float],
) -> pd.DataFrame:
    """The purchase table over utilisations, a column of that name: how busy a card must be to beat renting."""
    parts = [
        purchase_table(inputs, speeds, replace(ownership, utilisation=share)).assign(utilisation=share)
        for share in utilisations
    ]
    return pd.concat(parts, ignore_index=True)
