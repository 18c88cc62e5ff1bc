"""Hardware: the tiers, links and processors of one machine, each number with its origin.

The file format (``tierwise.hardware/1``) is documented in docs/file-formats.md, what a number is in
``costmodel.quantity``.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from os import PathLike
from typing import Any, Literal

from costmodel import records
from costmodel.calibrated import Calibrated
from costmodel.errors import InputError
from costmodel.quantity import (
    AS_GIVEN,
    Bytes,
    BytesPerSecond,
    FlopsPerSecond,
    Quantity,
    Rate,
    Seconds,
    Source,
    ValuesPerSecond,
)

SCHEMA = "tierwise.hardware/1"


def _positive(owner: object, names: tuple[str, ...]) -> None:
    for name in names:
        quantity = getattr(owner, name)
        if quantity is not None and quantity.value <= 0:
            raise InputError(f"{name}.value is {quantity.value:g}: it must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The first tier and the processor that computes from it (on a machine without a GPU, the CPU).

    ``attention_flops_per_s`` is the rate of prefill attention, softmax and masking included.
    ``dequantize_values_per_s`` counts 4-bit values turned into 16 bits, ``quantize_values_per_s`` the other way
    (absent: as fast).
    ``compressed_matmul_flops_per_s`` is the rate of products with 4-bit weights, whatever is expanded included; absent:
    a layer's weights are expanded at ``dequantize_values_per_s``, then multiplied. ``layer_launch_s`` is what
    the engine takes of one layer and batch in decode however little there is to compute. What the cache adds to it, 0
    where absent: ``compressed_call_s`` for one in 4 bits, ``carried_call_s`` for each part that is loaded before use,
    ``part_call_s`` (``compressed_part_call_s`` in 4 bits) for each tier beyond the first that holds a part of it; the
    tokens after the prompt, which are carried one by one, are gathered at ``gather_bytes_per_s`` (16-bit KV).
    ``compressed_launch_share`` is what is left of a layer's launch and of these calls where weights are kept in 4 bits
    (absent: all of it): fewer bytes of weights push less of the engine's code and small tensors out of the caches.
    """

    __pydantic_config__ = records.STRICT

    name: str
    kind: Literal["cuda", "rocm", "metal", "cpu"]
    memory_bytes: Bytes
    memory_bytes_per_s: BytesPerSecond
    matmul_flops_per_s: FlopsPerSecond
    attention_flops_per_s: FlopsPerSecond
    dequantize_values_per_s: ValuesPerSecond
    layer_launch_s: Seconds
    compressed_matmul_flops_per_s: FlopsPerSecond | None = None
    compressed_call_s: Seconds | None = None
    carried_call_s: Seconds | None = None
    part_call_s: Seconds | None = None
    compressed_part_call_s: Seconds | None = None
    gather_bytes_per_s: BytesPerSecond | None = None
    quantize_values_per_s: ValuesPerSecond | None = None
    compressed_launch_share: Quantity | None = None

    def __post_init__(self) -> None:
        _positive(
            self,
            (
                "compressed_launch_share",
                "compressed_matmul_flops_per_s",
                "gather_bytes_per_s",
                "memory_bytes",
                "memory_bytes_per_s",
                "matmul_flops_per_s",
                "attention_flops_per_s",
                "dequantize_values_per_s",
                "quantize_values_per_s",
            ),
        )

    @property
    def is_host_memory(self) -> bool:
        """Whether the first tier is memory of the host, as the second one is."""
        return self.kind in ("cpu", "metal")


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """Host memory and the host's attention over it.

    ``attention_bytes_per_s`` is 16-bit KV cache consumed per second of decode attention, conversions
    included; absent when attention cannot run there. ``attention_call_s`` comes on top for each layer and
    batch (0 when absent). ``dequantize_values_per_s`` absent means that
    attention on the CPU cannot read a 4-bit cache.
    """

    __pydantic_config__ = records.STRICT

    name: str
    memory_bytes: Bytes
    attention_bytes_per_s: BytesPerSecond | None = None
    attention_call_s: Seconds | None = None
    dequantize_values_per_s: ValuesPerSecond | None = None

    def __post_init__(self) -> None:
        _positive(self, ("attention_bytes_per_s", "dequantize_values_per_s"))


@dataclass(frozen=True, kw_only=True)
class Disk:
    """The third tier; capacity 0 means that there is none."""

    __pydantic_config__ = records.STRICT

    name: str
    memory_bytes: Bytes


