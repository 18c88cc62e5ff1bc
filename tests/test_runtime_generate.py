"""The generate command, and the flags that it shares: what is refused, what is printed, what the JSON says."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import POLICY, FakeEngine, byte_level

from costmodel.errors import InputError
from runtime import batch, chat, engine_flags, generate, prompts, run_report
from runtime.sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run a command in an empty folder, with a fake engine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def command(*argv: str, engine: FakeEngine | None = None, main: Any = generate.main) -> Done:
        @contextlib.contextmanager
        def load(args: Any, **options: Any) -> Iterator[FakeEngine]:
            yield FakeEngine(tokenizer=byte_level()) if engine is None else engine

        code = main(["--model", "fake", *argv], load=load)
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return command


def in_process(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


# ------------------------------------------------------------------ what is refused


BAD = [
    ("", ["--prompt", "--prompts-file", "--prompt-ids"]),
    ("--prompt a --prompt-ids 1", ["--prompt-ids", "not allowed together with", "--prompt"]),
    ("--prompt-ids 1,x", ["--prompt-ids is '1,x'", "1,2,3"]),
    ("--prompt-ids -1", ["--prompt-ids"]),
    ("--prompt-ids 5,320", ["prompt 1 holds token 320", "319"]),
    ("--prompt a --prompt b\udcff", ["prompt 2 is not UTF-8 text"]),
    ("--prompts-file none.txt", ["none.txt: cannot be read: No such file"]),
    ("--prompts-file empty.txt", ["empty.txt holds no prompts"]),
    ("--prompts-file bad.jsonl", ["bad.jsonl, line 2: not valid JSON"]),
    ("--prompts-file odd.jsonl", ["odd.jsonl, line 1: a text or"]),
    ("--prompt a --max-new-tokens 0", ["--max-new-tokens", "is 0", "at least 1"]),
    ("--prompt a --max-new-tokens 128", ["--max-new-tokens is 128", "together 129", "128 positions"]),
    ("--prompt a --temperature hot", ["--temperature", "hot", "a number is expected"]),
    ("--prompt a --temperature -1", ["--temperature is -1", "at least 0"]),
    ("--prompt a --temperature nan", ["--temperature is nan"]),
    ("--prompt a --temperature 1 --top-p 1.5", ["--top-p is 1.5", "[0, 1]"]),
    ("--prompt a --temperature 1 --top-k -1", ["--top-k", "is -1", "at least 0"]),
    ("--prompt a --top-k 5", ["--top-k has no effect at temperature 0"]),
    ("--prompt a --top-p 0.5", ["--top-p has no effect at temperature 0"]),
    ("--prompt a --seed 5", ["--seed has no effect at temperature 0"]),
    ("--prompt a --temperature 1 --seed 9223372036854775808", ["--seed is", "at most"]),
    ("--prompt a --stop=", ["--stop holds an empty string"]),
    ("--prompt a --gpu-memory 4", ["--gpu-memory", "'4'", "16GiB"]),
    ("--prompt a --policy none.json", ["none.json: cannot be read"]),
    ("--prompt a --policy bad.jsonl", ["bad.jsonl: not valid JSON"]),
    ("--prompt a --hardware none.json", ["--hardware is none.json", "no such file"]),
    ("--prompt a --offload-dir none", ["--offload-dir is none", "no such directory"]),
    ("--prompt a --device tpu", ["--device", "tpu"]),
    ("--prompt a --dtype int3", ["--dtype", "int3"]),
    ("--prompt a --json policy.json --policy policy.json", ["--json is policy.json", "read by --policy"]),
    ("--prompts-file in.txt --json in.txt", ["--json is in.txt", "read by --prompts-file"]),
    ("--prompt a --json out.json --trace out.json", ["written by --json"]),
    ("--prompt a --frobnicate", ["unknown flag --frobnicate"]),
]


@pytest.mark.parametrize(("flags", "told"), BAD, ids=[flags or "nothing" for flags, _ in BAD])
def test_bad_input_is_told_in_one_sentence(run: Command, tmp_path: Path, flags: str, told: list[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "in.txt").write_text("a\n")
    (tmp_path / "bad.jsonl").write_text('"a"\n{"prompt": \n')
    (tmp_path / "odd.jsonl").write_text("[1, 2.5]\n")
    POLICY.save(tmp_path / "policy.json")
    done = run(*flags.split())
    assert done.code == 2
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert all(part in done.err for part in told), done.err


def test_an_empty_prompt_is_refused(run: Command) -> None:
    assert "--prompt is empty" in run("--prompt", "").err


def test_a_text_for_a_model_without_tokenizer_names_the_flag_that_works(run: Command) -> None:
    done = run("--prompt", "a", engine=FakeEngine())
    assert done.code == 2
    assert "--prompt-ids 1,2,3" in done.err


@pytest.mark.parametrize("name", ["generate", "chat", "batch"])
def test_help_and_complaints_come_without_torch(name: str) -> None:
    code = f"""
