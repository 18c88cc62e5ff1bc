"""Work that was started and is not yet done: copies between tiers, reads and writes of the disk."""

import concurrent.futures
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch


class Pending(ABC):
    """Bytes on their way. Whoever started them must wait before it uses, or reuses, either end."""

    @abstractmethod
    def done(self) -> bool:
        """Whether the bytes have arrived (or failed to)."""

    @abstractmethod
    def wait(self) -> None:
        """Make what the caller computes next see the bytes; on CUDA only the current stream waits."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block the calling thread until the bytes have arrived."""

    def help(self) -> None:
        """Do what nobody has begun, in the calling thread, which has nothing else to do. Most work cannot be helped."""
        return


def drain(*groups: dict[Any, list[Pending]]) -> None:
    """Block until whatever is on its way has arrived, and forget it; only then is the first error raised."""
    errors: list[Exception] = []
    for group in groups:
        for pending in (one for pendings in group.values() for one in pendings):
            try:
                pending.synchronize()
            except Exception as error:
                errors.append(error)
        group.clear()
    if errors:
        raise errors[0]


class Arrived(Pending):
    """Nothing was left to do."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def synchronize(self) -> None:
        return


class OnStream(Pending):
    """Work queued on a CUDA stream, up to an event; ``held`` keeps its tensors alive until then."""

    def __init__(self, event: torch.cuda.Event, *held: object) -> None:
        self._event = event
        self._held = held

    @property
    def event(self) -> torch.cuda.Event:
        """What another stream waits for."""
        return self._event

    def done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)

    def synchronize(self) -> None:
        self._event.synchronize()


class OnThreads(Pending):
    """Work done by threads of a pool; an error in one of them is raised by whoever waits.

    The first error is raised only after every part has ended, so that no thread still touches a buffer
    that its owner is about to release.
    """

    def __init__(self, pool: concurrent.futures.Executor, works: Iterable[Callable[[], None]]) -> None:
        self._works = tuple(works)
        self._parts = [pool.submit(work) for work in self._works]

    def done(self) -> bool:
        return all(part.done() for part in self._parts)

    def wait(self) -> None:
        self.synchronize()

    def help(self) -> None:
        for number, work in enumerate(self._works):
            if self._parts[number].cancel():  # no thread has begun it
                part = self._parts[number] = concurrent.futures.Future()
                try:
                    work()
                except Exception as error:
                    part.set_exception(error)
                finally:  # an interrupt passes on, and the part is over: nobody touches its buffer any more
                    if not part.done():
                        part.set_result(None)

    def synchronize(self) -> None:
        concurrent.futures.wait(self._parts)
        for part in self._parts:
            part.result()
