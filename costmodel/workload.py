"""Workload: what is to be generated."""

import math
from dataclasses import dataclass

from costmodel import records
from costmodel.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts of ``prompt_len`` tokens, each continued by ``gen_len`` tokens.

    ``num_prompts`` limits the job (``None``: as many as the machine likes, the throughput of an endless
    queue). ``max_latency_s`` limits the seconds that one block takes from first load to last token.
    """

    __pydantic_config__ = records.STRICT

    prompt_len: int = 512
    gen_len: int = 32
    num_prompts: int | None = None
    max_latency_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_len", "gen_len", "num_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: it must be at least 1")
        if self.max_latency_s is not None and not (self.max_latency_s > 0 and math.isfinite(self.max_latency_s)):
            raise InputError(f"max_latency_s is {self.max_latency_s}: it must be a positive number of seconds")

    @property
    def total_len(self) -> int:
        """Tokens of one finished sequence."""
        return self.prompt_len + self.gen_len
