"""Meter: the blocks of a run, summed up as the same record that a prediction is."""

from typing import Any

from costmodel.estimate import PHASES, Estimate
from costmodel.formulations.base import RESOURCES
from runtime.execute import BlockTimes
from runtime.timeline import Timeline

ROUNDED_BYTES = 2**16
"""What a tier may hold above its limit and not be called overfull: places begin at multiples of 512 B and of a page."""


class Meter:
    """Collects the blocks of one job; made when it begins."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        timeline.reset()
        self.blocks: list[BlockTimes] = []

    def add(self, times: BlockTimes) -> None:
        """One more block has ended."""
        self.blocks.append(times)

    def estimate(self, generated: int, peaks: dict[str, float], limits: dict[str, float], *, prompts: int) -> Estimate:
        """The job in the fields of a prediction; seconds and bytes of one block are means over the blocks.

        ``generated`` counts the new tokens of all ``prompts``.
        """
        count = len(self.blocks)
        prefill_s = sum(block.prefill_s for block in self.blocks) / count
        decode_s = sum(block.decode_s for block in self.blocks) / count
        job_s = (prefill_s + decode_s) * count
        busy_s = {phase: {r: s / count for r, s in self._timeline.busy_s[phase].items()} for phase in PHASES}
        violations = tuple(tier for tier, peak in peaks.items() if peak > limits[tier] + ROUNDED_BYTES)
        decoded = max(0, generated - prompts) / count
        return Estimate(
            prefill_s=prefill_s,
            decode_s=decode_s,
            latency_s=prefill_s + decode_s,
            throughput_tok_per_s=generated / job_s,
            decode_throughput_tok_per_s=decoded / decode_s if decode_s and decoded else None,
            blocks=count,
            job_s=job_s,
            peak_bytes=peaks,
            limit_bytes=limits,
            bytes_moved={link: moved / count for link, moved in self._timeline.bytes_moved.items()},
            busy_s=busy_s,
            bottleneck=_busiest(busy_s),
            feasible=not violations,
            violations=violations,
        )


def _busiest(busy_s: dict[str, dict[str, float]]) -> dict[str, str]:
    """The busiest resource of each phase that had work."""
    found: dict[str, Any] = {}
    for phase, seconds in busy_s.items():
        resource = max(RESOURCES, key=lambda name: seconds[name])
        if seconds[resource] > 0:
            found[phase] = resource
    return found
