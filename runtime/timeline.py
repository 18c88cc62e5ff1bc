"""Timeline: when each resource worked, as busy seconds and bytes, and if wanted as a Chrome trace.

Threads that move bytes report from where they are; the busy seconds of a resource are those in which at
least one of its moves was under way, so that eight reads side by side count once.
"""

import json
import os
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from costmodel import records
from costmodel.estimate import PHASES
from costmodel.formulations.base import LINKS, RESOURCES, Resource

MOST_EVENTS = 2_000_000
"""Events a trace keeps (about 200 MB as JSON): a viewer opens no more, and memory is spoken for."""


class Timeline:
    """Busy seconds by phase and resource, and bytes by link; ``trace`` keeps every event as well."""

    def __init__(self, *, trace: bool = False) -> None:
        self._lock = threading.Lock()
        self._events: list[tuple[str, str, float, float, int]] | None = [] if trace else None
        self.dropped_events = 0
        self.began = time.perf_counter()
        self._until: dict[str, float] = defaultdict(float)
        self.reset()

    def reset(self) -> None:
        """Forget the sums, not the events."""
        with self._lock:
            self.busy_s = {phase: dict.fromkeys(map(str, RESOURCES), 0.0) for phase in PHASES}
            self.bytes_moved: dict[str, float] = dict.fromkeys(map(str, LINKS), 0.0)
            self._phase = PHASES[0]

    def clear(self) -> None:
        """Forget everything: what follows is as of a new one."""
        self.reset()
        with self._lock:
            if self._events is not None:
                self._events = []
            self.dropped_events = 0
            self.began = time.perf_counter()

    def enter(self, phase: str) -> None:
        """What is added from now on belongs to this phase."""
        with self._lock:
            self._phase = phase

    def add(self, resource: Resource, name: str, start: float, stop: float, nbytes: int = 0) -> None:
        """One piece of work from ``start`` to ``stop`` (of ``time.perf_counter``); any thread may call."""
        with self._lock:
            fresh = stop - max(start, self._until[resource])
            if fresh > 0:
                self.busy_s[self._phase][resource] += fresh
                self._until[resource] = stop
            if nbytes:
                self.bytes_moved[resource] += nbytes
            if self._events is None:
                return
            if len(self._events) >= MOST_EVENTS:
                self.dropped_events += 1
                return
            self._events.append((resource, name, start, stop, nbytes))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the events in Chrome's trace format (chrome://tracing, ui.perfetto.dev), one row a resource."""
        rows = {resource: number for number, resource in enumerate(RESOURCES)}
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": row, "args": {"name": resource}}
            for resource, row in rows.items()
        ]
        with self._lock:
            kept = list(self._events or ())
        lanes: dict[str, list[float]] = {resource: [] for resource in RESOURCES}
        for resource, name, start, stop, nbytes in sorted(kept, key=lambda event: event[2]):
            lane = _free_lane(lanes[resource], start, stop)
            event = {"ph": "X", "name": name, "cat": resource, "pid": 1, "tid": rows[resource] + 100 * lane}  # type: ignore[index]
            event |= {"ts": (start - self.began) * 1e6, "dur": (stop - start) * 1e6}
            if nbytes:
                event["args"] = {"bytes": nbytes}
            events.append(event)
        text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":"))
        records.write_bytes(text.encode(), Path(path))


def _free_lane(lanes: list[float], start: float, stop: float) -> int:
    """The first lane whose last event has ended by ``start``: events of one row must not overlap."""
    for number, until in enumerate(lanes):
        if until <= start:
            lanes[number] = stop
            return number
    lanes.append(stop)
    return len(lanes) - 1
