"""The block schedule as data: what is loaded, computed and stored in which slot.

For every token, layer and GPU batch there is one slot: the batch is computed while the next layer's
weights (a part in every slot, so that the load is spread over the block), the next batch's cache and
activations are loaded and the previous batch's are stored. The runtime plays the slots one after
another; the steps of a slot may run side by side. Nothing here touches a tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from costmodel.errors import InputError

Kind = Literal["load_weights", "load_cache", "load_activations", "compute", "store_cache", "store_activations"]


@dataclass(frozen=True)
class Place:
    """One computation of the schedule: which new token, which layer, which GPU batch (from 0).

    ``token`` 0 is the prefill, which computes the first new token from the whole prompt.
    """

    token: int
    layer: int
    batch: int


@dataclass(frozen=True)
class Step:
    """One action for one place.

    ``part`` of ``parts`` says which share of the layer's streamed weights a ``load_weights`` moves; every
    other kind moves or computes the whole batch (part 0 of 1).
    """

    kind: Kind
    place: Place
    part: int = 0
    parts: int = 1


Slot = tuple[Step, ...]


def block_schedule(*, num_layers: int, num_gpu_batches: int, gen_len: int) -> Iterator[Slot]:
    """Yield the slots of one block, from the first load to the last store.

    The first slot fills the pipeline and the last one drains it. Prefill has no cache to load; the last
    token's cache is stored all the same, so that a block can be continued. A pass of one or two slots is
    too short to load a batch's next cache before the last one is stored: there, loads and stores have
    slots of their own. Raises :class:`InputError` for counts below 1.
    """
    for name, value in (("num_layers", num_layers), ("num_gpu_batches", num_gpu_batches), ("gen_len", gen_len)):
        if value < 1:
            raise InputError(f"{name} is {value}: it must be at least 1")
    order = [
        Place(token, layer, batch)
        for token in range(gen_len)
        for layer in range(num_layers)
        for batch in range(num_gpu_batches)
    ]
    first = order[0]
    yield tuple(
        [Step("load_weights", first, part, num_gpu_batches) for part in range(num_gpu_batches)] + list(_loads(first))
    )
    pipelined = num_layers * num_gpu_batches > 2
    for position, place in enumerate(order):
        slot = [Step("compute", place)]
        if position + num_gpu_batches < len(order):
            # The same batch one layer on: its layer is the next, of this token or of the next one.
            ahead = order[position + num_gpu_batches]
            following = Place(ahead.token, ahead.layer, 0)
            slot.append(Step("load_weights", following, place.batch, num_gpu_batches))
        following_loads = tuple(_loads(order[position + 1])) if position + 1 < len(order) else ()
        if pipelined:
            slot += following_loads
            slot += _stores(order[position - 1]) if position else ()
            yield tuple(slot)
        else:
            yield tuple(slot)
            yield tuple(_stores(place))
            if following_loads:
                yield following_loads
    if pipelined:
        yield tuple(_stores(order[-1]))


def _loads(place: Place) -> Iterator[Step]:
    if place.token:
        yield Step("load_cache", place)
    yield Step("load_activations", place)


def _stores(place: Place) -> Iterator[Step]:
    yield Step("store_cache", place)
    yield Step("store_activations", place)
