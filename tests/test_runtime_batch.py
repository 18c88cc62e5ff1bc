"""Batch jobs: the OpenAI format, one record for every line, and nothing lost or doubled however a job ends."""

import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines import POLICY, FakeEngine, byte_level

from costmodel.errors import InputError
from runtime import job_log
from runtime.disk import DiskError
from runtime.job_log import manifest_path, open_log
from runtime.job_source import Source
from runtime.jobs import Progress, run_batch
from runtime.sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = SamplingParams(max_new_tokens=6, temperature=1.0, seed=3)


def completion(custom_id: str, prompt: Any = "the quick", **body: Any) -> dict[str, Any]:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "m", "prompt": prompt, **body},
    }


def chat(custom_id: str, *turns: str, **body: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": messages, **body},
    }


def written(path: Path, lines: list[Any]) -> Path:
    """Write requests; bytes and text as they are."""
    parts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(part + b"\n" for part in parts))
    return path


def several(count: int) -> list[Any]:
    """Requests of all kinds, one in seven of them bad."""
    made: list[Any] = []
    for number in range(count):
        name, words = f"request {number}", "the quick brown fox " * (1 + number % 3)
        made.append(
            [
                completion(name, words),
                completion(name, words, temperature=0, max_tokens=3 + number % 9),
                chat(name, words, max_completion_tokens=4),
                completion(name, words, seed=number, temperature=0.7, top_p=0.9),
                completion(name, [5, 6, 7 + number], stop=["e"]),
                chat(name, words, "yes", "no", top_k=5),
                completion(name, words, n=2),
            ][number % 7]
        )
    return made


def answers(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    assert content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


def by_id(path: Path) -> dict[str, Any]:
    """The answers without their times, none of them twice."""
    found = {}
    for record in answers(path):
        assert record["id"] not in found
        if record["response"] is not None:
            del record["response"]["body"]["created"]
        found[record["id"]] = record
    return found


def run(
    source: Path,
    output: Path,
    *,
    engine: FakeEngine | None = None,
    resume: bool = False,
    defaults: SamplingParams = DEFAULTS,
    report: Callable[[Progress], None] | None = None,
) -> Progress:
    """One run of a job as a library call."""
    engine = FakeEngine(tokenizer=byte_level(chat=True)) if engine is None else engine
    with open_log(output, resume=resume) as log:
        found = Source.of(source, default_new_tokens=defaults.max_new_tokens)
        log.begin({"engine": engine.describe(), "input": found.identity(), "seed": defaults.seed})
        return run_batch(engine, found, log, defaults=defaults, report=report)


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """An input and the answers of a run that nothing interrupted."""
    source = written(tmp_path / "in.jsonl", several(30))
    run(source, tmp_path / "whole.jsonl")
    return source, by_id(tmp_path / "whole.jsonl")


# ------------------------------------------------------------------ the format


def answer(tmp_path: Path, request: Any, engine: FakeEngine | None = None) -> dict[str, Any]:
    """The record of a single request."""
    output = tmp_path / f"{time.monotonic_ns()}.jsonl"
    run(written(tmp_path / "one.jsonl", [request]), output, engine=engine)
    (record,) = answers(output)
    return record


def test_completion_record_is_that_of_the_openai_format(tmp_path: Path) -> None:
    engine = FakeEngine(tokenizer=byte_level())
    record = answer(tmp_path, completion("q", "the fox", temperature=0, max_tokens=5), engine)
    prompt = byte_level()("the fox")["input_ids"]
    expected = engine.generate([prompt], SamplingParams(max_new_tokens=5))[0]
    body = record["response"]["body"]
    assert set(record) == {"id", "custom_id", "response", "error"}
    assert (record["custom_id"], record["error"]) == ("q", None)
    assert set(record["response"]) == {"status_code", "request_id", "body"}
    assert record["response"]["status_code"] == 200
    assert body["object"] == "text_completion"
    assert body["model"] == "fake"
    assert abs(body["created"] - time.time()) < 60
    choice = {"index": 0, "text": expected.text, "finish_reason": expected.finish_reason, "logprobs": None}
    assert body["choices"] == [choice]
    new = len(expected.token_ids)
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": new,
        "total_tokens": len(prompt) + new,
    }


