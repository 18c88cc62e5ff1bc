"""The Hugging Face hub, as far as planning needs it: the ``config.json`` of a model, and why it cannot be had.

The client (package huggingface_hub) is imported when something must be fetched, and by nobody who plans for a
model of the catalogue or a file.
"""

import importlib.util
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from costmodel.errors import InputError

logger = logging.getLogger(__name__)


def is_id(text: str) -> bool:
    """Whether the text has the form of a model's id, ``organisation/name``; ``folder/config.json`` has not."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.json)", text) is not None


def config_file(name: str, *, instead: str) -> Path:
    """The ``config.json`` of a model, and nothing else of it; from the client's cache where it is there.

    The ``HF_*`` variables apply: ``HF_HUB_ETAG_TIMEOUT`` is how many seconds to wait for a connection. Raises
    :class:`InputError` as :func:`explained` does.
    """
    with explained(name, instead=instead):
        import huggingface_hub

        if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            _connect(name)
        return Path(huggingface_hub.hf_hub_download(name, "config.json"))


def _connect(name: str) -> None:
    """Raise :class:`ConnectionError` where the hub does not answer: the client would try again for half a minute."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return
    address = huggingface_hub.hf_hub_url(name, "config.json")
    try:
        huggingface_hub.get_hf_file_metadata(address, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except errors.HfHubHTTPError:  # an answer: what is wrong the download will find as well
        return
    except Exception as error:  # what can happen on the way has other types with every version of the client
        raise ConnectionError(str(error)) from None


@contextmanager
def explained(name: str, *, instead: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into one :class:`InputError`: what to check, or ``instead`` of it."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError(
            f"model {name!r}: the hub is reached by the package huggingface_hub: pip install huggingface-hub; {instead}"
        )
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the client passes on errors of the network, the disk and its own in many types
        logger.debug("%s: %s", name, error)
        raise InputError(f"model {name!r}: {_reason(name, error, instead)}") from None


def _reason(name: str, error: Exception, instead: str) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"is gated on the hub: accept its terms at https://huggingface.co/{name} and set HF_TOKEN; {instead}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"is not on the hub, or not for you: check the name, and HF_TOKEN if it is private; {instead}"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"has no config.json on the hub, so that it is no checkpoint for transformers; {instead}"
    if constants.HF_HUB_OFFLINE:
        return (
            f"is not in the hub's cache at {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE is set: unset it once; {instead}"
        )
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return f"cannot be stored in the hub's cache at {constants.HF_HUB_CACHE}: {error.strerror}"
    if isinstance(error, (ConnectionError, errors.LocalEntryNotFoundError)):
        return (
            f"no connection to the Hugging Face hub, and {name} is not in the cache ({constants.HF_HUB_CACHE}): check "
            f"the network; {instead}"
        )
    return f"cannot be had from the hub ({type(error).__name__}): check the network connection and the name; {instead}"