@dataclass(frozen=True, kw_only=True)
class Link:
    """A one-way copy between two tiers: seconds = latency_s + bytes / bytes_per_s.

    ``cache_bytes_per_s`` holds the KV cache's own rate where the software moves it by another route
    than weights (through pageable memory, say).
    """

    __pydantic_config__ = records.STRICT

    bytes_per_s: BytesPerSecond
    latency_s: Seconds
    cache_bytes_per_s: BytesPerSecond | None = None

    def __post_init__(self) -> None:
        _positive(self, ("bytes_per_s", "cache_bytes_per_s"))

    @property
    def for_cache(self) -> Quantity:
        """The rate at which the KV cache crosses this link."""
        return self.bytes_per_s if self.cache_bytes_per_s is None else self.cache_bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Links:
    """The four copies that offloading is made of."""

    __pydantic_config__ = records.STRICT

    cpu_to_gpu: Link
    gpu_to_cpu: Link
    disk_read: Link
    disk_write: Link


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Facts about the program that drives the machine, read in its source rather than fitted.

    ``unhidden_share`` is the share of hidden work that still lengthens an overlapped stage.
    ``stages`` says what overlaps with what: loads of a whole layer with the layer before, or loads of the
    MLP with attention and of attention with the MLP; ``weight_loads`` whether a load is spread over all
    batches of the block or runs beside the first one only; ``cache_loads`` whether the computation waits
    while the cache is copied to the GPU (a copy through pageable memory blocks the thread that launches
    kernels). ``prefill_logits`` says for which prompt positions the LM head runs.
    ``attention_scores`` says whether prefill attention writes its score matrix to memory (``"stored"``)
    or not (``"fused"``), ``attention_causal_share`` which part of the score matrix is computed.
    ``prefill_rows`` limits the tokens of whole prompts that a layer computes at a time in prefill, which
    bounds its working memory; ``None``: those of the GPU batch. ``expanded`` says how much of
    what is kept in 4 bits lies in 16 at a time: all weights of a layer and a batch's cache, a layer's largest
    matrix, or pieces that are too small to count.
    ``buffers`` says whether those for streamed cache are there in decode only, or ``"always"``.
    """

    __pydantic_config__ = records.STRICT

    name: str
    unhidden_share: Quantity
    stages: Literal["layer", "attention and mlp"]
    weight_loads: Literal["spread", "first batch"]
    cache_loads: Literal["overlapped", "blocking"]
    prefill_logits: Literal["last", "all"]
    attention_scores: Literal["fused", "stored"]
    attention_causal_share: Quantity
    prefill_rows: int | None = None
    expanded: Literal["layer and cache", "matrix", "pieces"] = "layer and cache"
    buffers: Literal["as needed", "always"] = "as needed"

    def __post_init__(self) -> None:
        if self.prefill_rows is not None and self.prefill_rows < 1:
            raise InputError(f"prefill_rows is {self.prefill_rows}: it must be at least 1")
        for name in ("unhidden_share", "attention_causal_share"):
            if getattr(self, name).value > 1:
                raise InputError(f"{name}.value is {getattr(self, name).value:g}: it must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One machine, as one engine drives it.

    ``flexgen_constants`` holds the constants released with the published model where they exist for
    this machine (bytes/s, FLOP/s); other machines derive them. ``calibration`` says how well numbers fitted to runs
    are known.
    """

    __pydantic_config__ = records.STRICT

    name: str
    description: str
    gpu: Gpu
    cpu: Cpu
    disk: Disk
    links: Links
    engine: Engine
    sources: dict[str, Source]
    flexgen_constants: dict[str, Quantity] | None = None
    measured: dict[str, Any] | None = field(default=None)
    calibration: Calibrated | None = None

    def __post_init__(self) -> None:
        for name, constant in (self.flexgen_constants or {}).items():
            if constant.value <= 0:
                raise InputError(f"flexgen_constants.{name}.value is {constant.value:g}: it must be greater than 0")
        for path, quantity in quantities(self):
            for key in (quantity.source, quantity.efficiency_source):
                if key is not None and key not in self.sources:
                    known = ", ".join(sorted(self.sources)) or "none"
                    raise InputError(f"{path} names source {key!r}, which 'sources' does not define (it has: {known})")
        self._check_calibration()

    def _check_calibration(self) -> None:
        if self.calibration is None:
            return
        if self.calibration.source not in self.sources:
            raise InputError(f"calibration names source {self.calibration.source!r}, which 'sources' does not define")
        unknown = set(self.calibration.constants) - set(self.rates)
        if unknown:
            raise InputError(f"calibration.constants names {sorted(unknown)[0]!r}, which is no rate of this machine")

    @property
    def capacity_bytes(self) -> dict[str, float]:
        """Bytes by tier, before any usable fraction."""
        tiers: dict[str, Gpu | Cpu | Disk] = {"gpu": self.gpu, "cpu": self.cpu, "disk": self.disk}
        return {tier: part.memory_bytes.effective for tier, part in tiers.items()}

    @property
    def rates(self) -> dict[str, Quantity]:
        """Every quantity but the capacities, which are budgets of a run, by path: what makes a machine the same."""
        return {path: one for path, one in quantities(self) if not path.endswith("memory_bytes")}

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> "Hardware":
        """Read a hardware file (the catalogue's format, which the profiler writes too)."""
        return cls.from_dict(records.read_json(path), where=str(path))

    @classmethod
    def from_dict(cls, data: object, *, where: str = "hardware") -> "Hardware":
        """Build from the JSON form, which carries ``"schema": "tierwise.hardware/1"``."""
        return records.from_dict(cls, records.check_schema(data, SCHEMA, where=where), where=where)

    @classmethod
    def from_catalog(cls, name: str) -> "Hardware":
        """Load a catalogue machine by name, such as ``"t4"``."""
        names = catalog_names()
        if name not in names:
            raise records.nearest(name, names, what="GPU")
        return _from_catalog(name)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, schema included."""
        return {"schema": SCHEMA, **records.to_dict(self)}

    def replace(self, path: str, value: float, *, source: str) -> "Hardware":
        """A copy in which the quantity at ``path`` (``"links.disk_read.bytes_per_s"``) is ``value``.

        The new number stands alone: efficiency 1, no curve; ``source`` is recorded as its origin.
        """
        sources = {**self.sources, source: Source(title=source, date=AS_GIVEN)}
        known = dataclasses.replace(self, sources=sources)
        return known.changed(path, lambda old: type(old)(value=value, source=source))

    def raised(self, path: str, amount: float) -> "Hardware":
        """A copy in which the effective quantity at ``path`` is larger by ``amount`` (a curve by its share)."""

        def raise_by(old: Quantity) -> Quantity:
            changes: dict[str, Any] = {"value": (old.effective + amount) / old.efficiency}
            if isinstance(old, Rate) and old.curve is not None:
                factor = (old.effective + amount) / old.effective
                changes["curve"] = tuple((rows, rate * factor) for rows, rate in old.curve)
            return dataclasses.replace(old, **changes)

        return self.changed(path, raise_by)

    def changed(self, path: str, change: Callable[[Quantity], Quantity]) -> "Hardware":
        """A copy with ``change`` applied to the quantity at a dotted path; an unknown path is an error."""

        def walk(owner: Any, steps: list[str]) -> Any:
            head, *rest = steps
            child = owner.get(head) if isinstance(owner, dict) else getattr(owner, head, None)
            if child is None or (not rest and not isinstance(child, Quantity)):
                raise InputError(f"hardware {self.name!r} has no quantity {path!r}")
            new = walk(child, rest) if rest else change(child)
            return {**owner, head: new} if isinstance(owner, dict) else dataclasses.replace(owner, **{head: new})

        copy: Hardware = walk(self, path.split("."))
        return copy


def quantities(hardware: Hardware) -> list[tuple[str, Quantity]]:
    """Every quantity of the machine with its dotted path."""

    def walk(prefix: str, node: object) -> list[tuple[str, Quantity]]:
        if isinstance(node, Quantity):
            return [(prefix, node)]
        if isinstance(node, Mapping):
            pairs = [(str(key), value) for key, value in node.items()]
        elif dataclasses.is_dataclass(node):
            pairs = [(f.name, getattr(node, f.name)) for f in dataclasses.fields(node)]
        else:
            return []
        return [found for key, value in pairs for found in walk(f"{prefix}.{key}" if prefix else key, value)]

    return walk("", hardware)


@cache
def catalog_names() -> tuple[str, ...]:
    """Names of the machines in the catalogue, sorted."""
    folder = resources.files("costmodel.catalog") / "hardware"
    return tuple(sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json")))


@cache
def _from_catalog(name: str) -> Hardware:
    text = (resources.files("costmodel.catalog") / "hardware" / f"{name}.json").read_text(encoding="utf-8")
    where = f"catalogue {name}.json"
    return Hardware.from_dict(records.parse_json(text, where=where), where=where)
