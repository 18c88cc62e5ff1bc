"""Hugging Face accelerate's ``disk_offload`` on random weights: the other side of :mod:`benchmarks.against_accelerate`.

``python -m benchmarks.accelerate_offload --model opt-1.3b --folder DIR --prepare``

writes the weights in accelerate's own offload format, tensor by tensor, and leaves; a folder that is complete is kept.

``python -m benchmarks.accelerate_offload --model opt-1.3b --folder DIR --batch 16 --prompt-len 512 --gen-len 32``

generates from them on the CPU in bf16, greedily, and prints one JSON line: machine, versions, commit and date, then
batch, seconds of ``generate``, tokens/s and the process's peak resident memory. The model never lies in memory whole:
it is built on the meta device, and accelerate maps each tensor when its module runs. One token of one prompt is
generated first, so that one-off costs are not timed.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers

from costmodel import model as catalog
from runtime import environment

try:
    import accelerate
    from accelerate.utils import offload_weight, save_offload_index
except ImportError:
    sys.exit(
        "accelerate_offload: accelerate is not installed: pip install --constraint constraints.txt 'tierwise[bench]', "
        "or pip install --no-deps --target DIR accelerate==1.15.0 psutil and PYTHONPATH=DIR"
    )

DTYPE = torch.bfloat16
INDEX = "index.json"
SEED = 20
FIRST_TOKEN = 4
"""Smaller identifiers are OPT's special tokens."""


def meta_model(name: str, attention: str | None = None) -> transformers.PreTrainedModel:
    """The catalogue's model without storage; ``attention`` is transformers' choice where ``None``."""
    config = catalog.catalog_config(name)
    family = config.pop("model_type")
    given = {} if attention is None else {"attn_implementation": attention}
    with accelerate.init_empty_weights():
        made = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(family, **config), dtype=DTYPE, **given
        )
    made.tie_weights()
    return made.eval()


def prepare(model: transformers.PreTrainedModel, folder: Path) -> None:
    """Write random weights for every tensor unless the folder has them all; a half-written folder is never taken."""
    if _complete(model, folder):
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    generator = torch.Generator().manual_seed(SEED)
    tied = dict(model.all_tied_weights_keys)
    index: dict[str, dict[str, object]] = {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            offload_weight(_random(name, tuple(tensor.shape), generator), name, partial, index=index)
    for name, source in tied.items():
        # A second name for the same file: accelerate would write a copy, which the page cache would hold twice.
        index[name] = index[source]
        os.link(partial / f"{source}.dat", partial / f"{name}.dat")
    for file in partial.iterdir():
        _sync(file)
    save_offload_index(index, partial)
    _sync(partial / INDEX)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _complete(model: transformers.PreTrainedModel, folder: Path) -> bool:
    if not (folder / INDEX).exists():
        return False
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: entry["shape"] for name, entry in index.items() if entry["dtype"] == "bfloat16"}
    return wanted == found and all((folder / f"{name}.dat").exists() for name in wanted)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """What a fresh OPT has: N(0, 0.02), norms 1, biases 0."""
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=DTYPE)
    if len(shape) == 1:
        return torch.ones(shape, dtype=DTYPE)
    return torch.empty(shape, dtype=DTYPE).normal_(0.0, 0.02, generator=generator)


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def generate(model: transformers.PreTrainedModel, *, batch: int, prompt_len: int, gen_len: int) -> float:
    """Seconds of one greedy generation for prompts of equal length that never ends early."""
    generator = torch.Generator().manual_seed(SEED)
    prompts = torch.randint(FIRST_TOKEN, model.config.vocab_size, (batch, prompt_len), generator=generator)
    began = time.perf_counter()
    answer = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=gen_len,
        max_new_tokens=gen_len,
    )
    seconds = time.perf_counter() - began
    if answer.shape != (batch, prompt_len + gen_len):
        raise RuntimeError(f"generated {tuple(answer.shape)}, expected {(batch, prompt_len + gen_len)}")
    return seconds


def origin() -> Iterator[tuple[str, object]]:
    """Machine, versions, commit and date."""
    yield "date", environment.today()
    yield "commit", environment.commit()
    yield "cpu", environment.cpu_name()
    yield "cores", environment.usable_cores()
    yield "threads", torch.get_num_threads()
    yield "load_per_core", round(environment.load_per_core(), 2)
    yield "torch", str(torch.__version__)
    yield "transformers", transformers.__version__
    yield "accelerate", accelerate.__version__


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare, or generate and print one JSON line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerate_offload", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="a model of the catalogue, such as opt-1.3b")
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="accelerate's offload folder")
    parser.add_argument("--prepare", action="store_true", help="write the weights and leave")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--gen-len", type=int, default=32, metavar="TOKENS")
    parser.add_argument("--attention", choices=("eager", "sdpa"), help="(default: what transformers chooses)")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    model = meta_model(args.model, args.attention)
    if args.prepare:
        prepare(model, args.folder)
        return 0
    if not _complete(model, args.folder):
        parser.error(f"{args.folder} does not hold the weights of {args.model}: run --prepare first")
    accelerate.disk_offload(model, offload_dir=args.folder, execution_device=torch.device("cpu"))
    # Without torch.inference_mode: in it, the head multiplies the last positions (no contiguous tensor) with one copy
    # of its weights for each prompt, 3.3 GB for 16. `generate` itself asks for no_grad, where they are folded.
    generate(model, batch=1, prompt_len=8, gen_len=1)
    seconds = generate(model, batch=args.batch, prompt_len=args.prompt_len, gen_len=args.gen_len)
    result = dict(origin()) | {
        "model": args.model,
        "attention": model.config._attn_implementation,
        "batch": args.batch,
        "prompt_len": args.prompt_len,
        "gen_len": args.gen_len,
        "seconds": seconds,
        "tok_per_s": args.batch * args.gen_len / seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
