"""The Hugging Face hub: download of what running a model takes, and nothing else."""

import importlib.util
import logging
from pathlib import Path

from costmodel.errors import InputError
from costmodel.model import catalog_names

logger = logging.getLogger(__name__)

_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")
_SAFETENSORS = ("model.safetensors", "model-*.safetensors")
_BIN = ("pytorch_model.bin", "pytorch_model-*.bin")
_FOLDERS = ("*/*",)


def download(name: str) -> Path:
    """The folder with config, tokenizer and weights of a model on the hub, taken from the cache where it is there.

    The ``HF_*`` variables apply (``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``). Weights come in safetensors
    if the model has them. Raises :class:`~costmodel.errors.InputError` with what to check.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError(
            f"model {name!r}: models of the hub need the package huggingface_hub: install it, or give a local folder"
        )
    try:
        folder = _snapshot(name, _SAFETENSORS)
        if not any(folder.glob("model*.safetensors")):
            folder = _snapshot(name, _BIN)
    except Exception as error:  # the hub's client passes on errors of the network, the disk and its own in many types
        logger.debug("%s: %s", name, error)
        raise InputError(f"model {name!r}: {_explained(name, error)}") from None
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


def _explained(name: str, error: Exception) -> str:
    from huggingface_hub import constants, errors

    local = "a local folder works as well"
    if isinstance(error, errors.GatedRepoError):
        return f"is gated on the hub: accept its terms at https://huggingface.co/{name} and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        known = f"did you mean 'facebook/{name}'? " if name in catalog_names() else ""
        return f"is not on the hub, or not for you: {known}check the name, and HF_TOKEN if it is private; {local}"
    if constants.HF_HUB_OFFLINE:
        return (
            f"is not in the hub's cache at {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE is set: unset it once; {local}"
        )
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return f"cannot be stored in the hub's cache at {constants.HF_HUB_CACHE}: {error.strerror}"
    return f"cannot be had from the hub ({type(error).__name__}): check the network connection and the name; {local}"