import sys
from runtime import {name}
assert {name}.main(["--help"]) == 0
assert {name}.main(["--frobnicate"]) == 2
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout
    assert "exit codes:" in done.stdout


def test_the_model_is_asked_for() -> None:
    done = in_process("runtime.generate", "--prompt", "a")
    assert done.returncode == 2
    assert "--model" in done.stderr


# ------------------------------------------------------------------ what is generated


def test_completions_are_printed_under_their_prompts(run: Command) -> None:
    expected = FakeEngine(tokenizer=byte_level()).generate(["the fox", "a dog"], SamplingParams(max_new_tokens=5))
    done = run("--prompt", "the fox", "--prompt", "a dog", "--max-new-tokens", "5")
    assert done.code == 0
    positions = [done.out.index(run_report.printable(text)) for text in ("the fox", expected[0].text, "a dog")]
    assert positions == sorted(positions)
    reasons = {"length": "cut there", "stop": "ended by itself"}
    assert all(reasons[one.finish_reason] in done.out for one in expected)
    assert "token/s" in done.out


def test_json_holds_everything(run: Command) -> None:
    expected = FakeEngine(tokenizer=byte_level()).generate(["the fox"], SamplingParams(max_new_tokens=5))[0]
    done = run("--prompt", "the fox", "--max-new-tokens", "5", "--json", "-")
    found = json.loads(done.out)
    assert found["completions"] == [
        {
            "prompt": "the fox",
            "prompt_tokens": expected.prompt_tokens,
            "text": expected.text,
            "token_ids": list(expected.token_ids),
            "finish_reason": expected.finish_reason,
        }
    ]
    assert found["engine"]["model"] == "fake"
    assert found["new_tokens"] == len(expected.token_ids)


def test_json_goes_to_a_file_beside_the_text(run: Command, tmp_path: Path) -> None:
    done = run("--prompt", "the fox", "--json", "out.json")
    assert "out.json" in done.out
    assert len(json.loads((tmp_path / "out.json").read_text())["completions"]) == 1


def test_flags_reach_the_engine(run: Command) -> None:
    engine = FakeEngine(tokenizer=byte_level())
    flags = "--max-new-tokens 4 --temperature 0.5 --top-k 7 --top-p 0.9 --seed 3 --stop x --stop yz --ignore-eos"
    assert run("--prompt-ids", "5,6,7", *flags.split(), engine=engine).code == 0
    assert engine.calls == [[(5, 6, 7)]]
    (params,) = engine.params
    assert params == SamplingParams(
        max_new_tokens=4, temperature=0.5, top_k=7, top_p=0.9, seed=3, stop=("x", "yz"), ignore_eos=True
    )
    (planned,) = engine.workloads
    assert (planned.prompt_len, planned.gen_len, planned.num_prompts) == (3, 4, 1)


def test_token_numbers_without_tokenizer_come_back_as_numbers(run: Command) -> None:
    expected = FakeEngine().generate([[5, 6]], SamplingParams(max_new_tokens=4))[0]
    done = run("--prompt-ids", "5 6", "--max-new-tokens", "4", engine=FakeEngine())
    assert " ".join(map(str, expected.token_ids)) in done.out