def test_chat_goes_through_the_chat_template(tmp_path: Path) -> None:
    engine = FakeEngine(tokenizer=byte_level(chat=True))
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "fox"}]
    request = chat("q", "the fox", "jumps", "over")
    request["body"]["messages"][0]["content"] = parts
    record = answer(tmp_path, request, engine)
    prompt = byte_level()("<user>the fox\n<assistant>jumps\n<user>over\n<assistant>")["input_ids"]
    assert engine.calls == [[tuple(prompt)]]
    (choice,) = record["response"]["body"]["choices"]
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert record["response"]["body"]["object"] == "chat.completion"


def test_fields_of_the_body_reach_the_engine(tmp_path: Path) -> None:
    engine = FakeEngine(tokenizer=byte_level())
    fields = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "seed": 9, "stop": "x", "max_tokens": 4}
    answer(tmp_path, completion("q", "a", ignore_eos=True, user="me", n=1, stream=False, **fields), engine)
    assert engine.params == [
        SamplingParams(max_new_tokens=4, temperature=0.5, top_p=0.25, top_k=7, seed=9, stop=("x",), ignore_eos=True)
    ]


def test_defaults_apply_and_shrink_to_the_room_there_is(tmp_path: Path) -> None:
    engine = FakeEngine(tokenizer=byte_level(), max_positions=12)
    lines = [completion("short", [5] * 3), completion("long", [5] * 9, max_tokens=None)]
    run(written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", engine=engine)
    assert engine.params == [DEFAULTS, replace(DEFAULTS, max_new_tokens=3)]


def test_a_model_without_tokenizer_takes_and_gives_token_numbers(tmp_path: Path) -> None:
    engine = FakeEngine(tokenizer=None)
    record = answer(tmp_path, completion("q", [[5, 6, 7]], temperature=0), engine)
    (choice,) = record["response"]["body"]["choices"]
    assert choice["text"] is None
    assert choice["token_ids"] == list(engine.generate([[5, 6, 7]], SamplingParams(max_new_tokens=6))[0].token_ids)


BAD: list[tuple[Any, str, str]] = [
    (b"{not json", "invalid_json", "not valid JSON"),
    (b"\xff\xfe", "invalid_json", "not valid JSON"),
    (b"[" * 100_000, "invalid_json", "not valid JSON"),
    (b"[1]", "invalid_json", "a JSON object is expected"),
    ({"url": "/v1/completions"}, "missing_custom_id", "custom_id is missing"),
    ({**completion("q"), "custom_id": 7}, "missing_custom_id", "custom_id"),
    ({**completion("q"), "method": "GET"}, "invalid_method", "method is 'GET'"),
    ({**completion("q"), "url": "/v1/embeddings"}, "invalid_url", "/v1/embeddings"),
    ({**completion("q"), "url": ["/v1"]}, "invalid_url", "url is"),
    ({**completion("q"), "body": "text"}, "invalid_body", "body is 'text'"),
    (completion("q", None), "invalid_prompt", "body.prompt"),
    (completion("q", ["a", "b"]), "invalid_prompt", "one text"),
    (completion("q", []), "invalid_prompt", "no tokens"),
    (completion("q", ""), "invalid_prompt", "no tokens"),
    (completion("q", [5, True]), "invalid_prompt", "token numbers"),
    (completion("q", [5, 320]), "invalid_prompt", "holds 320: a token number from 0 to 319"),
    (completion("q", "\ud800"), "invalid_prompt", "the prompt is not UTF-8 text"),
    (completion("q", [5] * 128), "context_length_exceeded", "128 tokens and max_tokens is 1, together 129"),
    (completion("q", [5] * 28, max_tokens=101), "context_length_exceeded", "together 129: the model has 128 positions"),
    (completion("q", n=2), "unsupported_field", "body.n is 2"),
    (completion("q", logprobs=1), "unsupported_field", "body.logprobs is 1"),
    (completion("q", logprobs=0), "unsupported_field", "body.logprobs is 0"),
    (completion("q", stream=True), "unsupported_field", "body.stream is True"),
    (chat("q", "a", tools=[{}]), "unsupported_field", "body.tools"),
    (completion("q", messages=[]), "unsupported_field", "body.messages"),
    (completion("q", temprature=1), "unsupported_field", "body.temprature"),
    (completion("q", temperature=-1), "invalid_value", "body.temperature is -1"),
    (completion("q", temperature="hot"), "invalid_value", "body.temperature is 'hot'"),
    (completion("q", max_tokens=0), "invalid_value", "body.max_tokens is 0: it must be at least 1"),
    (completion("q", stop=["a", 1]), "invalid_value", "body.stop"),
    (completion("q", stop=7), "invalid_value", "body.stop is 7"),
    (chat("q"), "invalid_messages", "not empty"),
    ({**chat("q"), "body": {"messages": ["hello"]}}, "invalid_messages", "messages[0] is 'hello'"),
    ({**chat("q"), "body": {"messages": [{"role": "cat", "content": "a"}]}}, "invalid_messages", "role is 'cat'"),
    (
        {**chat("q"), "body": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}},
        "invalid_messages",
        "messages[0].content must be text",
    ),
    (
        {**chat("q"), "body": {"messages": [{"role": r, "content": "a"} for r in ("user", "system")]}},
        "invalid_messages",
        "system comes first",
    ),
]


