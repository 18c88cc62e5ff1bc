"""The Hugging Face hub: download of what running a model takes, and nothing else."""

from pathlib import Path

from costmodel import hub, records
from runtime import families

_INSTEAD = "a local folder works as well, but that is none"
_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")
_SAFETENSORS = ("model.safetensors", "model-*.safetensors")
_BIN = ("pytorch_model.bin", "pytorch_model-*.bin")
_FOLDERS = ("*/*",)


def download(name: str) -> Path:
    """The folder with config, tokenizer and weights of a model on the hub, taken from the cache where it is there.

    The ``HF_*`` variables apply (``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``). Weights come in safetensors
    if the model has them. A model of a family that cannot be run is refused by its config, before its weights
    are fetched. Raises :class:`~costmodel.errors.InputError` with what to check.
    """
    config = records.read_json(hub.config_file(name, instead=_INSTEAD))
    families.architecture(config, name=name, where=f"config.json of {name}")
    with hub.explained(name, instead=_INSTEAD):
        folder = _snapshot(name, _SAFETENSORS)
        if not any(folder.glob("model*.safetensors")):
            folder = _snapshot(name, _BIN)
    return folder


def _snapshot(name: str, weights: tuple[str, ...]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=[*_BESIDE, *weights], ignore_patterns=[*_FOLDERS])
        )
    except errors.IncompleteSnapshotError:
        # Without a network: another program may have cached what it needed and no more, which can be all we need.
        config = huggingface_hub.try_to_load_from_cache(name, "config.json")
        if not isinstance(config, str):
            raise
        return Path(config).parent
