"""Running a file of requests: chunk by chunk through an engine, every answer to the log as soon as its block ends."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from costmodel import words
from costmodel.errors import InfeasibleError, TierwiseError
from runtime.engine import Engine
from runtime.job_log import JobLog
from runtime.job_source import Source
from runtime.requests import Reader, Refusal, Request
from runtime.sampling import SamplingParams
from runtime.sequences import Completion

_BLOCKS_AT_ONCE = 8
_LEAST_AT_ONCE = 64
_TOKENS_AT_ONCE = 2**20
"""Prompt tokens that are held at a time (unless one block has more): a job may be longer than memory."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a job is; ``done`` counts answers and errors and, where it was resumed, what had been done ``before``."""

    requests: int
    before: int
    done: int
    errors: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    share: float
    """Of what this run has to answer, in [0, 1]."""

    @property
    def answered(self) -> int:
        """The requests with an answer that is no error."""
        return self.done - self.errors

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second of this run."""
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """The seconds that are left at this pace, once there is one."""
        return self.seconds * (1 - self.share) / self.share if self.share > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """The summary for machines."""
        names = ("requests", "answered", "errors", "prompt_tokens", "new_tokens", "seconds", "tokens_per_s")
        return {**{name: getattr(self, name) for name in names}, "done_before": self.before}


def run_batch(
    engine: Engine,
    source: Source,
    log: JobLog,
    *,
    defaults: SamplingParams,
    report: Callable[[Progress], None] | None = None,
) -> Progress:
    """Answer every request of ``source`` that ``log`` does not answer yet.

    ``report`` is called with every step and block. However this ends, what the log holds is whole, and running
    it again with the same arguments answers the rest: a request's random numbers depend on its seed (that of
    ``defaults`` where it has none of its own) and its number in the input.
    """
    return _Job(engine, source, log, defaults, report).run()


class _Job:
    """The counters of one run."""

    def __init__(
        self,
        engine: Engine,
        source: Source,
        log: JobLog,
        defaults: SamplingParams,
        report: Callable[[Progress], None] | None,
    ) -> None:
        self._engine, self._source, self._log, self._report = engine, source, log, report
        self._reader = Reader(
            tokenizer=engine.tokenizer,
            max_positions=engine.max_positions,
            vocab_size=engine.vocab_size,
            defaults=defaults,
        )
        self._before = len(log.answered)
        self._start = time.monotonic()
        self._prompt_tokens = self._new_tokens = 0
        self._running_tokens = 0  # new ones of requests that are not answered yet
        self._running_share = 0.0  # requests' worth of work in the present block
        self._share = 0.0

    def run(self) -> Progress:
        refused: list[Refusal] = []
        chunk: list[Request] = []
        for line in self._source.lines():
            if self._log.is_answered(line):
                self._reader.note(line)
                continue
            read = self._reader.read(line)
            if isinstance(read, Refusal):
                refused.append(read)
            else:
                chunk.append(read)
            if self._is_full(chunk) or len(refused) >= _LEAST_AT_ONCE:
                self._refuse(refused)
                refused = []
            if self._is_full(chunk):
                self._generate(chunk)
                chunk = []
        self._refuse(refused)
        self._generate(chunk)
        if len(self._log.answered) != self._source.requests:
            answered = words.counted(len(self._log.answered), "request")
            raise TierwiseError(
                f"{self._log.path} answers {answered} and {self._source.path} holds "
                f"{self._source.requests}: one of the two was changed meanwhile"
            )
        return self._progress()

    def _is_full(self, chunk: Sequence[Request]) -> bool:
        """Whole blocks, so that none but the last is short."""
        block = self._engine.policy.block_size
        if not chunk or len(chunk) % block:
            return False
        enough = max(_BLOCKS_AT_ONCE * block, _LEAST_AT_ONCE)
        return len(chunk) >= enough or sum(len(request.prompt) for request in chunk) >= _TOKENS_AT_ONCE

    def _refuse(self, refused: Sequence[Refusal]) -> None:
        if refused:
            self._log.append([(one.line, one.record()) for one in refused])
            self._tell()

    def _generate(self, chunk: Sequence[Request]) -> None:
        """Answer a chunk; where it does not fit, its parts, so that one request too many is alone in failing."""
        if not chunk:
            return
        try:
            self._generate_together(chunk)
        except InfeasibleError as error:
            if len(chunk) == 1:
                (one,) = chunk
                self._refuse([Refusal(line=one.line, custom_id=one.custom_id, code="does_not_fit", message=str(error))])
                return
            by_length = sorted(chunk, key=lambda request: len(request.prompt) + request.params.max_new_tokens)
            self._generate(by_length[: len(chunk) // 2])
            self._generate(by_length[len(chunk) // 2 :])

    def _generate_together(self, chunk: Sequence[Request]) -> None:
        left = set(range(len(chunk)))
        tokens_before = self._new_tokens

        def keep(indices: Sequence[int], completions: Sequence[Completion]) -> None:
            left.difference_update(indices)
            self._running_tokens, self._running_share = 0, 0.0
            self._keep([chunk[index] for index in indices], completions)

        def progress(tokens: int, at_most: int) -> None:
            done = len(chunk) - len(left)
            self._running_share = max(0.0, len(chunk) * tokens / max(1, at_most) - done)
            self._running_tokens = max(0, tokens - (self._new_tokens - tokens_before))
            self._tell()

        completions = self._engine.generate(
            [request.prompt for request in chunk],
            [request.params for request in chunk],
            keys=[request.key for request in chunk],
            on_block=keep,
            on_progress=progress,
        )
        if left:  # an engine that reports no blocks
            rest = sorted(left)
            keep(rest, [completions[index] for index in rest])

    def _keep(self, requests: Sequence[Request], completions: Sequence[Completion]) -> None:
        created = int(time.time())
        answers = [
            (request.line, request.record(done, model=self._engine.name, created=created))
            for request, done in zip(requests, completions, strict=True)
        ]
        self._log.append(answers)
        self._prompt_tokens += sum(done.prompt_tokens for done in completions)
        self._new_tokens += sum(len(done.token_ids) for done in completions)
        self._tell()

    def _tell(self) -> None:
        if self._report is not None:
            self._report(self._progress())

    def _progress(self) -> Progress:
        done, total = len(self._log.answered), self._source.requests
        share = (done - self._before + self._running_share) / max(1, total - self._before)
        self._share = max(self._share, min(1.0, share))  # an estimate that turns out too high is not taken back
        return Progress(
            requests=total,
            before=self._before,
            done=done,
            errors=self._log.errors,
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens + self._running_tokens,
            seconds=time.monotonic() - self._start,
            share=self._share,
        )
