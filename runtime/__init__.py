"""Running a policy: weights, KV cache and activations on three tiers, a schedule that reuses every load.

>>> from runtime import LLM, SamplingParams
>>> with LLM("dummy:opt-125m", gpu_memory="2GiB") as llm:
...     llm.generate([[2, 100, 200]], SamplingParams(max_new_tokens=8))
"""

from typing import TYPE_CHECKING, Any

from costmodel.commands import signals as _signals  # noqa: F401  first: what follows takes a while to import

if TYPE_CHECKING:
    from runtime.llm import LLM
    from runtime.sampling import SamplingParams
    from runtime.sequences import Completion

__all__ = ["LLM", "Completion", "SamplingParams"]

_HOMES = {"LLM": "runtime.llm", "SamplingParams": "runtime.sampling", "Completion": "runtime.sequences"}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is: the commands' help must not wait for torch."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
