"""Plan how a language model that does not fit its GPU should run: where every tensor lives, how big the batch is.

>>> from costmodel import Hardware, ModelSpec, Workload, search
>>> best = search(hardware=Hardware.from_catalog("t4"), model=ModelSpec.from_catalog("opt-30b"))
>>> best.policy, best.estimate.throughput_tok_per_s, best.gap
"""

from costmodel.commands import signals as _signals  # noqa: F401  first: what follows takes a while to import
from costmodel.errors import InfeasibleError, InputError, SolverError, TierwiseError
from costmodel.estimate import Estimate, estimate
from costmodel.frontier import Frontier, frontier
from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.policy import Policy, Split
from costmodel.search import SearchResult, search
from costmodel.workload import Workload

__version__ = "0.1.0"

__all__ = [
    "Estimate",
    "Frontier",
    "Hardware",
    "InfeasibleError",
    "InputError",
    "ModelSpec",
    "Policy",
    "SearchResult",
    "SolverError",
    "Split",
    "TierwiseError",
    "Workload",
    "estimate",
    "frontier",
    "search",
]
