"""The generate API against transformers, the accounting against the plan, and what it refuses."""

import json
import threading
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from costmodel.errors import InfeasibleError, InputError
from costmodel.hardware import Hardware
from costmodel.measurement import Measurement
from costmodel.policy import Policy, Split
from costmodel.units import GiB
from costmodel.workload import Workload
from runtime import LLM, SamplingParams, environment
from runtime.generation import Callbacks, Generation
from tests.checkpoints import randomised

VOCABULARY = 203
ON_GPU = Split(gpu=1, cpu=0, disk=0)
POLICY = Policy(
    weights=Split(gpu=0.4, cpu=0.2, disk=0.4),
    cache=Split(gpu=0.5, cpu=0.2, disk=0.3),
    activations=ON_GPU,
    gpu_batch_size=3,
    num_gpu_batches=2,
)


def hardware() -> Hardware:
    """A machine whose first tier is host memory; its rates do not matter here."""
    return Hardware.from_catalog("cpu-laptop")


@cache
def reference() -> OPTForCausalLM:
    torch.manual_seed(5)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        num_attention_heads=4,
        ffn_dim=96,
        num_hidden_layers=2,
        max_position_embeddings=64,
        eos_token_id=0,
    )
    return randomised(OPTForCausalLM(config), std=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    reference().save_pretrained(path)
    return path


def engine(folder: Path, offload: Path, **options) -> LLM:
    settings = {"policy": POLICY, "hardware": hardware(), "dtype": "float32", "device": "cpu", **options}
    settings = {"gpu_memory": "1GiB", "cpu_memory": "1GiB", **settings}
    return LLM(folder, offload_dir=offload, **settings)


def prompts_of(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def theirs(prompt: list[int], new_tokens: int) -> list[int]:
    """transformers' greedy continuation, its end-of-sequence token included."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = reference().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=1
        )
    return out[0, len(prompt) :].tolist()


def test_more_prompts_than_a_block_come_back_in_order(folder: Path, tmp_path: Path) -> None:
    prompts = prompts_of([5, 1, 9, 3, 3, 7, 2, 11, 4, 6, 8])
    blocks: list[list[int]] = []
    with engine(folder, tmp_path) as llm:
        found = llm.generate(
            prompts, SamplingParams(max_new_tokens=6), on_block=lambda indices, done: blocks.append(list(indices))
        )
        again = llm.generate(prompts[:1], SamplingParams(max_new_tokens=6))
    for prompt, completion in zip(prompts, found, strict=True):
        expected = theirs(prompt, 6)
        ended = expected[-1] == 0
        assert list(completion.token_ids) == (expected[:-1] if ended else expected)
        assert completion.finish_reason == ("stop" if ended else "length")
        assert completion.prompt_tokens == len(prompt)
    assert again == found[:1]
    assert sorted(index for block in blocks for index in block) == list(range(11))
    assert [len(block) for block in blocks] == [6, 5]


def test_the_run_stops_when_all_sequences_have_ended(folder: Path, tmp_path: Path) -> None:
    """Token 0 is the end here: with its logit pushed up, every sequence ends at its first token."""
    model = OPTForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.decoder.final_layer_norm.weight.zero_()
        model.model.decoder.final_layer_norm.bias.copy_(model.model.decoder.embed_tokens.weight[0] * 10)
    model.save_pretrained(tmp_path / "ends")
    with engine(tmp_path / "ends", tmp_path) as llm:
        found = llm.generate(prompts_of([4, 2]), SamplingParams(max_new_tokens=40))
        assert [(one.token_ids, one.finish_reason) for one in found] == [((), "stop")] * 2
        assert llm.measurement is not None
        assert llm.measurement.measured.decode_s < llm.measurement.measured.prefill_s
        kept = llm.generate(prompts_of([4]), SamplingParams(max_new_tokens=5, ignore_eos=True))
    assert kept[0].token_ids == (0,) * 5


def test_a_job_may_be_tried_for_a_few_steps_in_the_room_for_all(folder: Path, tmp_path: Path) -> None:
    prompts, told = prompts_of([5, 3, 9, 7, 2, 4, 8]), []
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    with engine(folder, tmp_path) as llm:
        whole = llm.generate(prompts, params)
        placed = llm.measurement.resident_bytes
        tell = Callbacks(on_progress=lambda done, most: told.append((done, most)))
        job = Generation.of(prompts, params, None, reader=llm, texts=llm.texts, tell=tell, most_steps=2)
        few = llm.complete(job)
        assert llm.measurement.resident_bytes == placed
    assert [one.token_ids for one in few] == [one.token_ids[:2] for one in whole]
    assert told[-1] == (14, 14)


def test_generate_of_tensors_is_that_of_transformers(folder: Path, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 1, 7, 9, 11], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        expected = reference().generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=1)

    class Streamer:
        def __init__(self) -> None:
            self.got: list[list[int]] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.got.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    theirs_streamer, streamer = Streamer(), Streamer()
    with torch.no_grad():
        one = reference().generate(
            ids[1:],
            attention_mask=mask[1:],
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=1,
            streamer=theirs_streamer,
        )
    with engine(folder, tmp_path) as llm:
        found = llm.generate(ids, attention_mask=mask, max_new_tokens=8, pad_token_id=1)
        streamed = llm.generate(ids[1:], max_new_tokens=8, streamer=streamer)
        with pytest.raises(InputError, match="pad on the left"):
            llm.generate(ids, attention_mask=mask.flip(1))
    assert torch.equal(found, expected)
    assert torch.equal(streamed, one)
    assert streamer.got == theirs_streamer.got
    assert streamer.ended


def test_tensors_end_at_the_tokens_that_are_given_as_in_transformers(folder: Path, tmp_path: Path) -> None:
    ids = torch.tensor([[3, 4, 7, 9, 11], [5, 6, 7, 8, 9]])
    first, second = (theirs(row, 8) for row in ids.tolist())
    one = next(token for token in first[1:] if token not in second)
    two = next(token for token in second if token not in first and second.index(token) != first.index(one))
    with engine(folder, tmp_path) as llm:
        for eos in (one, [two, one]):
            with torch.no_grad():
                expected = reference().generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, eos_token_id=eos, pad_token_id=1
                )
            found = llm.generate(ids, max_new_tokens=8, eos_token_id=eos, pad_token_id=1)
            assert torch.equal(found, expected)
            assert 1 in found[:, 5:]
            filled = llm.generate(ids, max_new_tokens=8, eos_token_id=eos, pad_token_id=9)
            assert torch.equal(filled[:, 5:], torch.where(expected[:, 5:] == 1, 9, expected[:, 5:]))


def test_given_ends_stand_in_for_those_of_the_model(folder: Path, tmp_path: Path) -> None:
    prompt = [3, 4, 7, 9, 11]
    going_on = theirs(prompt, 8)
    end = going_on[2]
    model = OPTForCausalLM.from_pretrained(folder)
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    model.save_pretrained(tmp_path / "ends")
    with engine(tmp_path / "ends", tmp_path) as llm:
        ids = torch.tensor([prompt])
        assert llm.generate(ids, max_new_tokens=8)[0, 5:].tolist() == going_on[: going_on.index(end) + 1]
        assert llm.generate(ids, max_new_tokens=8, eos_token_id=[])[0, 5:].tolist() == going_on


def test_sampling_of_tensors_has_the_defaults_of_transformers(folder: Path, tmp_path: Path) -> None:
    prompts = prompts_of([5, 5])
    with engine(folder, tmp_path) as llm:
        for options in ({}, {"temperature": 0.5}, {"top_k": 3, "top_p": 0.5}):
            params = SamplingParams(**{"temperature": 1.0, "top_k": 50, **options}, max_new_tokens=6, seed=4)
            expected = [list(one.token_ids) for one in llm.generate(prompts, params)]
            found = llm.generate(torch.tensor(prompts), max_new_tokens=6, do_sample=True, seed=4, **options)
            assert [row[: len(new)] for row, new in zip(found[:, 5:].tolist(), expected, strict=True)] == expected


IDS = torch.tensor([[5, 6], [7, 8]])


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (IDS, {"temperature": 0.7}, "temperature is 0.7, which cannot take effect without do_sample=True"),
        (IDS, {"top_k": 50}, "top_k is 50, which cannot take effect without do_sample=True"),
        (IDS, {"top_p": 1.0, "do_sample": False}, "top_p is 1.0, which cannot take effect"),
        (IDS, {"seed": 0}, "seed is 0, which cannot take effect without do_sample=True"),
        (IDS, {"temperature": 0.0, "do_sample": True}, "temperature is 0, so do_sample=True cannot take effect"),
        (IDS.float(), {}, r"input_ids is of torch.float32: token ids are of torch.int64 or torch.int32"),
        (IDS.bool(), {}, "input_ids is of torch.bool"),
        (IDS.to(torch.uint8), {}, "input_ids is of torch.uint8"),
        (IDS[0], {}, r"input_ids has shape \(2,\): .* one prompt is input_ids\[None\]"),
        (IDS[None], {}, r"input_ids has shape \(1, 2, 2\): it must be \(prompts, tokens\)"),
        (IDS[:0], {}, r"input_ids has shape \(0, 2\): .* at least one of each"),
        (IDS[:, :0], {}, r"input_ids has shape \(2, 0\): .* at least one of each"),
        (torch.tensor([[5], [-1]]), {}, r"input_ids\[1\] holds token -1: ids lie in \[0, 202\]"),
        (torch.tensor([[5], [VOCABULARY]]), {}, r"input_ids\[1\] holds token 203: ids lie in \[0, 202\]"),
        (IDS, {"attention_mask": torch.ones(2, 3)}, r"attention_mask has shape \(2, 3\)"),
        (IDS, {"attention_mask": torch.tensor([[0, 1], [0, 0]])}, r"attention_mask\[1\] is 0 everywhere"),
        (IDS, {"eos_token_id": VOCABULARY}, r"eos_token_id holds token 203: ids lie in \[0, 202\]"),
        (IDS, {"eos_token_id": [0, -1]}, "eos_token_id holds token -1"),
        (IDS, {"eos_token_id": "</s>"}, "eos_token_id holds '<': token ids are whole numbers"),
        (IDS, {"eos_token_id": 2.0}, "eos_token_id holds 2.0: token ids are whole numbers"),
        (IDS, {"pad_token_id": -100}, "pad_token_id holds token -100"),
        (IDS, {"streamer": object()}, "streamer takes one prompt: input_ids has 2"),
    ],
)
def test_tensors_and_flags_that_mean_nothing_are_refused(
    folder: Path, tmp_path: Path, ids: torch.Tensor, options, message: str
) -> None:
    with engine(folder, tmp_path) as llm, pytest.raises(InputError, match=message):
        llm.generate(ids, **options)


def test_masked_ids_need_not_be_the_models(folder: Path, tmp_path: Path) -> None:
    ids, mask = torch.tensor([[-100, 7], [5, 6]], dtype=torch.int32), torch.tensor([[0, 1], [1, 1]])
    with engine(folder, tmp_path) as llm:
        found = llm.generate(ids, attention_mask=mask, max_new_tokens=3)
        expected = theirs([7], 3)
        assert found[0, 2:].tolist()[: len(expected)] == expected
    assert found.dtype == torch.int32


def test_a_block_holds_prompts_of_different_lengths_of_generation(folder: Path, tmp_path: Path) -> None:
    prompts = prompts_of([3, 8, 5])
    params = [SamplingParams(max_new_tokens=count, ignore_eos=True) for count in (1, 9, 4)]
    with engine(folder, tmp_path) as llm:
        found = llm.generate(prompts, params)
    assert [len(one.token_ids) for one in found] == [1, 9, 4]


def test_a_seed_decides_every_draw_whatever_the_blocks(folder: Path, tmp_path: Path) -> None:
    prompts = prompts_of([3, 8, 5, 4])
    params = SamplingParams(max_new_tokens=6, temperature=1.3, top_k=50, seed=11)
    with engine(folder, tmp_path) as llm:
        together = llm.generate(prompts, params)
        alone = [llm.generate([prompt], params, keys=[key])[0] for key, prompt in enumerate(prompts)]
        other = llm.generate(prompts, SamplingParams(max_new_tokens=6, temperature=1.3, top_k=50, seed=12))
    assert [one.token_ids for one in alone] == [one.token_ids for one in together]
    assert [one.token_ids for one in other] != [one.token_ids for one in together]


def test_what_is_placed_is_what_was_planned(folder: Path, tmp_path: Path) -> None:
    """Bytes by tier of a model large enough that rows are small beside it; in 16 bits, as the plan counts."""
    workload = Workload(prompt_len=100, gen_len=28, num_prompts=16)
    policy = POLICY.replace(
        gpu_batch_size=8,
        cache=Split(gpu=0.3, cpu=0.2, disk=0.5),
        activations=Split(gpu=0.5, cpu=0.25, disk=0.25),
    )
    llm = LLM(
        "dummy:opt-125m",
        policy=policy,
        hardware=hardware(),
        dtype="bfloat16",
        device="cpu",
        gpu_memory="2GiB",
        cpu_memory="1GiB",
        offload_dir=tmp_path,
    )
    with llm:
        prompts = [[5] * 100] * 16
        llm.generate(prompts, SamplingParams(max_new_tokens=28, ignore_eos=True))
        found = llm.measurement
    assert found is not None
    stored = llm.spec.total_params * 2
    cached = 16 * 128 * llm.spec.kv_bytes_per_token(compressed=False) * llm.spec.num_layers
    hidden = 16 * 100 * llm.spec.hidden_size * 2
    for tier, weights, attended, activations in (
        ("gpu", 0.4, 0.3, 0.5),
        ("cpu", 0.2, 0.2, 0.25),
        ("disk", 0.4, 0.5, 0.25),
    ):
        placed = found.resident_bytes[tier]
        assert placed["weights"] == pytest.approx(weights * stored, rel=0.02)
        assert placed["cache"] == pytest.approx(attended * cached, rel=0.02)
        assert placed["activations"] == pytest.approx(activations * hidden, rel=0.02)
    assert found.measured.bytes_moved["disk_read"] == pytest.approx(found.predicted.bytes_moved["disk_read"], rel=0.05)
    again = Measurement.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.measured == found.measured
    assert again.policy == found.policy
    assert workload.total_len == 128


@pytest.mark.parametrize(
    ("options", "prompts", "message"),
    [
        ({}, [[]], r"prompts\[0\] is empty"),
        ({}, [[5, VOCABULARY]], r"prompts\[0\] holds token 203: ids lie in \[0, 202\]"),
        ({}, [[5], [5] * 60], r"prompts\[1\] has 60 tokens .* is 8, together 68: model .* has 64 positions"),
        ({}, ["text"], r"prompts\[0\] is text, but model .* has no tokenizer"),
        ({"dtype": "int8"}, [[5]], "dtype is 'int8'"),
        ({"gpu_memory": "2 apples"}, [[5]], "2 apples"),
        ({"gpu_memory": "9000GiB"}, [[5]], "gpu_memory plus cpu_memory is .*: only .* are available"),
        ({"device": "tpu"}, [[5]], "device is 'tpu'"),
        ({"fixed": {"gpu_batch_size": 2}}, [[5]], "gpu_batch_size cannot take effect: the policy is given"),
        ({"policy": 3}, [[5]], "policy is of type int: a Policy, its file, the content of one or 'auto' is expected"),
        ({"policy": {"gpu_batch_size": 3}}, [[5]], r"policy: field 'weights' is missing \(and 3 more\)"),
    ],
)
def test_wrong_input_is_one_sentence(folder: Path, tmp_path: Path, options, prompts, message: str) -> None:
    with pytest.raises(InputError, match=message), engine(folder, tmp_path, **options) as llm:
        llm.generate(prompts, SamplingParams(max_new_tokens=8))


@pytest.mark.parametrize("form", ["plain", "file", "result"])
def test_a_policy_may_be_the_content_of_a_file(folder: Path, tmp_path: Path, form: str) -> None:
    POLICY.save(tmp_path / "policy.json")
    forms = {
        "plain": POLICY.to_dict(),
        "file": json.loads((tmp_path / "policy.json").read_text()),
        "result": {"schema": "tierwise.search/1", "policy": POLICY.to_dict()},
    }
    with engine(folder, tmp_path, policy=forms[form]) as llm:
        assert llm.policy == POLICY


def test_input_ids_may_be_lists(folder: Path, tmp_path: Path) -> None:
    prompts, params = prompts_of([4, 6]), SamplingParams(max_new_tokens=3)
    with engine(folder, tmp_path) as llm:
        assert llm.generate(input_ids=prompts, params=params) == llm.generate(prompts, params)
        with pytest.raises(InputError, match="generate takes prompts or input_ids, not both"):
            llm.generate(prompts, input_ids=prompts)
        with pytest.raises(InputError, match="params cannot take effect with a tensor"):
            llm.generate(torch.tensor([[5, 6]]), params)


def test_the_origin_of_measurements_is_found_out_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(environment, "_run", lambda *command: asked.append(command) or "")
    with engine(folder, tmp_path) as llm:
        for _ in range(3):
            llm.generate([[5]], SamplingParams(max_new_tokens=1))
    assert [command[3:] for command in asked] == [("rev-parse", "--short=12", "HEAD")]


def test_a_policy_that_cannot_fit_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    llm = LLM(
        "dummy:opt-30b",
        policy=POLICY.replace(weights=ON_GPU),
        hardware=hardware(),
        dtype="bfloat16",
        device="cpu",
        gpu_memory=1 * GiB,
        offload_dir=tmp_path,
    )
    with pytest.raises(InfeasibleError, match="GPU memory is exceeded by"):
        llm.prepare(Workload(prompt_len=16, gen_len=4))
    assert list(tmp_path.iterdir()) == []


def test_auto_chooses_a_policy_for_the_first_prompts(folder: Path, tmp_path: Path) -> None:
    with engine(folder, tmp_path, policy="auto") as llm:
        with pytest.raises(InputError, match="policy 'auto' is chosen when"):
            _ = llm.policy
        found = llm.generate(prompts_of([4, 6]), SamplingParams(max_new_tokens=3, ignore_eos=True))
        assert not llm.policy.compress_weights
        assert not llm.policy.compress_cache
    assert [len(one.token_ids) for one in found] == [3, 3]


def test_no_thread_outlives_close_however_the_run_ended(folder: Path, tmp_path: Path) -> None:
    """From conversion to the search to a run that is broken off; a second close does nothing."""
    ids = torch.tensor([[5, 6, 7]])
    before = threading.enumerate()

    def broken_off(_index: int, _token: int) -> None:
        raise KeyboardInterrupt

    for policy in (POLICY, "auto"):
        llm = engine(folder, tmp_path, policy=policy, gpu_memory="48MiB", cpu_memory="8MiB")
        assert llm.generate(ids, max_new_tokens=3).shape == (1, 6)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(ids.tolist(), SamplingParams(max_new_tokens=3), on_token=broken_off)
        if policy == POLICY:  # what it reads from disk, threads read
            assert {thread.name.split("_")[0] for thread in threading.enumerate()} >= {"tierwise-disk"}
        llm.close()
        llm.close()
        assert threading.enumerate() == before


def test_threads_and_files_are_gone_when_it_is_closed(folder: Path, tmp_path: Path) -> None:
    before = threading.active_count()
    trace = tmp_path / "trace.json"
    with engine(folder, tmp_path, trace=trace) as llm:
        llm.generate(prompts_of([4, 6]), SamplingParams(max_new_tokens=3))
    assert threading.active_count() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tierwise")] == []
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"gpu_compute", "disk_read", "disk_write", "cpu_to_gpu", "gpu_to_cpu"} <= {e.get("cat") for e in events}
