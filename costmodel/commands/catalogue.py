"""``--list-gpus`` and ``--list-models``: what the catalogue holds, as tables."""

import argparse
from collections.abc import Sequence
from typing import Any

from costmodel import hardware as machines
from costmodel import model as models
from costmodel import words
from costmodel.commands import terminal
from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.units import format_bytes, format_rate


class _Listing(argparse.Action):
    """Print a table and leave, as --help does."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:  # noqa: A002
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        """Print and leave."""
        terminal.show(self.table())
        parser.exit()

    def table(self) -> terminal.Renderable:
        """What to print."""
        raise NotImplementedError


class ListMachines(_Listing):
    """The machines of the catalogue."""

    def table(self) -> terminal.Renderable:
        """One row a machine: nominal sizes and rates; the profile holds what software reaches of them."""
        table = terminal.table("name", ">memory", ">bandwidth", ">16-bit", ">host link", ">CPU", ">disk")
        for name in machines.catalog_names():
            table.add_row(*_machine_row(Hardware.from_catalog(name)))
        return table


def _machine_row(hardware: Hardware) -> list[str]:
    gpu = hardware.gpu
    size = hardware.capacity_bytes
    return [
        hardware.name,
        format_bytes(gpu.memory_bytes.value),
        format_rate(gpu.memory_bytes_per_s.value, "bytes/s"),
        format_rate(gpu.matmul_flops_per_s.value, "FLOP/s"),
        format_rate(hardware.links.cpu_to_gpu.bytes_per_s.value, "bytes/s"),
        *(format_bytes(size[tier], binary=False) if size[tier] else "–" for tier in ("cpu", "disk")),
    ]


class ListModels(_Listing):
    """The models of the catalogue."""

    def table(self) -> terminal.Renderable:
        """One row a model, smallest first."""
        table = terminal.table(
            "name", ">parameters", ">layers", ">hidden", ">16-bit weights", ">KV a token", ">positions"
        )
        for name in models.catalog_names():
            table.add_row(*_model_row(ModelSpec.from_catalog(name)))
        return table


def _model_row(model: ModelSpec) -> list[str]:
    return [
        model.name,
        words.parameters(model.total_params),
        str(model.num_layers),
        str(model.hidden_size),
        format_bytes(model.total_params * models.BYTES_PER_VALUE),
        format_bytes(model.kv_bytes_per_token(compressed=False) * model.num_layers),
        "no limit" if model.max_positions is None else str(model.max_positions),
    ]
