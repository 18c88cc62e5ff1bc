"""Split and Policy: where tensors live, how prompts are batched, which switches are on."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from costmodel import records
from costmodel.errors import InputError

SCHEMA = "tierwise.policy/1"

TIERS = ("gpu", "cpu", "disk")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Fractions of one tensor kind on the three tiers, each in [0, 1], summing to 1."""

    __pydantic_config__ = records.STRICT

    gpu: float
    cpu: float
    disk: float

    def __post_init__(self) -> None:
        for tier in TIERS:
            value = getattr(self, tier)
            if not 0 <= value <= 1:
                raise InputError(f"{tier} is {value}: a fraction must lie in [0, 1]")
        total = self.gpu + self.cpu + self.disk
        if abs(total - 1) > 1e-6:
            raise InputError(f"gpu + cpu + disk is {total:.6g}: the fractions of a split must sum to 1")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A complete decision: three splits, the batch shape and the switches.

    A block is ``gpu_batch_size`` × ``num_gpu_batches`` prompts that share each load of a layer.
    """

    __pydantic_config__ = records.STRICT

    weights: Split
    cache: Split
    activations: Split
    gpu_batch_size: int
    num_gpu_batches: int
    compress_weights: records.Flag = False
    compress_cache: records.Flag = False
    cpu_attention: records.Flag = False
    overlap: records.Flag = True

    def __post_init__(self) -> None:
        for name in ("gpu_batch_size", "num_gpu_batches"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name} is {value}: it must be at least 1")

    @property
    def block_size(self) -> int:
        """Prompts in one block."""
        return self.gpu_batch_size * self.num_gpu_batches

    @classmethod
    def from_percent(cls, percent: tuple[float, ...], **shape: Any) -> "Policy":
        """Build from FlexGen's six numbers: weights GPU, CPU, cache GPU, CPU, activations GPU, CPU.

        What a pair leaves to 100 is on disk. ``shape`` holds the batch shape and the switches.
        """
        weights, cache, activations = splits_from_percent(percent)
        return cls(weights=weights, cache=cache, activations=activations, **shape)

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> "Policy":
        """Read a policy file; a whole search result (``--json``) is accepted too."""
        data = records.read_json(path)
        is_result = isinstance(data, dict) and isinstance(data.get("policy"), dict)
        return cls.from_dict(
            data if is_result else records.check_schema(data, SCHEMA, where=str(path)), where=str(path)
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str) -> "Policy":
        """Read what :meth:`to_dict` gives, or the content of a policy file or a search result; ``where`` names it."""
        if isinstance(data.get("policy"), Mapping):
            return records.from_dict(cls, dict(data["policy"]), where=f"{where}: policy")
        if "schema" in data:
            data = records.check_schema(dict(data), SCHEMA, where=where)
        return records.from_dict(cls, dict(data), where=where)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form without the schema key, as it stands inside a search result."""
        return records.to_dict(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the policy file atomically."""
        records.write_json({"schema": SCHEMA, **self.to_dict()}, path)

    def replace(self, **changes: Any) -> "Policy":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def splits_from_percent(percent: tuple[float, ...]) -> tuple[Split, Split, Split]:
    """Turn ``W_GPU W_CPU C_GPU C_CPU A_GPU A_CPU`` into the splits of weights, cache and activations."""
    if len(percent) != 6:
        raise InputError(f"--percent takes 6 numbers (W_GPU W_CPU C_GPU C_CPU A_GPU A_CPU), not {len(percent)}")
    splits = []
    for kind, gpu, cpu in zip(("weights", "cache", "activations"), percent[0::2], percent[1::2], strict=True):
        for tier, value in (("GPU", gpu), ("CPU", cpu)):
            if not 0 <= value <= 100:
                raise InputError(f"--percent: {kind} on the {tier} is {value:g}: a percentage must lie in [0, 100]")
        if gpu + cpu > 100 + 1e-6:
            raise InputError(
                f"--percent: {kind} on GPU and CPU sum to {gpu + cpu:g}: the limit is 100 (the rest is on disk)"
            )
        rest = max(0.0, 100 - gpu - cpu)
        splits.append(Split(gpu=gpu / 100, cpu=cpu / 100, disk=rest / 100))
    return splits[0], splits[1], splits[2]
