"""The flags that the commands share, and how they become a machine, a model, a workload and a request."""

import argparse
from typing import Any

from costmodel import records
from costmodel.commands import parsing
from costmodel.commands.catalogue import ListMachines, ListModels
from costmodel.errors import InputError
from costmodel.formulations import FORMULATIONS
from costmodel.formulations.base import SWITCHES
from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.overrides import with_overrides
from costmodel.policy import splits_from_percent
from costmodel.workload import Workload

USAGE = "%(prog)s [--gpu NAME | --hardware FILE] [--model NAME|PATH] [flags]"
DEFAULT_GPU = "t4"
DEFAULT_MODEL = "opt-30b"

_SWITCH_HELP = {
    "compress_weights": "keep weights in 4 bits (lossy: a quarter of the size, some quality)",
    "compress_cache": "keep the KV cache in 4 bits (lossy as well)",
    "cpu_attention": "attend to off-GPU cache on the CPU, instead of copying the cache to the GPU",
    "overlap": "copy while computing",
}


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Which machine, and what to change on it."""
    group = parser.add_argument_group(
        "machine",
        "Sizes carry a unit, 16GiB (2**30 bytes) or 16GB (10**9 bytes), and so do rates, 2GB/s.\n"
        "A number given here replaces the catalogue's, without an efficiency on top.",
    )
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--gpu", metavar="NAME", help=f"a machine of the catalogue (default: {DEFAULT_GPU}; see --list-gpus)"
    )
    which.add_argument("--hardware", metavar="FILE", help="a hardware file, your own or one that the profiler wrote")
    size, rate = parsing.quantity("bytes", or_zero=True), parsing.quantity("bytes/s")
    group.add_argument("--gpu-memory", metavar="SIZE", type=parsing.quantity("bytes"), help="GPU memory, such as 16GiB")
    group.add_argument("--cpu-memory", metavar="SIZE", type=size, help="host memory, such as 208GB; 0GiB for none")
    group.add_argument("--disk", metavar="SIZE", type=size, help="disk space, such as 1.5TB; 0GiB for none")
    group.add_argument("--disk-read", metavar="RATE", type=rate, help="rate of reading the disk, such as 2GB/s")
    group.add_argument("--disk-write", metavar="RATE", type=rate, help="rate of writing the disk, such as 1GB/s")
    group.add_argument(
        "--host-link", metavar="RATE", type=rate, help="rate between CPU and GPU, each way, such as 12GB/s"
    )
    group.add_argument(
        "--usable-fraction",
        metavar="SHARE",
        type=parsing.fraction,
        help="the share of all three capacities that may be used, in (0, 1] "
        f"(default: {', '.join(f'{f.default_usable_fraction:g} for {name}' for name, f in FORMULATIONS.items())})",
    )
    group.add_argument("--list-gpus", action=ListMachines, help="list the catalogue's machines and leave")


def add_work(parser: argparse.ArgumentParser) -> None:
    """Which model, on what prompts, by which cost model."""
    group = parser.add_argument_group("model and workload")
    group.add_argument(
        "--model",
        metavar="NAME|PATH",
        default=DEFAULT_MODEL,
        help="a model of the catalogue, an id of the Hugging Face hub, or a config.json or its folder "
        "(default: %(default)s; see --list-models)",
    )
    tokens = parsing.whole_number(1, parsing.MOST_TOKENS)
    group.add_argument(
        "--prompt-len", metavar="TOKENS", type=tokens, default=512, help="tokens of each prompt (default: %(default)s)"
    )
    group.add_argument(
        "--gen-len",
        metavar="TOKENS",
        type=tokens,
        default=32,
        help="tokens to generate for each prompt (default: %(default)s)",
    )
    group.add_argument(
        "--num-prompts",
        metavar="N",
        type=parsing.whole_number(1),
        help="prompts in the job (default: an endless queue of them)",
    )
    group.add_argument(
        "--formulation",
        type=_formulation,
        default="roofline",
        metavar="|".join(FORMULATIONS),
        help="the cost model: ours, or the published one of FlexGen (default: %(default)s)",
    )
    group.add_argument("--list-models", action=ListModels, help="list the catalogue's models and leave")


def add_latency(parser: argparse.ArgumentParser) -> None:
    """The latency limit of a search."""
    parser.add_argument_group("limit").add_argument(
        "--max-latency",
        metavar="SECONDS",
        type=parsing.seconds,
        help="the longest that one block may take, from its first load to its last token; 600, or with a unit: 10min",
    )


def add_policy(parser: argparse.ArgumentParser, *, title: str, about: str) -> argparse._ArgumentGroup:
    """The batch shape, the splits and the switches; ``about`` says what leaving a switch at auto means."""
    group = parser.add_argument_group(title, about)
    count = parsing.whole_number(1)
    group.add_argument("--gpu-batch-size", metavar="N", type=count, help="prompts that the GPU computes at once")
    group.add_argument(
        "--num-gpu-batches", metavar="N", type=count, help="GPU batches in a block, which share each load of a layer"
    )
    group.add_argument(
        "--percent",
        nargs=6,
        type=parsing.percentage,
        metavar=("W_GPU", "W_CPU", "C_GPU", "C_CPU", "A_GPU", "A_CPU"),
        help="percent of weights, KV cache and activations on GPU and CPU; what a pair leaves to 100 is on disk",
    )
    add_switches(group)
    return group


def add_switches(group: argparse._ArgumentGroup) -> None:
    """The four switches, each auto, on or off."""
    for name in SWITCHES:
        flag, text = f"--{name.replace('_', '-')}", f"{_SWITCH_HELP[name]} (default: auto)"
        group.add_argument(flag, type=_switch, default="auto", metavar="auto|on|off", help=text)


def add_output(parser: argparse.ArgumentParser, *, figure: str, policy: bool) -> None:
    """Where results go besides the terminal."""
    group = parser.add_argument_group("output", "Files are written whole or not at all.")
    group.add_argument(
        "--json",
        metavar="FILE|-",
        type=parsing.json_file,
        help="write everything as JSON; with - to standard output, and nothing else there",
    )
    group.add_argument("--plot", metavar="FILE", type=parsing.figure_file, help=f"draw {figure}: .png, .pdf or .svg")
    if policy:
        group.add_argument(
            "--save-policy", metavar="FILE", type=parsing.output_file, help="write the policy, for estimate --policy"
        )


def machine(args: argparse.Namespace) -> Hardware:
    """The machine that the flags describe."""
    if args.hardware is not None:
        hardware = Hardware.from_file(args.hardware)
    else:
        hardware = _from_catalog(DEFAULT_GPU if args.gpu is None else args.gpu)
    sizes = ("gpu_memory", "cpu_memory", "disk", "disk_read", "disk_write", "host_link")
    return with_overrides(hardware, **{name: getattr(args, name) for name in sizes})


def _from_catalog(name: str) -> Hardware:
    try:
        return Hardware.from_catalog(name.strip().lower())
    except InputError as error:
        if name.endswith(".json"):
            raise InputError(
                f"--gpu is {name}: it takes a name of the catalogue; a file goes with --hardware"
            ) from None
        raise InputError(f"--gpu: {error}") from None


def model(args: argparse.Namespace) -> ModelSpec:
    """The model that the flags name."""
    try:
        return ModelSpec.load(args.model)
    except InputError as error:
        raise InputError(f"--model: {error}") from None


def workload(args: argparse.Namespace) -> Workload:
    """The prompts that the flags describe."""
    return Workload(
        prompt_len=args.prompt_len,
        gen_len=args.gen_len,
        num_prompts=args.num_prompts,
        max_latency_s=getattr(args, "max_latency", None),
    )


def switches(args: argparse.Namespace) -> dict[str, bool]:
    """The switches that are on or off, without those left at ``auto``."""
    return {name: getattr(args, name) == "on" for name in SWITCHES if getattr(args, name) != "auto"}


def request(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of :func:`costmodel.search` and :func:`costmodel.frontier` that the flags describe."""
    return {
        "hardware": machine(args),
        "model": model(args),
        "workload": workload(args),
        "formulation": args.formulation,
        "usable_fraction": args.usable_fraction,
        "gpu_batch_size": args.gpu_batch_size,
        "num_gpu_batches": args.num_gpu_batches,
        "splits": None if args.percent is None else splits_from_percent(tuple(args.percent)),
        "switches": switches(args),
    }


def check_files(args: argparse.Namespace) -> None:
    """Raise :class:`InputError` where two outputs share a file, or an output would replace an input."""
    reads = {"--hardware": args.hardware, "--model": args.model, "--policy": getattr(args, "policy", None)}
    writes = {"--json": args.json, "--plot": args.plot, "--save-policy": getattr(args, "save_policy", None)}
    parsing.check_distinct(writes, reads)


def _formulation(text: str) -> str:
    if text not in FORMULATIONS:
        raise argparse.ArgumentTypeError(str(records.nearest(text, FORMULATIONS, what="formulation")))
    return text


def _switch(text: str) -> str:
    if text not in ("auto", "on", "off"):
        raise argparse.ArgumentTypeError(f"is {text}: auto, on or off is expected")
    return text
