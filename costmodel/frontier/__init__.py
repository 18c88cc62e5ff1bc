"""The latency–throughput frontier: the best throughput for every latency that a block may take."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from costmodel import records
from costmodel.errors import InfeasibleError, InputError
from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.search import SearchResult, least_latency_s, make_problem, search
from costmodel.workload import Workload

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "tierwise.frontier/1"


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Certified searches under ever looser latency limits, fastest block first, dominated ones left out."""

    points: tuple[SearchResult, ...]
    hardware: Hardware
    model: ModelSpec
    workload: Workload
    formulation: str

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON form."""
        return {
            "schema": SCHEMA,
            "points": [
                {
                    "latency_s": point.estimate.latency_s,
                    "throughput_tok_per_s": point.estimate.throughput_tok_per_s,
                    "bound_tok_per_s": point.bound_tok_per_s,
                    "policy": point.policy.to_dict(),
                    "estimate": point.estimate.to_dict(),
                }
                for point in self.points
            ],
            "formulation": self.formulation,
            "workload": records.to_dict(self.workload),
            "model": self.model.to_dict(),
            "hardware": self.hardware.to_dict(),
        }

    def to_frame(self) -> "pd.DataFrame":
        """One row a point, units in the column names."""
        from costmodel.tables import policy_frame

        return policy_frame([(point.policy, point.estimate) for point in self.points])


def frontier(
    *,
    hardware: Hardware,
    model: ModelSpec,
    workload: Workload | None = None,
    points: int = 12,
    progress: Callable[[int, int], None] | None = None,
    **request: Any,
) -> Frontier:
    """Trace the frontier with ``points`` latency limits, evenly spaced in log(latency).

    ``request`` takes the other keywords of :func:`costmodel.search.search`. The limits run from the
    fastest block that any policy allows to the latency of the best policy without a limit. ``progress``
    is called with the searches done and to do. Raises as the search does.
    """
    if points < 2:
        raise InputError(f"points is {points}: a frontier needs at least 2")
    workload = workload or Workload()
    ceiling = workload.max_latency_s
    problem_keys = {key: value for key, value in request.items() if key not in ("gap", "top", "with_prices")}
    best = search(hardware=hardware, model=model, workload=workload, with_prices=False, **_plain(request))
    fastest = least_latency_s(make_problem(hardware=hardware, model=model, workload=workload, **problem_keys))
    slowest = best.estimate.latency_s
    found = []
    limits = np.geomspace(fastest * (1 + 1e-4), slowest, points)[:-1] if slowest > fastest else np.array([])
    for done, limit in enumerate(limits, start=1):
        if progress is not None:
            progress(done, len(limits) + 1)
        limited = replace(workload, max_latency_s=float(limit if ceiling is None else min(limit, ceiling)))
        try:
            found.append(search(hardware=hardware, model=model, workload=limited, with_prices=False, **_plain(request)))
        except InfeasibleError:
            continue
    return Frontier(
        points=_undominated([*found, best]),
        hardware=hardware,
        model=model,
        workload=workload,
        formulation=best.formulation,
    )


def _plain(request: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in request.items() if key != "with_prices"}


def _undominated(results: list[SearchResult]) -> tuple[SearchResult, ...]:
    """Sorted by latency, each with a higher throughput than all before."""
    kept: list[SearchResult] = []
    for result in sorted(results, key=lambda r: (r.estimate.latency_s, -r.estimate.throughput_tok_per_s)):
        if not kept or result.estimate.throughput_tok_per_s > kept[-1].estimate.throughput_tok_per_s * (1 + 1e-6):
            kept.append(result)
    return tuple(kept)
