"""The schedule against what any correct block schedule must satisfy, stated independently of its code."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodel.errors import InputError
from costmodel.schedule import Place, Step, block_schedule

counts = st.integers(1, 5)


def test_a_single_layer_and_batch_never_loads_what_is_not_stored_yet() -> None:
    a, b = Place(0, 0, 0), Place(1, 0, 0)
    assert list(block_schedule(num_layers=1, num_gpu_batches=1, gen_len=2)) == [
        (Step("load_weights", a),),
        (Step("load_activations", a),),
        (Step("compute", a), Step("load_weights", b)),
        (Step("store_cache", a), Step("store_activations", a)),
        (Step("load_cache", b), Step("load_activations", b)),
        (Step("compute", b),),
        (Step("store_cache", b), Step("store_activations", b)),
    ]


def test_two_layers_of_three_batches_by_hand() -> None:
    a, b, c, d, e, f = (Place(0, layer, batch) for layer in range(2) for batch in range(3))

    def stored(place: Place) -> tuple[Step, Step]:
        return Step("store_cache", place), Step("store_activations", place)

    assert list(block_schedule(num_layers=2, num_gpu_batches=3, gen_len=1)) == [
        (*(Step("load_weights", a, part, 3) for part in range(3)), Step("load_activations", a)),
        (Step("compute", a), Step("load_weights", d, 0, 3), Step("load_activations", b)),
        (Step("compute", b), Step("load_weights", d, 1, 3), Step("load_activations", c), *stored(a)),
        (Step("compute", c), Step("load_weights", d, 2, 3), Step("load_activations", d), *stored(b)),
        (Step("compute", d), Step("load_activations", e), *stored(c)),
        (Step("compute", e), Step("load_activations", f), *stored(d)),
        (Step("compute", f), *stored(e)),
        stored(f),
    ]


@given(counts, counts, counts)
def test_every_batch_is_computed_once_in_order(layers: int, batches: int, tokens: int) -> None:
    slots = list(block_schedule(num_layers=layers, num_gpu_batches=batches, gen_len=tokens))
    computed = [step.place for slot in slots for step in slot if step.kind == "compute"]
    assert computed == sorted(computed, key=lambda p: (p.token, p.layer, p.batch))
    assert len(computed) == len(set(computed)) == layers * batches * tokens


@given(counts, counts, counts)
def test_nothing_is_computed_before_it_is_loaded_nor_stored_before_it_is_computed(
    layers: int, batches: int, tokens: int
) -> None:
    done: set[tuple[object, ...]] = set()
    for slot in block_schedule(num_layers=layers, num_gpu_batches=batches, gen_len=tokens):
        for step in slot:
            place = step.place
            if step.kind == "compute":
                for part in range(batches):
                    assert ("load_weights", place.token, place.layer, part) in done
                assert ("load_activations", place) in done
                assert place.token == 0 or ("load_cache", place) in done
            if step.kind.startswith("store"):
                assert ("compute", place) in done
            if step.kind == "load_cache":
                # The cache that a token reads was stored by the token before, a whole block earlier.
                earlier = Place(place.token - 1, place.layer, place.batch)
                assert ("store_cache", earlier) in done
            if step.kind == "load_activations" and (place.layer or place.token):
                # A layer reads what the layer before wrote; layer 0 embeds the token sampled after the last.
                earlier = Place(place.token, place.layer - 1, place.batch)
                last = Place(place.token - 1, layers - 1, place.batch)
                assert ("store_activations", earlier if place.layer else last) in done
        for step in slot:
            place = step.place
            key = (place.token, place.layer, step.part) if step.kind == "load_weights" else (place,)
            done.add((step.kind, *key))


@given(counts, counts, counts)
def test_each_pass_loads_every_layer_once_in_equal_parts(layers: int, batches: int, tokens: int) -> None:
    loads = Counter(
        (step.place.token, step.place.layer, step.part, step.parts)
        for slot in block_schedule(num_layers=layers, num_gpu_batches=batches, gen_len=tokens)
        for step in slot
        if step.kind == "load_weights"
    )
    assert loads == {(t, j, part, batches): 1 for t in range(tokens) for j in range(layers) for part in range(batches)}


@pytest.mark.parametrize("field", ["num_layers", "num_gpu_batches", "gen_len"])
def test_counts_below_one_are_refused(field: str) -> None:
    counts = {"num_layers": 1, "num_gpu_batches": 1, "gen_len": 1, field: 0}
    with pytest.raises(InputError, match=f"{field} is 0: it must be at least 1"):
        list(block_schedule(**counts))
