"""The tables behind the notebooks: against hand-solved numbers, published ones, and the files they come from."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest

from costmodel import Hardware, ModelSpec, Workload, estimate
from costmodel.calibrate.published import runs
from costmodel.errors import InputError
from costmodel.hardware import quantities
from costmodel.model import catalog_names
from costmodel.overrides import with_overrides
from costmodel.studies import machine as machine_study
from costmodel.studies import policies, published, purchase
from costmodel.units import GiB

ROOT = Path(__file__).resolve().parent.parent
PROFILE = ROOT / "benchmarks/results/2026-11-23-epyc-2-cores-profile.json"
PURCHASE = ROOT / "notebooks/data/purchase.csv"

HEADER = "machine,what,value,unit,date,source,url\n"


@pytest.fixture(scope="module")
def profile() -> Hardware:
    return Hardware.from_file(PROFILE)


# ------------------------------------------------------------------ the machine


def test_measured_table_holds_every_figure_of_the_file(profile: Hardware) -> None:
    table = machine_study.measured_table(profile)
    written = json.loads(PROFILE.read_text(encoding="utf-8"))["measured"]["figures"]
    assert len(table) == len(written) == 100
    assert table["wide"].sum() == sum(figure.get("wide", False) for figure in written) == 36
    assert (table["low"] <= table["median"]).all()
    assert (table["median"] <= table["high"]).all()


def test_select_by_place(profile: Hardware) -> None:
    table = machine_study.measured_table(profile)
    one_row = machine_study.select(table, "matmul", dtype="bfloat16", rows=1)
    assert one_row["median"].tolist() == [20.407e9]
    assert machine_study.select(table, "matmul", colour="blue").empty


def test_machine_without_a_profile_is_refused() -> None:
    with pytest.raises(InputError, match="'t4' holds no measured figures"):
        machine_study.measured_table(Hardware.from_catalog("t4"))


def test_links_are_those_of_the_runtime_and_their_fit(profile: Hardware) -> None:
    table = machine_study.link_table(profile)
    assert table.groupby("link").size().to_dict() == dict.fromkeys(machine_study.LINKS, 7)
    largest = table[(table["link"] == "disk_read") & (table["bytes"] == 2**28)].iloc[0]
    assert largest["median"] == 2.5808e9  # direct I/O; the buffered read of the same size took 1.0797
    # 268435456 B / (170.13 us + 268435456 B / 2.61133 GB/s), by hand
    assert largest["fitted_bytes_per_s"] == pytest.approx(2.60701e9, rel=1e-4)


def test_prompts_that_must_share_a_load_are_rate_over_arrival() -> None:
    row = machine_study.sharing_table([Hardware.from_catalog("t4"), Hardware.from_catalog("cpu-server")])
    t4, server = row.iloc[0], row.iloc[1]
    # 21.24 TFLOP/s of products against 12.89 GiB/s over the link: 21.24e12 / 13.84e9
    assert t4["cpu_prompts"] == pytest.approx(1535, rel=2e-3)
    assert t4["disk_prompts"] > t4["cpu_prompts"] > t4["gpu_prompts"]
    assert pd.isna(server["cpu_prompts"]), "it has one memory"


# ------------------------------------------------------------------ the published runs


def test_errors_of_the_published_table() -> None:
    table = published.error_table(runs(), Hardware.from_catalog("t4-flexgen")).set_index("run")
    assert len(table) == 12
    first = table.loc["opt-6.7b s=256 4×1"]
    assert first["published_tok_per_s"] == 53.29
    assert first["flexgen_error"] == pytest.approx(0.95, abs=0.005)  # docs/calibration.md
    assert table["flexgen_error"].abs().mean() == pytest.approx(0.59, abs=0.005)
    assert table["roofline_error"].abs().mean() == pytest.approx(0.016, abs=0.001)


def test_seconds_are_those_of_the_estimate() -> None:
    run, hardware = runs()[4], Hardware.from_catalog("t4-flexgen")
    table = published.seconds_table([run], hardware)
    cost = estimate(run.policy, hardware=hardware, model=run.model, workload=run.workload)
    assert table.groupby("phase")["phase_s"].first().to_dict() == {"prefill": cost.prefill_s, "decode": cost.decode_s}
    assert (table["busy_s"] / table["phase_s"]).tolist() == pytest.approx(table["busy_share"].tolist())
    assert table[table["bottleneck"]].set_index("phase")["resource"].to_dict() == cost.bottleneck
    assert table.drop_duplicates("phase")["phase_share"].sum() == pytest.approx(1)


# ------------------------------------------------------------------ policies


def test_more_memory_never_slows_the_best_policy() -> None:
    t4, workload = Hardware.from_catalog("t4"), Workload(prompt_len=128, gen_len=8)
    table = policies.over_memory(t4, "opt-1.3b", workload, gpu_gib=[1, 2, 16], cpu_gib=[2, 8])
    assert table[["gpu_gib", "cpu_gib"]].drop_duplicates().shape == (6, 2)
    speeds = table.pivot(index="gpu_gib", columns="cpu_gib", values="throughput_tok_per_s")
    slack = 1 - 1e-3  # the gap of each certificate
    assert (speeds.diff().iloc[1:] >= speeds.iloc[:-1].to_numpy() * (slack - 1)).all(axis=None)
    assert (speeds[8] >= speeds[2] * slack).all()
    assert (table["bound_tok_per_s"] >= table["throughput_tok_per_s"]).all()


def test_what_does_not_fit_is_a_row_without_numbers() -> None:
    nothing = with_overrides(Hardware.from_catalog("t4"), gpu_memory=GiB, cpu_memory=0, disk=0)
    table = policies.over_prompts(nothing, ["opt-30b"], [64], Workload(gen_len=4))
    assert table["case"].tolist() == ["opt-30b"]
    assert policies.result_table([("a", None)]).columns.tolist() == ["case"]


def test_families_cover_the_catalogue() -> None:
    models = [ModelSpec.from_catalog(name) for name in policies.FAMILIES.values()]
    assert {model.family for model in models} == {ModelSpec.from_catalog(name).family for name in catalog_names()}


# ------------------------------------------------------------------ what to buy


def inputs_of(folder: Path, *rows: str) -> Path:
    path = folder / "purchase.csv"
    path.write_text(HEADER + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_committed_inputs_name_machines_of_the_catalogue() -> None:
    table = purchase.read_inputs(PURCHASE)
    names = set(table["machine"]) - {"any"}
    assert {machine.name for machine in purchase.machines(table)} == names
    assert all(url.startswith("http") for url in table["url"])


def test_tokens_of_a_bought_card_by_hand(tmp_path: Path) -> None:
    path = inputs_of(tmp_path, "rtx3090,card_price,1500,USD,2020-09,x,", "rtx3090,board_power,350,W,2020-09,x,")
    ownership = purchase.Ownership(lifetime_years=2, utilisation=0.5, usd_per_kwh=0.2, host_usd=500, host_w=150)
    table = purchase.purchase_table(purchase.read_inputs(path), {("rtx3090", "m"): 10.0}, ownership)
    # 8766 h in use: 315,576,000 tokens; 4383 kWh at 20 cents are 876.60 dollars, beside 2000 dollars
    assert table.iloc[0]["tok_per_usd"] == pytest.approx(315_576_000 / 2876.6)
    assert table.iloc[0]["tok_per_kwh"] == pytest.approx(72_000)  # 36,000 tokens an hour at 0.5 kW
    assert table.iloc[0]["paid"] == "bought"


def test_tokens_of_a_rented_share_by_hand(tmp_path: Path) -> None:
    path = inputs_of(
        tmp_path,
        "h100,instance_price,40,USD/h,2026-07,x,",
        "h100,instance_gpus,8,GPUs,2026-07,x,",
        "h100,instance_memory,2048,GiB,2026-07,x,",
    )
    inputs = purchase.read_inputs(path)
    ownership = purchase.Ownership(lifetime_years=3, utilisation=0.1, usd_per_kwh=1)
    row = purchase.purchase_table(inputs, {("h100", "m"): 100.0}, ownership).iloc[0]
    assert (row["paid"], row["tok_per_usd"]) == ("rented", 72_000)  # 360,000 tokens an hour for 5 dollars
    assert pd.isna(row["tok_per_kwh"])
    use = purchase.use_table(inputs, {("h100", "m"): 100.0}, ownership, [0.1, 1.0])
    assert use["tok_per_usd"].nunique() == 1


def test_a_rented_gpu_has_its_share_of_the_instance() -> None:
    whole = Hardware.from_catalog("h100")
    share = purchase.as_rented(whole, gpus=8, memory_gib=2048)
    assert share.capacity_bytes["cpu"] == 256 * GiB
    before, after = dict(quantities(whole)), dict(quantities(share))
    ratios = {path: before[path].effective / after[path].effective for path in before if before[path].effective}
    assert {path: ratio for path, ratio in ratios.items() if ratio not in (1.0, 8.0)} == {
        "cpu.attention_bytes_per_s": 4.0,
        "cpu.dequantize_values_per_s": 4.0,
    }
    assert ratios["links.disk_read.bytes_per_s"] == ratios["disk.memory_bytes"] == 8
    alone = purchase.as_rented(Hardware.from_catalog("l4"), gpus=1, memory_gib=128)
    assert alone.links == Hardware.from_catalog("l4").links


def test_winners_by_criterion() -> None:
    columns = ("machine", "model", "paid", "throughput_tok_per_s", "tok_per_usd", "tok_per_kwh")
    rows = [("a", "m", "bought", 1, 9, 5), ("b", "m", "bought", 2, 8, None), ("c", "m", "rented", 3, 7, 6)]
    won = purchase.winner_table(pd.DataFrame(rows, columns=columns)).set_index("criterion")
    assert won["machine"].tolist() == ["c", "a", "c", "c"]
    assert won["value"].tolist() == [3, 9, 7, 6]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("t4,board_power,70,W,,x,", "line 2 .t4, board_power.: date is missing"),
        ("t4,board_power,70,W,2018-09,,", "source is missing: no number without its origin"),
        ("t4,board_power,70,kW,2018-09,x,", "the unit is 'kW': it must be 'W'"),
        ("t4,board_power,-70,W,2018-09,x,", "the value is -70: it must be a number greater than 0"),
        ("t4,colour,70,W,2018-09,x,", "unknown subject"),
        ("t4,board_power,70,W,2018-09,x,\nt4,board_power,75,W,2018-09,x,", "t4, board_power is given twice"),
    ],
)
def test_inputs_without_an_origin_are_refused(row: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        purchase.read_inputs(inputs_of(tmp_path, row))


def test_assumptions_are_checked() -> None:
    sound = purchase.Ownership(lifetime_years=3, utilisation=0.5, usd_per_kwh=0.1)
    for change, said in (({"utilisation": 0.0}, "utilisation is 0"), ({"lifetime_years": 0.0}, "lifetime_years is 0")):
        with pytest.raises(InputError, match=said):
            dataclasses.replace(sound, **change)
