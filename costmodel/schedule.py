"""The block schedule as data: what is loaded, computed and stored in which slot.

For every token, layer and GPU batch there is a slot in which that batch is computed while the next layer's
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

    Transfers run one slot ahead of, or behind, the computation wherever what they move exists by then: a
    batch's hidden states wait for the layer before, so with one or two batches they have slots of their
    own; so has the cache in a pass of one or two slots. Prefill has no cache to load; the last token's
    cache is stored all the same, so that a block can be continued. Raises :class:`InputError` for counts
    below 1.
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
    ahead = {
        kind
        for kind, distance in (("activations", num_gpu_batches), ("cache", num_layers * num_gpu_batches))
        if distance > 2
    }
    behind = {"activations", "cache"} - ahead
    yield (
        *(Step("load_weights", order[0], part, num_gpu_batches) for part in range(num_gpu_batches)),
        *_moves("load", ahead, order, 0),
    )
    for position, place in enumerate(order):
        yield from _filled(_moves("load", behind, order, position))
        slot = [Step("compute", place)]
        if position + num_gpu_batches < len(order):
            # The same batch one layer on: its layer is the next one, of this token or of the next.
            following = order[position + num_gpu_batches]
            slot.append(Step("load_weights", Place(following.token, following.layer, 0), place.batch, num_gpu_batches))
        yield (*slot, *_moves("load", ahead, order, position + 1), *_moves("store", ahead, order, position - 1))
        yield from _filled(_moves("store", behind, order, position))
    yield from _filled(_moves("store", ahead, order, len(order) - 1))


def _moves(verb: Literal["load", "store"], kinds: set[str], order: list[Place], position: int) -> Slot:
    """The transfers of these kinds for the place at ``position``; none outside the block."""
    if not 0 <= position < len(order):
        return ()
    place = order[position]
    steps: list[Step] = []
    if "cache" in kinds and (verb == "store" or place.token):
        steps.append(Step("load_cache" if verb == "load" else "store_cache", place))
    if "activations" in kinds:
        steps.append(Step("load_activations" if verb == "load" else "store_activations", place))
    return tuple(steps)


def _filled(slot: Slot) -> Iterator[Slot]:
    """The slot, unless it is empty."""
    if slot:
        yield slot
