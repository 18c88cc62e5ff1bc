"""The command line: every flag, every complaint, the JSON's keys, what reaches the terminal and the files."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import costmodel
from costmodel import Hardware, ModelSpec, Policy, Workload
from costmodel.commands import estimate as estimate_command
from costmodel.commands import frontier as frontier_command
from costmodel.commands import outcome, tierwise
from costmodel.commands import search as search_command
from costmodel.hardware import catalog_names
from costmodel.model import catalog_names as model_names
from costmodel.units import GiB

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "costmodel" / "catalog" / "published" / "flexgen_cost_model_reference.json"

MAINS: dict[str, Callable[[list[str]], int]] = {
    "search": search_command.main,
    "estimate": estimate_command.main,
    "frontier": frontier_command.main,
    "tierwise": tierwise.main,
}
SMALL = ["--gpu", "t4", "--model", "opt-1.3b", "--gpu-memory", "2GiB", "--cpu-memory", "3GiB", "--disk", "4GiB"]
"""A search of a tenth of a second in which every tier is tight."""

SHAPE = ["--gpu-batch-size", "4", "--num-gpu-batches", "2"]
ALL_CPU = ["--percent", "0", "100", "0", "100", "0", "100", *SHAPE]


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def prose(self) -> str:
        """Standard output as one line, however it was wrapped."""
        return " ".join(self.out.split())


Command = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def command(name: str, *argv: str) -> Done:
        code = MAINS[name](list(argv))
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return command


def in_process(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m …`` as people do, warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
        env={**os.environ, **environment},
    )


# ------------------------------------------------------------------ bad input


BAD = [
    # unknown names suggest the nearest
    ("search", "--gpu t5", ["--gpu", "'t5'", "did you mean 't4'"]),
    ("search", "--gpu my.json", ["--gpu", "my.json", "--hardware"]),
    ("search", "--model opt-31b", ["--model", "'opt-31b'", "did you mean 'opt-30b'"]),
    ("search", "--formulation rofline", ["--formulation", "did you mean 'roofline'"]),
    ("search", "--gpu-mem 16GiB", ["--gpu-mem", "did you mean --gpu-memory"]),
    ("search", "--frobnicate", ["unknown flag --frobnicate"]),
    ("search", "extra", ["'extra'"]),
    ("tierwise", "serch", ["'serch'", "did you mean 'search'"]),
    ("tierwise", "--gpu t4", ["unknown flag '--gpu'"]),
    # units
    ("search", "--gpu-memory 16", ["--gpu-memory", "'16'", "16GiB"]),
    ("search", "--gpu-memory 16XB", ["--gpu-memory", "'16XB'"]),
    ("search", "--disk-read 2GB", ["--disk-read", "'2GB'", "bytes/s"]),
    ("search", "--max-latency soon", ["--max-latency", "soon", "seconds"]),
    ("search", "--disk 1e400TB", ["--disk", "finite"]),
    # negative, zero, too large
    ("search", "--gpu-memory 0GiB", ["--gpu-memory", "0GiB", "greater than 0"]),
    ("search", "--gpu-memory -5GiB", ["--gpu-memory", "-5GiB", "greater than 0"]),
    ("search", "--cpu-memory -1GB", ["--cpu-memory", "-1GB", "at least 0"]),
    ("search", "--host-link 0GB/s", ["--host-link", "greater than 0"]),
    ("search", "--disk-write 1B/s", ["--disk-write", "1B/s", "at least 1 kB/s"]),
    ("search", "--disk 1e30TB", ["--disk", "1e30TB", "at most"]),
    ("search", "--usable-fraction 1.5", ["--usable-fraction", "1.5", "at most 1"]),
    ("search", "--usable-fraction nan", ["--usable-fraction", "nan"]),
    ("search", "--prompt-len 0", ["--prompt-len", "is 0", "at least 1"]),
    ("search", "--prompt-len -5", ["--prompt-len", "-5"]),
    ("search", "--gen-len 1.5", ["--gen-len", "1.5", "whole number"]),
    ("search", "--gen-len 2000000", ["--gen-len", "2000000", "at most"]),
    ("search", "--num-prompts 0", ["--num-prompts", "at least 1"]),
    ("search", "--gpu-batch-size 0", ["--gpu-batch-size", "at least 1"]),
    ("search", "--num-gpu-batches -3", ["--num-gpu-batches", "-3"]),
    ("search", "--max-latency 0", ["--max-latency", "positive"]),
    ("search", "--top 0", ["--top", "at least 1"]),
    ("frontier", "--points 1", ["--points", "at least 2"]),
    ("search", "--prompt-len 2040", ["2040", "32", "2072", "2048 positions"]),
    # splits
    ("search", "--percent 20 90 0 100 0 100", ["--percent", "weights", "110", "100"]),
    ("search", "--percent 20 -10 0 100 0 100", ["--percent", "weights", "-10"]),
    ("search", "--percent 20 80 0 nan 0 100", ["--percent", "cache", "nan"]),
    ("search", "--percent 20 80 0 100 0", ["--percent", "6"]),
    ("search", "--percent all 80 0 100 0 100", ["--percent", "all", "number"]),
    ("search", "--percent 0 100 0 100 0 0 --formulation flexgen", ["activations", "flexgen"]),
    # switches
    ("search", "--overlap maybe", ["--overlap", "maybe", "auto, on or off"]),
    ("search", "--compress-cache on --formulation flexgen", ["flexgen", "cache compression"]),
    ("search", "--cpu-attention off --formulation flexgen", ["flexgen", "CPU"]),
    # flags that contradict each other, or lack one another
    ("search", "--gpu t4 --hardware machine.json", ["--gpu", "--hardware"]),
    ("search", "--gpu", ["--gpu"]),
    ("estimate", "", ["--policy", "--percent"]),
    ("estimate", "--percent 0 100 0 100 0 100 --gpu-batch-size 4", ["--percent", "--num-gpu-batches"]),
    ("estimate", "--num-gpu-batches 4", ["--num-gpu-batches", "--percent", "--gpu-batch-size"]),
    ("estimate", "--policy good.json --percent 0 100 0 100 0 100", ["--policy", "--percent"]),
    ("estimate", "--policy good.json --gpu-batch-size 4", ["--policy", "--gpu-batch-size"]),
    ("estimate", "--policy good.json --overlap off", ["--overlap off", "good.json", "overlap is on"]),
    ("estimate", "--policy good.json --formulation flexgen", ["flexgen"]),
    ("estimate", "--max-latency 3", ["--max-latency"]),
    ("estimate", "--top 3", ["--top"]),
    ("frontier", "--top 3", ["--top"]),
    ("frontier", "--save-policy p.json", ["--save-policy"]),
    # files read
    ("search", "--hardware missing.json", ["missing.json", "No such file"]),
    ("search", "--hardware truncated.json", ["truncated.json", "line 1"]),
    ("search", "--hardware good.json", ["good.json", "schema", "tierwise.hardware/1"]),
    ("search", "--hardware binary.json", ["binary.json", "UTF-8"]),
    ("search", "--model truncated.json", ["--model", "truncated.json", "line 1"]),
    ("search", "--model folder", ["--model", "config.json"]),
    ("estimate", "--policy missing.json", ["missing.json"]),
    ("estimate", "--policy machine.json", ["machine.json", "schema", "tierwise.policy/1"]),
    ("estimate", "--policy unfit.json", ["unfit.json", "weights", "sum to 1"]),
    ("estimate", "--policy odd.json", ["odd.json", "num_gpu_batches"]),
    # files written: refused before any work
    ("search", "--plot figure.bmp", ["--plot", "figure.bmp", ".png"]),
    ("search", "--plot nowhere/figure.png", ["--plot", "nowhere"]),
    ("search", "--json nowhere/result.json", ["--json", "nowhere"]),
    ("search", "--json folder", ["--json", "folder"]),
    ("search", "--save-policy -", ["--save-policy", "'-'"]),
    ("search", "--json same.json --save-policy same.json", ["--json", "--save-policy", "same.json"]),
    ("estimate", "--policy good.json --json good.json", ["--json", "--policy", "good.json"]),
    ("frontier", "--plot f.txt", ["--plot", "f.txt"]),
]


@pytest.fixture
def files(tmp_path: Path) -> None:
    """The files that the bad commands name."""
    policy = {
        "schema": "tierwise.policy/1",
        **{kind: {"gpu": 0.0, "cpu": 1.0, "disk": 0.0} for kind in ("weights", "cache", "activations")},
        "gpu_batch_size": 4,
        "num_gpu_batches": 2,
    }
    unfit = {**policy, "weights": {"gpu": 0.5, "cpu": 0.6, "disk": 0.0}}
    odd = {key: value for key, value in policy.items() if key != "num_gpu_batches"}
    written = {"good": policy, "unfit": unfit, "odd": odd, "machine": Hardware.from_catalog("t4").to_dict()}
    for name, data in written.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "truncated.json").write_text('{"schema": "tierwise', encoding="utf-8")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder").mkdir()


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(("command", "line", "mentions"), BAD, ids=[f"{command} {line}" for command, line, _ in BAD])
def test_bad_input_is_one_sentence(run: Command, tmp_path: Path, command: str, line: str, mentions: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    done = run(command, *line.split())
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert [text for text in mentions if text not in done.err] == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


ODD = ["", " ", "\0", "a" * 5000, "../../x", "💾", "t4\n"]
READERS = ["--hardware", "--model", "--gpu-memory", "--max-latency", "--overlap", "--percent", "--top", "--plot"]


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_odd_text_never_ends_in_a_traceback(run: Command, text: str) -> None:
    for flag in READERS:
        done = run("search", f"{flag}={text}")
        assert done.code == 2, flag
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1


# ------------------------------------------------------------------ infeasible


def test_infeasible_search_leaves_with_3_and_says_what_mends_it(run: Command) -> None:
    done = run("search", "--gpu-memory", "1GiB", "--cpu-memory", "0GiB", "--disk", "0GiB")
    assert done.code == 3
    assert done.out == ""
    assert done.err.count("\n") == 1
    needed = re.search(r"--gpu-memory of at least ([\d.]+ GiB)", done.err)
    assert needed is not None
    mended = run("search", "--gpu-memory", needed[1], "--cpu-memory", "0GiB", "--disk", "0GiB")
    assert mended.code == 0


@pytest.mark.parametrize("command", ["search", "frontier"])
def test_infeasible_latency_leaves_with_3(run: Command, command: str) -> None:
    done = run(command, *SMALL, "--max-latency", "1us")
    assert done.code == 3
    assert "--max-latency" in done.err


# ------------------------------------------------------------------ JSON

SPLIT = {"gpu": float, "cpu": float, "disk": float}
BYTES = {"gpu": (int, float), "cpu": (int, float), "disk": (int, float)}
RESOURCES = ("gpu_compute", "cpu_compute", "cpu_to_gpu", "gpu_to_cpu", "disk_read", "disk_write")
PHASE = {resource: {"busy_s": float, "busy_share": float} for resource in RESOURCES}
POLICY = {
    "weights": SPLIT,
    "cache": SPLIT,
    "activations": SPLIT,
    "gpu_batch_size": int,
    "num_gpu_batches": int,
    "compress_weights": bool,
    "compress_cache": bool,
    "cpu_attention": bool,
    "overlap": bool,
}
ESTIMATE = {
    "prefill_s": float,
    "decode_s": float,
    "latency_s": float,
    "throughput_tok_per_s": float,
    "peak_bytes": BYTES,
    "limit_bytes": BYTES,
    "feasible": bool,
    "violations": list,
    "bottleneck": {"prefill": str, "decode": str},
    "resources": {"prefill": PHASE, "decode": PHASE},
}
USED = {
    "schema": str,
    "formulation": str,
    "hardware": {"schema": str, "name": str},
    "model": {"name": str, "num_layers": int},
    "workload": {"prompt_len": int, "gen_len": int},
}


def assert_holds(data: Any, schema: dict[str, Any], where: str = "") -> None:
    """Every documented key is there, with its type."""
    for key, kind in schema.items():
        assert key in data, f"{where}.{key} is missing"
        if isinstance(kind, dict):
            assert_holds(data[key], kind, f"{where}.{key}")
        else:
            assert isinstance(data[key], kind), f"{where}.{key} is {data[key]!r}"


def test_json_of_search(run: Command) -> None:
    done = run("search", *SMALL, "--top", "2", "--json", "-")
    assert (done.code, done.err) == (0, "")
    data = json.loads(done.out)
    search = {"bound_tok_per_s": float, "gap": float, "linear_programs": int, "seconds": float}
    more = {"usable_fraction": float, "notes": list, "shadow_prices": list, "alternatives": list}
    assert_holds(data, {**USED, **more, "policy": POLICY, "estimate": ESTIMATE, "search": search})
    assert_holds(data["alternatives"][0], {"policy": POLICY, "estimate": ESTIMATE})
    assert_holds(data["shadow_prices"][0], {"what": str, "amount": str, "gain": float, "method": str})
    assert data["search"]["gap"] <= 1e-3
    assert data["estimate"]["throughput_tok_per_s"] <= data["search"]["bound_tok_per_s"]


def test_json_of_estimate(run: Command) -> None:
    done = run("estimate", *ALL_CPU, "--json", "-")
    assert (done.code, done.err) == (0, "")
    data = json.loads(done.out)
    assert_holds(data, {**USED, "usable_fraction": float, "notes": list, "policy": POLICY, "estimate": ESTIMATE})
    assert data["hardware"]["name"] == "t4"
    assert data["model"]["name"] == "opt-30b"
    assert data["workload"] == {"prompt_len": 512, "gen_len": 32}
    assert data["usable_fraction"] == 0.9
    assert data["formulation"] == "roofline"


def test_json_of_frontier(run: Command) -> None:
    done = run("frontier", *SMALL, "--points", "3", "--json", "-")
    assert (done.code, done.err) == (0, "")
    data = json.loads(done.out)
    point = {"latency_s": float, "throughput_tok_per_s": float, "bound_tok_per_s": float}
    assert_holds(data, {**USED, "points": list})
    for found in data["points"]:
        assert_holds(found, {**point, "policy": POLICY, "estimate": ESTIMATE})
    latencies = [found["latency_s"] for found in data["points"]]
    throughputs = [found["throughput_tok_per_s"] for found in data["points"]]
    assert latencies == sorted(set(latencies))
    assert throughputs == sorted(set(throughputs))
    assert len(latencies) > 1


@pytest.mark.parametrize(
    ("command", "flags"), [("search", SMALL), ("estimate", ALL_CPU), ("frontier", [*SMALL, "--points", "2"])]
)
def test_json_file_holds_what_standard_output_would(
    run: Command, tmp_path: Path, command: str, flags: list[str]
) -> None:
    written = run(command, *flags, "--json", "result.json")
    printed = run(command, *flags, "--json", "-")
    assert written.code == printed.code == 0
    assert "result.json" in written.out
    data, again = json.loads((tmp_path / "result.json").read_text(encoding="utf-8")), json.loads(printed.out)
    for timed in (data, again):
        timed.get("search", {}).pop("seconds", None)
    assert data == again
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_hardware_in_a_result_is_a_hardware_file(run: Command, tmp_path: Path) -> None:
    first = json.loads(run("search", *SMALL, "--json", "-").out)
    (tmp_path / "mine.json").write_text(json.dumps(first["hardware"]), encoding="utf-8")
    again = json.loads(run("search", "--hardware", "mine.json", "--model", "opt-1.3b", "--json", "-").out)
    assert again["estimate"] == first["estimate"]


# ------------------------------------------------------------------ what flags do


def test_zero_percent_and_zero_bytes_mean_zero(run: Command) -> None:
    fixed = ["--percent", "0", "100", "0", "100", "100", "0"]
    policy = json.loads(run("search", *fixed, "--json", "-").out)["policy"]
    assert policy["weights"] == {"gpu": 0.0, "cpu": 1.0, "disk": 0.0}
    assert policy["cache"] == {"gpu": 0.0, "cpu": 1.0, "disk": 0.0}
    assert policy["activations"] == {"gpu": 1.0, "cpu": 0.0, "disk": 0.0}
    without = json.loads(
        run("search", "--model", "opt-1.3b", "--cpu-memory", "0GiB", "--disk", "0GiB", "--json", "-").out
    )
    assert without["estimate"]["limit_bytes"]["cpu"] == without["estimate"]["limit_bytes"]["disk"] == 0
    assert without["policy"]["weights"] == {"gpu": 1.0, "cpu": 0.0, "disk": 0.0}


def test_flags_reach_the_library(run: Command) -> None:
    line = (
        "--gpu a10g --gpu-memory 20GiB --cpu-memory 100GB --disk 1TB --disk-read 3GB/s --disk-write 500MB/s "
        "--host-link 10GB/s --usable-fraction 0.5 --model facebook/opt-6.7b --prompt-len 100 --gen-len 10 "
        "--num-prompts 64 --max-latency 2min --gpu-batch-size 8 --num-gpu-batches 4 --compress-weights on "
        "--compress-cache off --cpu-attention off --overlap off --json -"
    )
    data = json.loads(run("search", *line.split()).out)
    hardware = data["hardware"]
    assert hardware["name"] == "a10g"
    assert hardware["gpu"]["memory_bytes"]["value"] == 20 * GiB
    assert hardware["cpu"]["memory_bytes"]["value"] == 100e9
    assert hardware["disk"]["memory_bytes"]["value"] == 1e12
    rates = {name: link["bytes_per_s"]["value"] for name, link in hardware["links"].items()}
    assert rates == {"cpu_to_gpu": 10e9, "gpu_to_cpu": 10e9, "disk_read": 3e9, "disk_write": 0.5e9}
    assert data["usable_fraction"] == 0.5
    assert data["estimate"]["limit_bytes"] == {"gpu": 10 * GiB, "cpu": 50e9, "disk": 0.5e12}
    assert data["model"]["name"] == "opt-6.7b"
    assert data["workload"] == {"prompt_len": 100, "gen_len": 10, "num_prompts": 64, "max_latency_s": 120.0}
    switches = {
        name: data["policy"][name] for name in ("compress_weights", "compress_cache", "cpu_attention", "overlap")
    }
    assert switches == {"compress_weights": True, "compress_cache": False, "cpu_attention": False, "overlap": False}
    assert (data["policy"]["gpu_batch_size"], data["policy"]["num_gpu_batches"]) == (8, 4)
    assert (data["estimate"]["blocks"], data["estimate"]["latency_s"] <= 120) == (2, True)


def test_defaults_are_those_of_the_issue(run: Command) -> None:
    data = json.loads(run("search", "--json", "-").out)
    assert (data["hardware"]["name"], data["model"]["name"], data["formulation"]) == ("t4", "opt-30b", "roofline")
    assert data["workload"] == {"prompt_len": 512, "gen_len": 32}
    assert data["alternatives"] == []


def test_names_may_be_in_capitals(run: Command) -> None:
    data = json.loads(run("estimate", "--gpu", "T4", "--model", "OPT-125m", *ALL_CPU, "--json", "-").out)
    assert (data["hardware"]["name"], data["model"]["name"]) == ("t4", "opt-125m")


def test_search_agrees_with_the_library(run: Command) -> None:
    data = json.loads(run("search", *SMALL, "--json", "-").out)
    hardware = Hardware.from_dict(data["hardware"])
    found = costmodel.search(hardware=hardware, model=ModelSpec.from_catalog("opt-1.3b"), workload=Workload())
    assert data["estimate"]["throughput_tok_per_s"] == found.estimate.throughput_tok_per_s


# ------------------------------------------------------------------ estimate


@pytest.mark.parametrize("flag", ["--save-policy", "--json"])
def test_saved_policy_is_estimated_the_same(run: Command, flag: str) -> None:
    found = json.loads(run("search", *SMALL, "--json", "-").out)
    assert run("search", *SMALL, flag, "kept.json").code == 0
    again = json.loads(run("estimate", *SMALL, "--policy", "kept.json", "--json", "-").out)
    assert again["policy"] == found["policy"]
    assert again["estimate"] == found["estimate"]
    assert again["notes"] == []


def test_estimate_says_for_what_a_result_was_computed(run: Command) -> None:
    assert run("search", *SMALL, "--json", "kept.json").code == 0
    done = run("estimate", "--policy", "kept.json", "--model", "opt-2.7b", "--gen-len", "16")
    assert "kept.json was computed for model opt-1.3b, not opt-2.7b; gen_len 32, not 16" in done.prose


def test_switch_that_agrees_with_the_policy_is_fine(run: Command) -> None:
    assert run("estimate", *ALL_CPU, "--save-policy", "kept.json").code == 0
    assert run("estimate", "--policy", "kept.json", "--overlap", "on", "--compress-weights", "off").code == 0


def test_saved_policy_file_is_read_by_the_library(run: Command, tmp_path: Path) -> None:
    assert run("estimate", *ALL_CPU, "--compress-cache", "on", "--save-policy", "kept.json").code == 0
    policy = Policy.from_percent((0, 100, 0, 100, 0, 100), gpu_batch_size=4, num_gpu_batches=2, compress_cache=True)
    assert Policy.from_file(tmp_path / "kept.json") == policy


def test_estimate_of_what_does_not_fit_says_by_how_much(run: Command) -> None:
    flags = ["--percent", "100", "0", "100", "0", "100", "0", *SHAPE]
    done = run("estimate", *flags)
    assert (done.code, done.err) == (0, "")
    cost = json.loads(run("estimate", *flags, "--json", "-").out)["estimate"]
    assert cost["feasible"] is False
    assert cost["violations"] == ["gpu"]
    excess = (cost["peak_bytes"]["gpu"] - cost["limit_bytes"]["gpu"]) / GiB
    assert "does not fit" in done.prose
    told = re.search(r"GPU memory is exceeded by ([\d.]+) GiB: [\d.]+ GiB needed, 13.5 GiB usable", done.prose)
    assert told is not None
    assert float(told[1]) == pytest.approx(excess, rel=1e-3)


def test_switches_of_an_estimate_are_determinate(run: Command) -> None:
    def switches(*flags: str) -> list[bool]:
        policy = json.loads(run("estimate", *ALL_CPU, *flags, "--json", "-").out)["policy"]
        return [policy[name] for name in ("compress_weights", "compress_cache", "cpu_attention", "overlap")]

    assert switches() == [False, False, False, True]
    assert switches("--formulation", "flexgen") == [False, False, True, True]
    assert switches("--cpu-attention", "on", "--overlap", "off") == [False, False, True, False]


@pytest.mark.parametrize("case", json.loads(PUBLISHED.read_text(encoding="utf-8"))["estimate"][:4], ids=str)
def test_estimate_is_the_published_one(run: Command, case: dict[str, Any]) -> None:
    flags = [
        *("--gpu", "t4-flexgen", "--formulation", "flexgen", "--model", case["model"], "--usable-fraction", "1"),
        *("--gpu-memory", f"{case['gpu_gib']}GiB", "--cpu-memory", f"{case['cpu_gib']}GiB"),
        *("--prompt-len", str(case["prompt_len"]), "--gen-len", str(case["gen_len"])),
        *("--gpu-batch-size", str(case["gpu_batch_size"]), "--num-gpu-batches", str(case["num_gpu_batches"])),
        *("--percent", *map(str, case["percent"]), "--compress-weights", "on" if case["compress_weight"] else "off"),
    ]
    cost = json.loads(run("estimate", *flags, "--json", "-").out)["estimate"]
    assert cost["prefill_s"] == pytest.approx(case["prefill_s"], rel=1e-6)
    assert cost["decode_s"] == pytest.approx(case["decode_s"], rel=1e-6)
    assert cost["throughput_tok_per_s"] == pytest.approx(case["throughput"], rel=1e-6)


def test_derived_flexgen_constants_are_admitted(run: Command) -> None:
    done = run("estimate", *ALL_CPU, "--formulation", "flexgen")
    assert "constants are derived from the rates of t4" in done.prose
    published = run("estimate", *ALL_CPU, "--formulation", "flexgen", "--gpu", "t4-flexgen")
    assert "derived" not in published.prose


# ------------------------------------------------------------------ the report


def test_report_of_a_search(run: Command) -> None:
    flags = [*SMALL, "--top", "3", "--num-prompts", "10"]
    done = run("search", *flags)
    assert (done.code, done.err) == (0, "")
    data = json.loads(run("search", *flags, "--json", "-").out)
    cost, policy = data["estimate"], data["policy"]
    assert f"Best policy: {cost['throughput_tok_per_s']:.4g} token/s" in done.prose
    assert f"exceeds {data['search']['bound_tok_per_s']:.4g} token/s" in done.prose
    assert f"{data['search']['linear_programs']:,} linear programs" in done.prose
    prompts = policy["gpu_batch_size"] * policy["num_gpu_batches"]
    assert re.search(rf"{policy['num_gpu_batches']} GPU batch(es)? of {policy['gpu_batch_size']} prompts?", done.prose)
    assert f"{prompts} prompts in" in done.prose or f"a block of {prompts} prompt" in done.prose
    for said in (
        "opt-1.3b",
        "10 prompts of 512 tokens",
        "Prefill",
        "Decode",
        "busy",
        "What more would bring",
        "usable",
    ):
        assert said in done.prose
    assert ("lossy" in done.prose) == (policy["compress_weights"] or policy["compress_cache"])
    assert len(data["alternatives"]) == 2


def test_report_places_percent_and_bytes(run: Command) -> None:
    done = run("estimate", *ALL_CPU)
    weights = next(line for line in done.out.splitlines() if line.startswith("weights"))
    gib = ModelSpec.from_catalog("opt-30b").total_params * 2 / GiB
    assert weights.split() == ["weights", "–", "–", "100", "%", f"{gib:.1f}", "–", "–"]


def test_lossy_compression_is_named(run: Command) -> None:
    assert "lossy" in run("estimate", *ALL_CPU, "--compress-weights", "on").prose
    assert "lossy" not in run("estimate", *ALL_CPU).prose


def test_generating_one_token_has_no_decode(run: Command) -> None:
    done = run("estimate", *ALL_CPU, "--gen-len", "1")
    assert done.code == 0
    assert "Prefill" in done.out
    assert "Decode" not in done.out


def test_report_of_a_frontier(run: Command) -> None:
    done = run("frontier", *SMALL, "--points", "3")
    assert (done.code, done.err) == (0, "")
    points = json.loads(run("frontier", *SMALL, "--points", "3", "--json", "-").out)["points"]
    for point in points:
        assert f"{point['throughput_tok_per_s']:.4g}" in done.out


def test_machine_without_gpu_is_explained(run: Command) -> None:
    done = run(
        "estimate",
        "--gpu",
        "cpu-laptop",
        "--model",
        "opt-1.3b",
        "--percent",
        "100",
        "0",
        "100",
        "0",
        "100",
        "0",
        *SHAPE,
    )
    assert "without a GPU: what is called GPU here" in done.prose


@pytest.mark.parametrize("columns", ["80", "100", "300"])
def test_report_fits_the_terminal(run: Command, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for line in (["search", *SMALL, "--top", "3"], ["frontier", *SMALL, "--points", "3"], ["search", "--list-gpus"]):
        done = run(*line)
        assert max(len(text) for text in done.out.splitlines()) <= min(100, int(columns))
        assert "…" not in done.out


def test_colour_only_where_wanted(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in run("estimate", *ALL_CPU).out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[1;32m" in run("estimate", *ALL_CPU).out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;32m" not in run("estimate", *ALL_CPU).out


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("command", ["search", "estimate", "frontier"])
@pytest.mark.parametrize(("name", "start"), [("f.png", b"\x89PNG"), ("f.PDF", b"%PDF"), ("f.svg", b"<?xml")])
def test_plot_is_a_figure(run: Command, tmp_path: Path, command: str, name: str, start: bytes) -> None:
    flags = {"search": SMALL, "estimate": ALL_CPU, "frontier": [*SMALL, "--points", "2"]}[command]
    done = run(command, *flags, "--plot", name)
    assert (done.code, done.err) == (0, "")
    content = (tmp_path / name).read_bytes()
    assert content.startswith(start)
    assert len(content) > 5000
    assert name in done.out


def test_all_outputs_at_once_with_json_on_standard_output(run: Command, tmp_path: Path) -> None:
    done = run("search", *SMALL, "--json", "-", "--plot", "f.png", "--save-policy", "p.json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["policy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.png", "p.json"]


def test_existing_file_is_replaced_and_a_link_stays_one(run: Command, tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old", encoding="utf-8")
    (tmp_path / "link.json").symlink_to("real.json")
    assert run("estimate", *ALL_CPU, "--json", "link.json").code == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text(encoding="utf-8"))["policy"]


def test_device_is_written_to_and_never_replaced(run: Command) -> None:
    assert run("estimate", *ALL_CPU, "--json", os.devnull).code == 0
    assert not Path(os.devnull).is_file()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that no one can write to")
def test_unwritable_folder_is_an_error(run: Command) -> None:
    done = run("estimate", *ALL_CPU, "--json", "/proc/result.json")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: /proc/result.json: cannot be written: ")
    assert done.err.count("\n") == 1


# ------------------------------------------------------------------ help, version, lists

SEARCH_FLAGS = re.findall(
    r"--[a-z-]+",
    "--gpu --hardware --model --prompt-len --gen-len --num-prompts --gpu-memory --cpu-memory --disk --disk-read "
    "--disk-write --host-link --usable-fraction --formulation --gpu-batch-size --num-gpu-batches --percent "
    "--compress-weights --compress-cache --cpu-attention --overlap --max-latency --top --plot --save-policy --json",
)
FLAGS = {
    "search": SEARCH_FLAGS,
    "estimate": [*(flag for flag in SEARCH_FLAGS if flag not in ("--max-latency", "--top")), "--policy"],
    "frontier": [*(flag for flag in SEARCH_FLAGS if flag not in ("--save-policy", "--top")), "--points"],
}


@pytest.mark.parametrize("command", FLAGS)
def test_help_mentions_every_flag_and_default(run: Command, command: str) -> None:
    done = run(command, "--help")
    assert (done.code, done.err) == (0, "")
    shown = re.findall(r"^  (?:-h, )?(--[a-z-]+)", done.out, re.MULTILINE)
    extra = ["--help", "--version", "--list-gpus", "--list-models"]
    assert sorted(shown) == sorted([*FLAGS[command], *extra])
    for said in ("default: t4", "default: opt-30b", "default: 512", "default: 32", "examples:", "16GiB", "exit codes:"):
        assert said in done.prose
    assert max(len(line) for line in done.out.splitlines()) <= 100


@pytest.mark.parametrize("command", MAINS)
def test_version(run: Command, command: str) -> None:
    done = run(command, "--version")
    assert (done.code, done.out) == (0, f"tierwise {costmodel.__version__}\n")


def test_lists_hold_the_catalogue(run: Command) -> None:
    listed = [line.split()[0] for line in run("search", "--list-gpus").out.splitlines()[2:]]
    assert listed == list(catalog_names())
    models = [line.split()[0] for line in run("estimate", "--list-models").out.splitlines()[2:]]
    assert models == list(model_names())
    assert {"opt-30b", "bloom-176b", "llama-3.1-405b", "qwen2.5-72b"} <= set(models)


# ------------------------------------------------------------------ tierwise


def test_tierwise_runs_the_command_it_is_given(run: Command) -> None:
    direct = run("estimate", *ALL_CPU)
    assert run("tierwise", "estimate", *ALL_CPU) == direct
    assert "usage: tierwise estimate" in run("tierwise", "estimate", "--help").out


def test_tierwise_hands_on_the_exit_code(run: Command) -> None:
    assert run("tierwise", "search", "--gpu", "t5").code == 2
    assert run("tierwise", "search", *SMALL, "--max-latency", "1us").code == 3


def test_tierwise_lists_its_commands(run: Command) -> None:
    listed = run("tierwise", "--help")
    assert listed.code == 0
    for command in tierwise.BUILT_IN:
        assert re.search(rf"^  {command} +[A-Z].*\.$", listed.out, re.MULTILINE), command
    without = run("tierwise")
    assert (without.code, without.out) == (2, "")
    assert without.err == listed.out


def test_built_in_commands_are_the_registered_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    registered = project["entry-points"][tierwise.GROUP]
    registered = {name: value for name, value in registered.items() if value.startswith("costmodel.")}
    ours = {name: point.value for name, point in tierwise.commands().items() if name in tierwise.BUILT_IN}
    assert ours == registered


def test_tierwise_imports_only_the_command_it_runs() -> None:
    code = "import sys\nfrom costmodel.commands import tierwise\ntierwise.main(sys.argv[1:])\n"
    code += "print(*(name for name in sys.modules if name.startswith('costmodel.commands.')), file=sys.stderr)"
    command = [sys.executable, "-W", "error", "-c", code, "search", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.rpartition(".")[2] for name in done.stderr.split()}
    assert "search" in loaded
    assert loaded.isdisjoint({"estimate", "frontier", "calibrate"})


def test_command_that_cannot_be_loaded_is_explained(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("chat", "no_such_package.chat:main", tierwise.GROUP)
    monkeypatch.setattr(tierwise, "entry_points", lambda group: [broken])
    done = run("tierwise", "chat")
    assert done.code == 1
    assert (
        done.err
        == "error: the command 'chat' (no_such_package.chat:main) cannot be loaded: No module named 'no_such_package'\n"
    )
    assert run("tierwise", "--help").code == 0


# ------------------------------------------------------------------ as a process


@pytest.mark.parametrize("command", ["search", "estimate", "frontier"])
def test_python_dash_m(command: str) -> None:
    done = in_process(f"costmodel.{command}", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python -m costmodel.{command} ")


def test_search_of_the_issue_runs_without_warning_or_heavy_imports() -> None:
    code = "import runpy, sys\nsys.argv = ['search', '--gpu', 't4']\n"
    code += "try:\n    runpy.run_module('costmodel.search', run_name='__main__')\n"
    code += "finally:\n    print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Best policy" in done.stdout
    heavy = {"torch", "transformers", "pandas", "matplotlib", "scipy", "pulp", "rich.progress"}
    assert heavy.isdisjoint(done.stderr.split())


def test_ascii_terminal_gets_ascii() -> None:
    done = in_process("costmodel.estimate", *ALL_CPU, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert "CPU>GPU link" in done.stdout
    assert done.stdout.isascii()
    data = in_process("costmodel.estimate", *ALL_CPU, "--json", "-", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert json.loads(data.stdout)["policy"]


@pytest.mark.skipif(os.name != "posix", reason="pipes and signals of POSIX")
@pytest.mark.parametrize(
    "argv", [["costmodel.search", "--help"], ["costmodel.search"], ["costmodel.search", "--json", "-"]]
)
def test_reader_that_leaves_is_no_error(argv: list[str]) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "wb") as pipe:
        command = [sys.executable, "-W", "error", "-m", *argv]
        done = subprocess.run(command, cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode in (0, outcome.READER_LEFT)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        command = [sys.executable, "-W", "error", "-m", "costmodel.estimate", *ALL_CPU]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: standard output cannot be written: No space left on device\n"


def test_interrupt_is_one_line(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search_command, "search", interrupted)
    done = run("search")
    assert (done.code, done.out, done.err) == (130, "", "error: interrupted\n")