def test_one_prompt_streams_on_a_terminal(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    said: list[str] = []
    monkeypatch.setattr("costmodel.commands.outcome.say", said.append)
    expected = FakeEngine(tokenizer=byte_level()).generate(["the fox"], SamplingParams(max_new_tokens=12))[0]
    assert run("--prompt", "the fox", "--max-new-tokens", "12").code == 0
    assert said[0] == "the fox"
    text = run_report.printable(expected.text)
    assert "".join(said).startswith(f"the fox{text}\n")
    assert len(said) > 4


def test_what_a_terminal_would_obey_is_not_printed() -> None:
    assert run_report.printable("a\x1b[31mb\x07\r\n\tc\x9b é🦊") == "a[31mb\n\tc é🦊"


def test_long_prompts_are_shortened_and_completions_are_not(run: Command) -> None:
    engine = FakeEngine(tokenizer=byte_level(), max_positions=None)
    text = "the quick brown fox " * 20
    done = run("--prompt", text, "--max-new-tokens", "40", engine=engine)
    assert text not in done.out
    assert "the quick brown fox the" in done.out
    assert "…" in done.out


def test_the_last_line_holds_one_pace_measured_and_predicted() -> None:
    """10 tokens in two blocks of 2 s are 2.5 token/s; the prediction of 2 is a fifth less."""
    predicted = SimpleNamespace(throughput_tok_per_s=2.0)
    measured = SimpleNamespace(throughput_tok_per_s=2.5, latency_s=2.0, job_s=4.0)
    run = SimpleNamespace(predicted=predicted, measured=measured, throughput_error=2.0 / 2.5 - 1)
    assert run_report.pace_line(10, 5.0, run) == "10 new tokens in 4 s: 2.5 token/s; predicted: 2 token/s (-20 %)"
    assert run_report.pace_line(10, 5.0, None) == "10 new tokens in 5 s: 2 token/s"


def test_an_interrupt_is_one_line_and_130(run: Command) -> None:
    class Interrupted(FakeEngine):
        def generate(self, *args: Any, **options: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)

    done = run("--prompt", "a", engine=Interrupted(tokenizer=byte_level()))
    assert (done.code, done.err) == (130, "error: interrupted\n")


# ------------------------------------------------------------------ prompts


def test_text_files_hold_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes("\N{BYTE ORDER MARK}the fox\r\n\n  é \u2028x\n".encode())
    assert prompts.read_file(str(path)) == ["the fox", "  é \u2028x"]


def test_json_lines_hold_texts_numbers_or_objects(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('"the fox"\n[1, 2]\n{"prompt": "a", "id": 3}\n\n{"text": [5]}\n')
    assert prompts.read_file(str(path)) == ["the fox", (1, 2), "a", (5,)]


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        prompts.read_file(str(tmp_path / "in.txt"))


# ------------------------------------------------------------------ the batch and chat commands' own


def requests_file(tmp_path: Path, count: int = 3) -> Path:
    lines = [
        {"custom_id": str(number), "url": "/v1/completions", "body": {"prompt": "the fox", "max_tokens": 4}}
        for number in range(count)
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"custom_id": "bad"}]))
    return path


def test_batch_ends_with_a_summary(run: Command, tmp_path: Path) -> None:
    requests_file(tmp_path)
    done = run("-i", "in.jsonl", "-o", "out.jsonl", "--json", "sum.json", main=batch.main)
    assert done.code == 0
    assert "3 answered, 1 error\n" in done.out
    found = json.loads((tmp_path / "sum.json").read_text())
    assert (found["requests"], found["answered"], found["errors"], found["done_before"]) == (4, 3, 1, 0)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4
    again = run("-i", "in.jsonl", "-o", "out.jsonl", "--resume", "--json", "-", main=batch.main)
    assert json.loads(again.out)["done_before"] == 4


def test_batch_keeps_its_seed_and_policy_when_it_is_resumed(run: Command, tmp_path: Path) -> None:
    requests_file(tmp_path)
    assert run("-i", "in.jsonl", "-o", "out.jsonl", main=batch.main).code == 0
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert manifest["schema"] == "tierwise.batch/1"
    assert isinstance(manifest["sampling"]["seed"], int)
    assert manifest["engine"]["policy"] == POLICY.to_dict()
    seen: list[Any] = []

    @contextlib.contextmanager
    def load(args: Any, *, policy: Any) -> Iterator[FakeEngine]:
        seen.append((args.seed, policy))
        yield FakeEngine(tokenizer=byte_level())

    assert batch.main(["--model", "fake", "-i", "in.jsonl", "-o", "out.jsonl", "--resume"], load=load) == 0
    assert seen == [(manifest["sampling"]["seed"], POLICY)]


