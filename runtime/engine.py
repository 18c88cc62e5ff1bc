"""What generate, chat and batch need of an engine; :class:`runtime.llm.LLM` is the real one."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from costmodel.policy import Policy
from runtime.sampling import SamplingParams
from runtime.sequences import Completion

Prompt = str | Sequence[int]


class Engine(Protocol):
    """A model that is ready to generate.

    ``max_positions`` is the most tokens of prompt and completion together, if there is such a limit.
    """

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Any | None: ...

    @property
    def policy(self) -> Policy: ...

    @property
    def max_positions(self) -> int | None: ...

    @property
    def vocab_size(self) -> int: ...

    def describe(self) -> dict[str, Any]:
        """What a manifest records: whatever decides the answers, JSON-ready, and nothing else."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = ...,
        *,
        keys: Sequence[int] | None = None,
        on_block: Callable[[Sequence[int], Sequence[Completion]], None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Continue every prompt; results in the order of the prompts.

        ``keys`` number the requests for their random numbers. ``on_block`` is called after every finished block
        with the indices of its prompts; ``on_text`` with the pieces of each text as they come; ``on_progress``
        with the new tokens so far and the most there can be.
        """
        ...
