"""What is to be generated."""

import pytest

from costmodel import records
from costmodel.errors import InputError
from costmodel.workload import Workload


def test_the_default_is_the_papers() -> None:
    workload = Workload()
    assert (workload.prompt_len, workload.gen_len, workload.total_len) == (512, 32, 544)
    assert (workload.num_prompts, workload.max_latency_s) == (None, None)


def test_one_token_of_everything_is_enough() -> None:
    assert Workload(prompt_len=1, gen_len=1, num_prompts=1).total_len == 2


@pytest.mark.parametrize("name", ["prompt_len", "gen_len", "num_prompts"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_start_at_one(name: str, value: int) -> None:
    with pytest.raises(InputError, match=f"^{name} is {value}: it must be at least 1$"):
        Workload(**{name: value})


@pytest.mark.parametrize("value", [0.0, -2.0, float("inf"), float("nan")])
def test_a_latency_limit_is_a_positive_time(value: float) -> None:
    with pytest.raises(InputError, match=r"^max_latency_s is .*: it must be a positive number of seconds$"):
        Workload(max_latency_s=value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prompt_len": 1.5}, "field 'prompt_len' is 1.5"),
        ({"prompt_len": "many"}, "field 'prompt_len' is 'many'"),
        ({"gen_len": 0}, "gen_len is 0: it must be at least 1"),
        ({"prompts": 3}, "field 'prompts' is not part of the schema"),
    ],
)
def test_a_record_names_its_file_and_field(data: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        records.from_dict(Workload, data, where="job.json")
    assert str(caught.value).startswith(f"job.json: {message}")


def test_a_record_survives_the_round_trip() -> None:
    workload = Workload(prompt_len=7, gen_len=3, num_prompts=11, max_latency_s=2.5)
    assert records.from_dict(Workload, records.to_dict(workload), where="x") == workload
    assert records.to_dict(Workload()) == {"prompt_len": 512, "gen_len": 32}