BAD_BATCH = [
    ("-i none.jsonl -o out.jsonl", ["none.jsonl: cannot be read"]),
    ("-i empty.jsonl -o out.jsonl", ["empty.jsonl holds no requests"]),
    ("-i in.jsonl -o in.jsonl", ["--output is in.jsonl", "read by --input"]),
    ("-i in.jsonl -o none/out.jsonl", ["there is no folder 'none'"]),
    ("-i in.jsonl -o out.jsonl --json out.jsonl", ["written by --output"]),
    ("-i in.jsonl -o out.jsonl --json out.jsonl.manifest.json", ["written by the manifest"]),
    ("-i in.jsonl -o done.jsonl", ["done.jsonl has results already", "--resume"]),
    ("-i in.jsonl -o done.jsonl --resume --seed 77", ["sampling.seed was", "77 now"]),
    ("-i in.jsonl -o done.jsonl --resume --temperature 0.5", ["sampling.temperature was 1.0 and is 0.5 now"]),
    ("-i . -o out.jsonl", ["plain file"]),
    ("-o out.jsonl", ["-i"]),
]


@pytest.mark.parametrize(("flags", "told"), BAD_BATCH, ids=[flags for flags, _ in BAD_BATCH])
def test_bad_input_of_batch_is_told_in_one_sentence(run: Command, tmp_path: Path, flags: str, told: list[str]) -> None:
    requests_file(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    run("-i", "in.jsonl", "-o", "done.jsonl", main=batch.main)
    before = sorted(tmp_path.iterdir())
    done = run(*flags.split(), main=batch.main)
    assert done.code == 2
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(part in errors[0] for part in told), done.err
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_batch_says_how_to_go_on(run: Command, tmp_path: Path) -> None:
    class Interrupted(FakeEngine):
        def generate(self, *args: Any, **options: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return super().generate(*args, **options)

    requests_file(tmp_path)
    done = run("-i", "in.jsonl", "-o", "out.jsonl", main=batch.main, engine=Interrupted(tokenizer=byte_level()))
    assert done.code == 130
    assert "interrupted: 1 of 4 requests are done; the same command with --resume goes on" in done.err
    done = run("-i", "in.jsonl", "-o", "out.jsonl", "--resume", main=batch.main)
    assert done.code == 0
    assert "3 answered, 1 error (1 of the 4 were done before)" in done.out


def test_the_real_engine_is_loaded_from_the_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    class Recording:
        def __init__(self, model: str, **options: Any) -> None:
            given.update(options, model=model)

        def __enter__(self) -> FakeEngine:
            return FakeEngine(tokenizer=byte_level())

        def __exit__(self, *error: object) -> None:
            given["closed"] = True

    monkeypatch.setattr("runtime.llm.LLM", Recording)
    POLICY.save(tmp_path / "p.json")
    flags = ["--gpu-memory", "2GiB", "--cpu-memory", "0GiB", "--device", "cpu", "--dtype", "bfloat16"]
    paths = ["--policy", str(tmp_path / "p.json"), "--offload-dir", str(tmp_path), "--trace", str(tmp_path / "t.json")]
    assert generate.main(["--model", "m", "--prompt", "a", *flags, *paths]) == 0
    assert given["closed"]
    expected = {"model": "m", "gpu_memory": 2 * 2**30, "cpu_memory": 0, "device": "cpu", "dtype": "bfloat16"}
    assert {name: given[name] for name in expected} == expected
    assert (given["policy"], given["offload_dir"]) == (str(tmp_path / "p.json"), str(tmp_path))
    assert given["trace"] == tmp_path / "t.json"


def test_a_plan_is_cut_to_the_models_positions() -> None:
    from costmodel.workload import Workload

    engine = FakeEngine(max_positions=40)
    engine_flags.prepare(engine, Workload(prompt_len=512, gen_len=256, num_prompts=1))
    (planned,) = engine.workloads
    assert planned.prompt_len + planned.gen_len == 40
    assert planned.prompt_len >= 1


def test_chat_shares_the_flags(run: Command) -> None:
    done = run("--temperature", "0", "--top-k", "3", main=chat.main)
    assert (done.code, "--top-k has no effect" in done.err) == (2, True)