def test_bad_lines_are_error_records_and_the_rest_is_answered(tmp_path: Path) -> None:
    lines = [completion("first"), *(line for line, _, _ in BAD), completion("last")]
    named = [
        {**line, "custom_id": f"{n}{line['custom_id']}"} if _has_id(line) else line for n, line in enumerate(lines)
    ]
    done = run(written(tmp_path / "in.jsonl", named), tmp_path / "out.jsonl")
    assert (done.requests, done.done, done.answered, done.errors) == (len(lines), len(lines), 2, len(BAD))
    found = {int(name.split("_")[2]): record for name, record in by_id(tmp_path / "out.jsonl").items()}
    assert found[0]["error"] is None
    assert found[len(lines) - 1]["error"] is None
    for number, (_, code, told) in enumerate(BAD, start=1):
        assert found[number]["response"] is None
        assert found[number]["error"]["code"] == code, found[number]
        assert told in found[number]["error"]["message"]
        assert found[number]["custom_id"] == (named[number]["custom_id"] if _has_id(lines[number]) else None)


def _has_id(line: Any) -> bool:
    return isinstance(line, dict) and isinstance(line.get("custom_id"), str)


def test_of_equal_custom_ids_the_first_is_answered(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [completion("q"), b"", completion("q"), completion("q", "other")])
    run(source, tmp_path / "out.jsonl")
    found = {int(record["id"].split("_")[2]): record for record in answers(tmp_path / "out.jsonl")}
    assert [record["custom_id"] for record in found.values()] == ["q"] * 3
    assert found.pop(0)["error"] is None
    for number, record in found.items():
        assert record["error"] == {
            "code": "duplicate_custom_id",
            "message": f"custom_id 'q' of line {number + 1} is that of line 1 already: give every request its own",
        }


