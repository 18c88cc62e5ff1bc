"""What generate, chat and batch need of an engine; :class:`runtime.llm.LLM` is the real one."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from costmodel.measurement import Measurement
from costmodel.policy import Policy
from costmodel.workload import Workload
from runtime.sampling import SamplingParams
from runtime.sequences import Completion
from runtime.tokens import Reader

if TYPE_CHECKING:
    from runtime.plan import Plan

Prompt = str | Sequence[int]

Load = Callable[..., AbstractContextManager["Engine"]]
"""Makes an engine from a command's flags: :func:`runtime.engine_flags.load_engine`, or a test's own."""


class Engine(Reader, Protocol):
    """A model that is ready to generate."""

    @property
    def policy(self) -> Policy: ...

    @property
    def measurement(self) -> Measurement | None:
        """What the last call of :meth:`generate` took."""
        ...

    def prepare(self, workload: Workload) -> "Plan | None":
        """Choose the policy for such prompts, unless it was given, and load the weights; once."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a manifest records: whatever decides the answers, JSON-ready; there must be a policy."""
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
