"""The commands with the real engine: what transformers answers, also where the job was killed in between."""

import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import byte_level, save_model
from transformers import OPTForCausalLM

from costmodel.policy import Policy, Split
from runtime.interruption import Stopped
from runtime.llm import LLM
from runtime.sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
HARDWARE = ROOT / "costmodel" / "catalog" / "hardware" / "cpu-laptop.json"
MIXED = Split(gpu=0.5, cpu=0.0, disk=0.5)
POLICY = Policy(weights=MIXED, cache=MIXED, activations=MIXED, gpu_batch_size=2, num_gpu_batches=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a tokenizer, whose greedy texts vary and sometimes end by themselves."""
    folder: Path = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


def flags(model: Path, tmp_path: Path) -> list[str]:
    POLICY.save(tmp_path / "policy.json")
    return [
        *("--model", str(model), "--policy", str(tmp_path / "policy.json"), "--hardware", str(HARDWARE)),
        *("--gpu-memory", "300MiB", "--offload-dir", str(tmp_path), "--dtype", "float32", "--device", "cpu"),
    ]


def started(name: str, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"runtime.{name}", *argv],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@cache
def reference(model: Path) -> OPTForCausalLM:
    return OPTForCausalLM.from_pretrained(model)


def by_transformers(model: Path, prompt: str, new_tokens: int) -> tuple[str, str]:
    """Greedy text and finish reason."""
    ids = torch.tensor([byte_level()(prompt)["input_ids"]])
    made = (
        reference(model)
        .generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=1)[
            0, ids.shape[1] :
        ]
        .tolist()
    )
    reason = "stop" if made[-1] == 0 else "length"
    return byte_level().decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False), reason


def test_a_killed_job_ends_with_the_answers_of_transformers(model: Path, tmp_path: Path) -> None:
    words = ["the", "quick", "brown", "fox", "Ωmega", "naïve", "stop"]
    asked = {
        f"request {number}": (" ".join(words[number % 7 :] + words[: number % 5]), 4 + number % 9)
        for number in range(24)
    }
    lines = [
        {"custom_id": name, "url": "/v1/completions", "body": {"prompt": text, "max_tokens": most, "temperature": 0}}
        for name, (text, most) in asked.items()
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["-i", str(source), "-o", str(output), "--resume", *flags(model, tmp_path)]
    process = started("batch", *argv)
    while process.poll() is None and not (output.exists() and output.stat().st_size):
        time.sleep(0.001)
    process.kill()
    _, err = process.communicate()
    assert output.stat().st_size, err
    out, err = started("batch", *argv).communicate()
    assert "24 answered" in out, err
    found: dict[str, Any] = {}
    for line in output.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        assert record["custom_id"] not in found
        (choice,) = record["response"]["body"]["choices"]
        found[record["custom_id"]] = (choice["text"], choice["finish_reason"])
    assert found == {name: by_transformers(model, *what) for name, what in asked.items()}


def test_generate_and_chat_run_the_real_engine(model: Path, tmp_path: Path) -> None:
    shared = flags(model, tmp_path)
    told = started("generate", "--prompt", "the fox", "--max-new-tokens", "7", "--json", "-", *shared)
    talked = started("chat", "--temperature", "0", "--max-new-tokens", "7", *shared)
    out, err = told.communicate()
    assert told.returncode == 0, err
    found = json.loads(out)
    assert found["completions"][0]["text"] == by_transformers(model, "the fox", 7)[0]
    assert found["measurement"]["schema"] == "tierwise.measurement/1"
    assert "predicted: " in err
    out, err = talked.communicate("the fox\n!exit\n")
    assert talked.returncode == 0, err
    assert "base model" in err
    assert out.endswith("\n")


def test_an_answer_that_is_stopped_leaves_the_engine_as_it_was(model: Path, tmp_path: Path) -> None:
    """What Ctrl-C in a chat does: an exception from a callback, amid a block."""

    def stop(done: int, at_most: int) -> None:
        if done >= 5:
            raise Stopped

    options = {"policy": POLICY, "hardware": HARDWARE, "gpu_memory": "300MiB", "device": "cpu", "dtype": "float32"}
    params = SamplingParams(max_new_tokens=7)
    with LLM(str(model), offload_dir=tmp_path, **options) as engine:
        for _ in range(3):
            with pytest.raises(Stopped):
                engine.generate(["the fox", "a dog", "stop"], params, on_progress=stop)
        (done,) = engine.generate(["the fox"], params)
    assert (done.text, done.finish_reason) == by_transformers(model, "the fox", 7)