def test_of_equal_custom_ids_a_resumed_job_answers_the_first_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it was stopped: an error record of an id does not answer the line that has it first."""
    monkeypatch.setattr("runtime.jobs._LEAST_AT_ONCE", 1)
    lines = [completion(f"q{number % 3}", [5, number], seed=number % 2) for number in range(9)]
    source = written(tmp_path / "in.jsonl", [*lines, completion("q0", [5, 0], seed=0)])
    run(source, tmp_path / "whole.jsonl")
    expected = by_id(tmp_path / "whole.jsonl")
    assert sorted(record["custom_id"] for record in expected.values()) == ["q0"] * 4 + ["q1"] * 3 + ["q2"] * 3
    kept = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    firsts = [line for line in kept if json.loads(line)["error"] is None]
    assert kept.index(firsts[0]) > 0  # the error records of an id come before its answer
    output = tmp_path / "out.jsonl"
    for count in range(1, len(kept)):
        output.write_bytes(b"".join(kept[:count]))
        manifest_path(output).write_bytes(manifest_path(tmp_path / "whole.jsonl").read_bytes())
        done = run(source, output, resume=True)
        assert by_id(output) == expected
        assert (done.before, done.done, done.answered, done.errors) == (count, 10, 3, 7)


@pytest.mark.parametrize(
    ("request_line", "engine", "code", "told"),
    [
        (chat("q", "hello"), FakeEngine(tokenizer=byte_level()), "no_chat_template", "base model"),
        (chat("q", "hello"), FakeEngine(), "no_tokenizer", "token numbers"),
        (completion("q", "hello"), FakeEngine(), "no_tokenizer", "token numbers"),
        (completion("q", [5], stop="x"), FakeEngine(), "no_tokenizer", "body.stop"),
    ],
)
def test_what_the_model_lacks_is_told(
    tmp_path: Path, request_line: Any, engine: FakeEngine, code: str, told: str
) -> None:
    error = answer(tmp_path, request_line, engine)["error"]
    assert error["code"] == code
    assert told in error["message"]


def test_blank_lines_a_byte_order_mark_and_a_missing_last_newline_do_not_matter(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    parts = [json.dumps(completion(name)).encode() for name in ("a", "b")]
    source.write_bytes(b"\xef\xbb\xbf" + parts[0] + b"\r\n\n   \n" + parts[1])
    run(source, tmp_path / "out.jsonl")
    assert sorted(record["custom_id"] for record in answers(tmp_path / "out.jsonl")) == ["a", "b"]


def test_odd_custom_ids_come_back_as_they_were(tmp_path: Path) -> None:
    names = ["é 日本", "\u2028", "a\nb", "\ud800", '"quoted"']
    run(written(tmp_path / "in.jsonl", [completion(name) for name in names]), tmp_path / "out.jsonl")
    assert {record["custom_id"] for record in answers(tmp_path / "out.jsonl")} == set(names)


# ------------------------------------------------------------------ chunks


def test_chunks_are_whole_blocks_and_results_come_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.jobs._LEAST_AT_ONCE", 1)
    engine = FakeEngine(tokenizer=byte_level())
    sizes: list[int] = []
    source = written(tmp_path / "in.jsonl", [completion(str(number), [5]) for number in range(70)])
    run(source, tmp_path / "out.jsonl", engine=engine, report=lambda now: sizes.append(now.done))
    assert [len(call) for call in engine.calls] == [32, 32, 6]
    assert sorted(set(sizes)) == [*range(0, 69, 4), 70]


def test_long_prompts_make_chunks_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.jobs._TOKENS_AT_ONCE", 100)
    engine = FakeEngine(tokenizer=byte_level())
    source = written(tmp_path / "in.jsonl", [completion(str(number), [5] * 20) for number in range(10)])
    run(source, tmp_path / "out.jsonl", engine=engine)
    assert [len(call) for call in engine.calls] == [8, 2]


def test_progress_counts_up_and_ends_at_one(tmp_path: Path) -> None:
    seen: list[Progress] = []
    lines = [completion(str(number), [5, number]) for number in range(9)]
    done = run(written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", report=seen.append)
    shares = [now.share for now in seen]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.5
    assert shares[-1] == done.share == 1
    assert done.new_tokens == sum(
        r["response"]["body"]["usage"]["completion_tokens"] for r in answers(tmp_path / "out.jsonl")
    )
    assert done.prompt_tokens == 18
    assert all(now.left_s is None or now.left_s >= 0 for now in seen)


def test_an_engine_that_reports_no_blocks_loses_nothing(tmp_path: Path) -> None:
    class Silent(FakeEngine):
        def generate(self, prompts: Any, params: Any = None, *, on_block: Any = None, **options: Any) -> Any:
            return super().generate(prompts, params, **options)

    source = written(tmp_path / "in.jsonl", several(30))
    run(source, tmp_path / "silent.jsonl", engine=Silent(tokenizer=byte_level(chat=True)))
    run(source, tmp_path / "out.jsonl")
    assert by_id(tmp_path / "silent.jsonl") == by_id(tmp_path / "out.jsonl")


# ------------------------------------------------------------------ resumption


class StopHereError(Exception):
    pass


def stopped_after(count: int) -> Callable[[Progress], None]:
    """A report that ends the run once so many requests are done."""

    def report(now: Progress) -> None:
        if now.done >= count:
            raise StopHereError

    return report


def test_a_resumed_job_gives_the_answers_of_an_uninterrupted_one(
    tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    source, expected = whole
    output = tmp_path / "out.jsonl"
    for count in (1, 6, 11, 23):
        with pytest.raises(StopHereError):
            run(source, output, resume=True, report=stopped_after(count))
    done = run(source, output, resume=True)
    assert by_id(output) == expected
    assert done.done == done.requests == 30
    assert done.before > 20


def test_a_finished_job_is_resumed_without_work(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    engine = FakeEngine(tokenizer=byte_level(chat=True))
    before = (tmp_path / "whole.jsonl").read_bytes()
    done = run(whole[0], tmp_path / "whole.jsonl", engine=engine, resume=True)
    assert engine.calls == []
    assert (tmp_path / "whole.jsonl").read_bytes() == before
    assert (done.answered, done.before, done.errors) == (26, 30, 4)


def test_a_record_torn_at_any_byte_is_made_again(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [completion(name, "é – fox") for name in ("a", "日本")])
    output = tmp_path / "out.jsonl"
    run(source, output)
    content, expected = output.read_bytes(), by_id(output)
    last = content.rindex(b"\n", 0, -1) + 1
    for length in range(last, len(content)):
        output.write_bytes(content[:length])
        done = run(source, output, resume=True)
        assert by_id(output) == expected
        assert done.before == 1


def test_an_end_of_zeros_is_dropped(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    """What a file system may leave of a block that was not flushed when the power went."""
    output = tmp_path / "whole.jsonl"
    content = output.read_bytes()
    output.write_bytes(content[:-700] + b"\0" * 300 + b"\n" + b"\0" * 100)
    run(whole[0], output, resume=True)
    assert by_id(output) == whole[1]


def test_a_foreign_line_amid_results_is_refused(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    output = tmp_path / "whole.jsonl"
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join([*lines[:3], b'{"mine": 1}\n', *lines[3:]]))
    with pytest.raises(InputError, match="line 4 is no record of this job"):
        run(whole[0], output, resume=True)


def test_a_line_that_is_there_twice_is_refused(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    output = tmp_path / "whole.jsonl"
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join([*lines, lines[2]]))
    with pytest.raises(InputError, match="line 31 answers a request that an earlier one did"):
        run(whole[0], output, resume=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"engine": FakeEngine(name="other")}, 'engine.model was "fake" and is "other" now'),
        (
            {"engine": FakeEngine(policy=POLICY.replace(gpu_batch_size=4))},
            "engine.policy.gpu_batch_size was 2 and is 4",
        ),
        ({"defaults": replace(DEFAULTS, seed=4)}, "seed was 3 and is 4 now"),
    ],
)
def test_another_model_policy_or_seed_is_refused(
    tmp_path: Path, whole: tuple[Path, dict[str, Any]], change: dict[str, Any], told: str
) -> None:
    before = (tmp_path / "whole.jsonl").read_bytes()
    with pytest.raises(InputError, match=told):
        run(whole[0], tmp_path / "whole.jsonl", resume=True, **change)
    assert (tmp_path / "whole.jsonl").read_bytes() == before


def test_another_input_is_refused(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    whole[0].write_bytes(whole[0].read_bytes().replace(b"request 3", b"request x"))
    with pytest.raises(InputError, match=r"cannot be resumed: input\.sha256 was"):
        run(whole[0], tmp_path / "whole.jsonl", resume=True)


def test_a_record_of_another_content_is_refused(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    """Even where the manifest says nothing against it."""
    whole[0].write_bytes(whole[0].read_bytes().replace(b"request 3", b"request x"))
    manifest = manifest_path(tmp_path / "whole.jsonl")
    changed = {**json.loads(manifest.read_text()), "input": Source.of(whole[0], default_new_tokens=6).identity()}
    manifest.write_text(json.dumps(changed))
    with pytest.raises(InputError, match="line 4 of the input is not the one that was answered"):
        run(whole[0], tmp_path / "whole.jsonl", resume=True)


def test_results_without_manifest_are_refused(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    manifest_path(tmp_path / "whole.jsonl").unlink()
    with pytest.raises(InputError, match=r"manifest\.json is missing"):
        run(whole[0], tmp_path / "whole.jsonl", resume=True)


def test_results_are_not_overwritten(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    before = (tmp_path / "whole.jsonl").read_bytes()
    with pytest.raises(InputError, match="has results already: go on with them by --resume"):
        run(whole[0], tmp_path / "whole.jsonl")
    assert (tmp_path / "whole.jsonl").read_bytes() == before


def test_two_processes_on_one_output_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with output.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is being written by another process"), open_log(output, resume=True):
            pass
    assert output.exists()


def test_a_job_that_answers_nothing_leaves_nothing(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [completion("a")])
    with pytest.raises(StopHereError):
        run(source, tmp_path / "out.jsonl", report=stopped_after(0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_results_go_to_plain_files_only(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="plain file"), open_log(Path("/dev/null"), resume=False):
        pass
    assert Path("/dev/null").exists()


@pytest.mark.parametrize("written_bytes", [0, 10, 1000])
def test_a_full_disk_is_told_and_the_job_goes_on_after_it(
    tmp_path: Path, whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, written_bytes: int
) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(StopHereError):
        run(whole[0], output, report=stopped_after(5))
    before = output.read_bytes()
    write, room = os.write, [written_bytes]

    def scarce(fd: int, content: Any) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = write(fd, content[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr(job_log.os, "write", scarce)
    with pytest.raises(DiskError, match=r"No space left on device; the \d+ results before are safe") as caught:
        run(whole[0], output, resume=True)
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)
    assert output.read_bytes().startswith(before)
    monkeypatch.undo()
    run(whole[0], output, resume=True)
    assert by_id(output) == whole[1]


CHILD = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from engines import FakeEngine, byte_level
from runtime import batch
load = lambda args, **how: FakeEngine(tokenizer=byte_level(chat=True), step_s=0.004)
sys.exit(batch.main(sys.argv[1:], load=load))
"""


