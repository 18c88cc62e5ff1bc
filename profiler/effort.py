"""How much to measure in how much time."""

import dataclasses
from dataclasses import dataclass

from costmodel.model import ModelSpec

KiB, MiB, GiB = 2**10, 2**20, 2**30


@dataclass(frozen=True, kw_only=True)
class Effort:
    """One level of thoroughness.

    ``budget_s`` is what the measurements take, start-up excluded. ``working_set_bytes`` is what copies and decode
    attention walk through: more than any processor's cache holds. The layer that is timed is OPT's: ``hidden_size``
    wide, with heads of ``head_dim``, an MLP of ``ffn_size`` (0: four times as wide) and a ``vocabulary``; see
    :meth:`shaped` for those of another model. ``in_detail`` adds other dtypes, and rows between the powers of two.
    """

    name: str
    budget_s: float
    rounds: int
    hidden_size: int
    most_rows_cpu: int
    most_rows_gpu: int
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    copy_bytes: tuple[int, ...]
    disk_bytes: tuple[int, ...]
    disk_threads: tuple[int, ...]
    disk_chunks: tuple[int, ...]
    file_bytes: int
    in_detail: bool
    working_set_bytes: int = 128 * MiB
    vocabulary: int = 50272
    head_dim: int = 128
    ffn_size: int = 0

    def __post_init__(self) -> None:
        if self.ffn_size == 0:
            object.__setattr__(self, "ffn_size", 4 * self.hidden_size)

    def shaped(self, model: ModelSpec) -> "Effort":
        """The same with the widths of a model's layers and head."""
        return dataclasses.replace(
            self,
            hidden_size=model.hidden_size,
            head_dim=model.head_dim,
            ffn_size=model.ffn_size,
            vocabulary=model.vocab_size,
        )

    def beyond(self, cache_bytes: int) -> "Effort":
        """The same with buffers of at least four times the processor's largest cache, up to 1 GiB."""
        return dataclasses.replace(self, working_set_bytes=min(GiB, max(self.working_set_bytes, 4 * cache_bytes)))

    def within(self, available_bytes: float) -> "Effort":
        """The same with narrower layers and smaller buffers where little memory is left."""
        narrower = self
        for hidden_size, needed_bytes in ((4096, 4 * GiB), (2048, 2 * GiB)):
            if narrower.hidden_size >= hidden_size and available_bytes < needed_bytes:
                narrower = dataclasses.replace(
                    narrower,
                    hidden_size=hidden_size // 2,
                    ffn_size=narrower.ffn_size // 2,
                    working_set_bytes=narrower.working_set_bytes // 2,
                )
        return narrower

    @property
    def num_heads(self) -> int:
        """Attention heads that are as wide as the layer together."""
        return max(1, self.hidden_size // self.head_dim)


EFFORTS = {
    effort.name: effort
    for effort in (
        Effort(
            name="quick",
            budget_s=11.5,
            rounds=2,
            hidden_size=2048,
            most_rows_cpu=256,
            most_rows_gpu=4096,
            contexts=(128, 512),
            prompts=(128, 512),
            copy_bytes=(64 * KiB, 4 * MiB, 64 * MiB),
            disk_bytes=(256 * KiB, 4 * MiB, 64 * MiB),
            disk_threads=(2, 4),
            disk_chunks=(4 * MiB,),
            file_bytes=256 * MiB,
            in_detail=False,
        ),
        Effort(
            name="default",
            budget_s=74.0,
            rounds=4,
            hidden_size=4096,
            most_rows_cpu=1024,
            most_rows_gpu=8192,
            contexts=(128, 512, 2048),
            prompts=(128, 512, 1024),
            copy_bytes=(64 * KiB, 512 * KiB, 4 * MiB, 32 * MiB, 128 * MiB),
            disk_bytes=(64 * KiB, 512 * KiB, 4 * MiB, 32 * MiB, 128 * MiB),
            disk_threads=(1, 2, 4),
            disk_chunks=(1 * MiB, 4 * MiB, 16 * MiB),
            file_bytes=1024 * MiB,
            in_detail=True,
        ),
        Effort(
            name="thorough",
            budget_s=300.0,
            rounds=6,
            hidden_size=4096,
            most_rows_cpu=4096,
            most_rows_gpu=16384,
            contexts=(128, 512, 1024, 2048, 4096),
            prompts=(32, 128, 512, 1024, 2048),
            copy_bytes=(4 * KiB, 64 * KiB, 512 * KiB, 4 * MiB, 32 * MiB, 128 * MiB, 256 * MiB),
            disk_bytes=(4 * KiB, 64 * KiB, 512 * KiB, 4 * MiB, 32 * MiB, 128 * MiB, 256 * MiB),
            disk_threads=(1, 2, 4),
            disk_chunks=(1 * MiB, 4 * MiB, 16 * MiB),
            file_bytes=4096 * MiB,
            in_detail=True,
        ),
    )
}
