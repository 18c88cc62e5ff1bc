"""Random tiny checkpoints for tests, in every form that OPT models have been published in."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)

Form = Literal["safetensors", "bin", "old bin"]

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 80,
    "max_position_embeddings": 20,
    "word_embed_proj_dim": 64,
}

AS_350M: dict[str, Any] = {"word_embed_proj_dim": 16, "do_layer_norm_before": False}


def randomised(model: Model, *, std: float, norms_around: float = 1.0) -> Model:
    """Give every parameter random values: biases and norms start as 0 and 1, which hides mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * std + (norms_around if is_norm else 0.0))
    model.eval()
    return model


def saved(model: PreTrainedModel, folder: Path, name: str) -> str:
    """The checkpoint of a model below a folder, as transformers writes it; written once."""
    path = folder / name.replace(" ", "-").replace(",", "")
    if not path.exists():
        model.save_pretrained(path)
    return str(path)


def random_model(seed: int = 0, **config: Any) -> PreTrainedModel:
    """A model whose biases and norms are random as well, so that no two of its tensors are equal."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **(SHAPE | config)))
    return randomised(model, std=0.3, norms_around=0.0)


def save(
    model: PreTrainedModel,
    folder: Path,
    *,
    form: Form = "safetensors",
    prefix: str = "model.",
    head: bool | None = None,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the model's config and weights; ``prefix`` opens every key, ``head`` None: as transformers saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    tied = model.config.tie_word_embeddings
    state = {
        prefix + key.removeprefix("model.") if key.startswith("model.") else key: value.detach().to(dtype).clone()
        for key, value in model.state_dict().items()
        if key != "lm_head.weight" or (not tied if head is None else head)
    }
    stem, suffix = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    keys = sorted(state)
    names = {}
    for shard in range(shards):
        name = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
        part = {key: state[key] for key in keys[shard::shards]}
        names |= dict.fromkeys(part, name)
        if form == "safetensors":
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name, _use_new_zipfile_serialization=form == "bin")
    if shards > 1:
        index = {"metadata": {"total_size": sum(value.nbytes for value in state.values())}, "weight_map": names}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def put_in_cache(cache: Path, folder: Path, name: str) -> Path:
    """Lay a folder out as the hub's client does; the folder that it then finds."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    return snapshot