def child(source: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    """The command with a slow engine, in a process of its own."""
    code = CHILD.format(root=str(ROOT), tests=str(ROOT / "tests"))
    argv = ["--model", "fake", "-i", str(source), "-o", str(output), "--seed", "3", "--max-new-tokens", "6", *flags]
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.001)


def test_a_latency_limit_has_no_effect_where_nothing_is_searched(
    tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    POLICY.save(tmp_path / "policy.json")
    process = child(
        whole[0], tmp_path / "out.jsonl", "--policy", str(tmp_path / "policy.json"), "--max-latency", "1min"
    )
    _, err = process.communicate()
    assert process.returncode == 2
    assert "nothing is searched, so --max-latency cannot take effect" in err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_job_killed_in_the_command_resumes_to_exactly_one_line_each(
    tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    """Each process is killed a random while after it has begun to write."""
    source, expected = whole
    output = tmp_path / "out.jsonl"
    chance = random.Random(7)
    for count in range(2):
        before = output.stat().st_size if output.exists() else 0
        process = child(source, output, "--resume")
        wait_for(lambda size=before: output.exists() and output.stat().st_size > size, process)
        time.sleep(chance.random() * 0.04)
        process.kill()
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), count
    process = child(source, output, "--resume")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert by_id(output) == expected
    assert "26 answered, 4 errors" in out


FORKING = """
import os, random, signal, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
import test_runtime_batch as tests

def started(output):
    pid = os.fork()
    if pid == 0:
        try:
            tests.run(source, output, resume=True)
        finally:
            os._exit(0)
    return pid

def killed(output, after_s):
    pid = started(output)
    time.sleep(after_s)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])

source, folder, kills, chance = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), random.Random(1)
tests.byte_level(chat=True)
began = time.perf_counter()
os.waitpid(started(folder / "whole.jsonl"), 0)
whole_s = time.perf_counter() - began
for number in range(10 * kills):
    done = sum(killed(folder / f"out{{number}}.jsonl", chance.random() * 0.7 * whole_s) for _ in range(5))
    whole_s *= 1.0 if done else 0.5  # this machine has become faster: jobs end before they are killed
    kills -= done
    if kills <= 0:
        break
print(max(kills, 0))
"""


def test_a_job_killed_anywhere_resumes_to_exactly_one_line_each(
    tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    """Many kills at any point of a run: of copies of a process that has everything loaded."""
    source, expected = whole
    code = FORKING.format(root=str(ROOT), tests=str(ROOT / "tests"))
    command = [sys.executable, "-c", code, str(source), str(tmp_path), "25"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]  # none of the kills is left to do
    outputs = [tmp_path / "whole.jsonl", *sorted(tmp_path.glob("out*.jsonl"))]
    assert len(outputs) > 5
    for output in outputs:
        run(source, output, resume=True)
        assert by_id(output) == expected
