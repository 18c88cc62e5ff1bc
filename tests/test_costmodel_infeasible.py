"""When nothing fits: the limit that is named, and the remedy that is offered, really are such."""

from collections.abc import Mapping
from typing import Any, cast

import pytest

from costmodel import Hardware, InfeasibleError, ModelSpec, Workload, search
from costmodel.errors import InputError, SolverError, TierwiseError
from costmodel.overrides import with_overrides

T4 = Hardware.from_catalog("t4")
TIGHT = with_overrides(T4, cpu_memory=8e9, disk=0.0)
NO_COMPRESSION = {"compress_weights": False, "compress_cache": False}


def refused(hardware: Hardware, model: str, **request: Any) -> InfeasibleError:
    with pytest.raises(InfeasibleError) as caught:
        search(hardware=hardware, model=ModelSpec.from_catalog(model), with_prices=False, **request)
    return caught.value


def fits(hardware: Hardware, model: str, **request: Any) -> bool:
    try:
        search(hardware=hardware, model=ModelSpec.from_catalog(model), with_prices=False, **request)
    except InfeasibleError:
        return False
    return True


@pytest.mark.parametrize("formulation", ["roofline", "flexgen"])
@pytest.mark.parametrize(("tier", "flag"), [("gpu", "gpu_memory"), ("cpu", "cpu_memory"), ("disk", "disk")])
def test_the_least_memory_named_is_enough_and_little_less_is_not(formulation: str, tier: str, flag: str) -> None:
    switches = {"compress_weights": False} if formulation == "flexgen" else NO_COMPRESSION
    request = {"formulation": formulation, "switches": switches, "workload": Workload(prompt_len=64, gen_len=8)}
    error = refused(TIGHT, "opt-30b", **request)
    least = cast("Mapping[str, float]", error.reason["least_capacity_bytes"])
    if tier not in least:
        pytest.skip(f"no size of the {tier} alone mends it")
    change = cast("dict[str, Any]", {flag: least[tier]})
    assert fits(with_overrides(TIGHT, **change), "opt-30b", **request)
    change = cast("dict[str, Any]", {flag: least[tier] * 0.99})
    assert not fits(with_overrides(TIGHT, **change), "opt-30b", **request)


def test_the_message_names_machine_model_sizes_and_remedies() -> None:
    error = refused(TIGHT, "opt-30b", switches=NO_COMPRESSION)
    message = str(error)
    for part in ("opt-30b", "t4", "7.451 GiB", "--cpu-memory of at least", "--disk of at least"):
        assert part in message
    assert "\n" not in message
    assert error.exit_code == 3


def test_compression_is_offered_where_it_helps_and_works() -> None:
    machine = with_overrides(T4, cpu_memory=16e9, disk=0.0)
    error = refused(machine, "opt-30b", switches=NO_COMPRESSION)
    assert error.reason["compression"]
    assert "--compress-weights on" in str(error)
    assert fits(machine, "opt-30b", switches={"compress_cache": False, "compress_weights": True})


def test_compression_is_not_offered_where_it_does_not_help() -> None:
    error = refused(with_overrides(T4, cpu_memory=1e9, disk=0.0), "opt-175b", switches=NO_COMPRESSION)
    assert not error.reason["compression"]


def test_a_block_that_cannot_be_fast_enough_names_the_least_latency() -> None:
    error = refused(T4, "opt-30b", workload=Workload(max_latency_s=1.0))
    assert error.reason["limit"] == "max_latency_s"
    least = cast("float", error.reason["least"])
    assert fits(T4, "opt-30b", workload=Workload(max_latency_s=least * 1.001))
    assert not fits(T4, "opt-30b", workload=Workload(max_latency_s=least * 0.99))


def test_a_given_batch_shape_is_the_one_that_does_not_fit() -> None:
    error = refused(T4, "opt-175b", gpu_batch_size=5000, num_gpu_batches=2)
    assert "5000" in str(error).replace(",", "")


def test_the_tree_of_exit_codes() -> None:
    codes = {error: error.exit_code for error in (InputError, InfeasibleError, SolverError)}
    assert codes == {InputError: 2, InfeasibleError: 3, SolverError: 4}
    assert all(issubclass(error, TierwiseError) for error in codes)
    assert issubclass(InputError, ValueError)
