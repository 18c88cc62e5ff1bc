"""What a name stands for: the catalogue's models by their ids on the hub, without a network, and any other id."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_costmodel_model import PUBLISHED

from costmodel import hub, model_source
from costmodel.commands import tierwise
from costmodel.errors import InputError
from costmodel.model import ModelSpec, catalog_config
from tests.checkpoints import put_in_cache

MODELS = Path(model_source.__file__).parent / "catalog" / "models"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "config_file", lambda *args, **options: pytest.fail("the hub was asked"))


# Ids as the model cards have them: the catalogue's entry, what the id is called and its max_position_embeddings.
KNOWN: dict[str, tuple[str, str, int | None]] = {
    "facebook/opt-30b": ("opt-30b", "opt-30b", 2048),
    "bigscience/bloom": ("bloom-176b", "bloom", None),
    "bigscience/bloom-7b1": ("bloom-7b1", "bloom-7b1", None),
    "bigscience/bloomz-560m": ("bloom-560m", "bloomz-560m", None),
    "Salesforce/codegen-2B-mono": ("codegen-2b", "codegen-2b-mono", 2048),
    "Salesforce/codegen-350M-multi": ("codegen-350m", "codegen-350m-multi", 2048),
    "THUDM/glm-4-9b-hf": ("glm-4-9b", "glm-4-9b-hf", 8192),
    "zai-org/glm-4-9b-chat-hf": ("glm-4-9b", "glm-4-9b-chat-hf", 131072),
    "THUDM/GLM-4-32B-0414": ("glm-4-32b-0414", "glm-4-32b-0414", 32768),
    "meta-llama/Llama-2-7b-chat-hf": ("llama-2-7b", "llama-2-7b-chat-hf", 4096),
    "meta-llama/Llama-3.1-8B": ("llama-3.1-8b", "llama-3.1-8b", 131072),
    "meta-llama/Meta-Llama-3.1-405B-Instruct": ("llama-3.1-405b", "meta-llama-3.1-405b-instruct", 131072),
    "meta-llama/Meta-Llama-3-8B": ("llama-3.1-8b", "meta-llama-3-8b", 8192),
    "meta-llama/Llama-3.3-70B-Instruct": ("llama-3.1-70b", "llama-3.3-70b-instruct", 131072),
    "mistralai/Mistral-7B-v0.3": ("mistral-7b-v0.3", "mistral-7b-v0.3", 32768),
    "Qwen/Qwen2.5-7B": ("qwen2.5-7b", "qwen2.5-7b", 131072),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2.5-7b", "qwen2.5-7b-instruct", 32768),
}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("hub_id", KNOWN)
def test_known_ids_are_the_catalogues_without_a_network(hub_id: str) -> None:
    entry, name, max_positions = KNOWN[hub_id]
    spec, base = ModelSpec.load(hub_id), ModelSpec.from_catalog(entry)
    assert (spec.name, spec.max_positions) == (name, max_positions)
    assert (spec.total_params, spec.kv_values_per_token) == (base.total_params, base.kv_values_per_token)
    bare = hub_id.partition("/")[2]
    for spelling in (hub_id.upper(), f" {hub_id} ", bare, bare.lower()):
        assert ModelSpec.load(spelling) == spec
    assert hub_id in model_source.entries()[entry].hub_ids


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("copy", "known"),
    [("NousResearch/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"), ("unsloth/Qwen2.5-7B", "Qwen/Qwen2.5-7B")],
)
def test_a_copy_is_the_catalogues_and_keeps_its_id(copy: str, known: str) -> None:
    assert ModelSpec.load(copy) == ModelSpec.load(known)
    assert model_source.find(copy).hub_id == copy
    assert model_source.in_catalog(copy) is None, "its weights are not those of the id that it is named after"


@pytest.mark.usefixtures("no_network")
def test_an_instruct_model_may_have_no_window_where_its_elder_has_one() -> None:
    assert ModelSpec.load("mistralai/Mistral-7B-Instruct-v0.1").sliding_window == 4096
    assert ModelSpec.load("mistralai/Mistral-7B-Instruct-v0.2").sliding_window is None
    assert catalog_config("meta-llama/Meta-Llama-3-70B")["rope_scaling"] is None
    assert catalog_config("meta-llama/Llama-3.1-70B")["rope_scaling"]["factor"] == 8


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("hub_id", [name for name in PUBLISHED if model_source.in_catalog(name)])
def test_known_ids_have_the_parameters_that_the_hub_shows(hub_id: str) -> None:
    assert ModelSpec.load(hub_id).total_params == PUBLISHED[hub_id][1]


def test_every_entry_says_which_ids_it_holds_for() -> None:
    seen: set[str] = set()
    for name, entry in model_source.entries().items():
        source = json.loads((MODELS / f"{name}.json").read_text())["_source"]
        assert all(hub.is_id(hub_id) for hub_id in entry.hub_ids)
        assert name == "opt-175b" or any(f"config.json of {hub_id} on" in source for hub_id in entry.hub_ids)
        assert not seen & {hub_id.lower() for hub_id in entry.hub_ids}
        seen |= {hub_id.lower() for hub_id in entry.hub_ids}
        for changes in entry.hub_ids.values():
            assert set(changes) <= set(entry.config)


def test_a_config_given_out_can_be_changed() -> None:
    catalog_config("llama-3.1-8b")["rope_scaling"]["factor"] = 1
    assert catalog_config("llama-3.1-8b")["rope_scaling"]["factor"] == 8


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("Qwen/Qwen3-8B", True),
        ("a/b.c_d-e", True),
        ("gpt2", False),
        ("a/b/c", False),
        ("./b", False),
        ("../b", False),
        ("/b", False),
        ("a/", False),
        ("a/.b", False),
        ("my-model/config.json", False),
        ("a b/c", False),
    ],
)
def test_what_looks_like_an_id(text: str, is_id: bool) -> None:
    assert hub.is_id(text) is is_id


def cached(cache: Path, folder: Path, config: dict[str, Any], name: str) -> None:
    """A config.json, and nothing else, in the client's cache."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    put_in_cache(cache, folder, name)


def test_any_other_id_is_read_from_the_hub(tmp_path: Path, hub_cache: Path) -> None:
    config = catalog_config("qwen2.5-7b") | {"num_hidden_layers": 5}
    cached(hub_cache, tmp_path / "made", config, "someone/My-Model")
    spec = ModelSpec.load("someone/My-Model")
    assert (spec.name, spec.num_layers, spec.hidden_size) == ("My-Model", 5, 3584)
    with pytest.raises(InputError, match="unknown model 'My-Model'"):
        ModelSpec.from_catalog("someone/My-Model")


def test_a_config_of_the_hub_that_is_refused_names_the_id(tmp_path: Path, hub_cache: Path) -> None:
    cached(hub_cache, tmp_path / "made", {"model_type": "chatglm"}, "THUDM/glm-4-9b")
    with pytest.raises(InputError, match="^config.json of THUDM/glm-4-9b: .* its native successors are glm and glm4"):
        ModelSpec.load("THUDM/glm-4-9b")


def test_an_id_that_cannot_be_had_is_one_sentence(hub_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tierwise.main(["search", "--model", "facebook/opt-31b"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: --model: model 'facebook/opt-31b': is not in the hub's cache at {hub_cache} and ")
    assert told.endswith(
        "; the path of a config.json works as well, but that is none; the catalogue has 'facebook/opt-30b'\n"
    )
    assert told.count("\n") == 1


def test_without_the_client_an_unknown_id_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    told = "the hub is reached by the package huggingface_hub: pip install huggingface-hub; the path of a config.json"
    with pytest.raises(InputError, match=f"^model 'x/y': {told} works as well, but that is none$"):
        ModelSpec.load("x/y")
    assert ModelSpec.load("meta-llama/Llama-3.1-8B").num_layers == 32


def test_a_path_is_never_looked_up(tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "model").mkdir(parents=True)
    (tmp_path / "someone" / "model" / "config.json").write_text(json.dumps(catalog_config("opt-125m")))
    assert ModelSpec.load("someone/model").num_layers == 12
    with pytest.raises(InputError, match="unknown model"):
        ModelSpec.load(Path("someone") / "other")


class Raised:
    """What the hub's client raises, made without the answers of a server."""

    def __init__(self) -> None:
        from huggingface_hub import errors

        def made(kind: type[Exception]) -> Exception:
            return kind.__new__(kind)

        self.gated, self.missing = made(errors.GatedRepoError), made(errors.RepositoryNotFoundError)
        self.no_config, self.network = made(errors.RemoteEntryNotFoundError), ConnectionError("no route")
        self.full, self.strange = OSError(28, "No space left on device"), ValueError("strange")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("gated", "is gated on the hub: accept its terms at https://huggingface.co/a/b and set HF_TOKEN; the path"),
        ("missing", "is not on the hub, or not for you: check the name, and HF_TOKEN if it is private; the path"),
        ("no_config", "has no config.json on the hub, so that it is no checkpoint for transformers; the path"),
        (
            "network",
            r"no connection to the Hugging Face hub, and a/b is not in the cache \(.*\): check the network",
        ),
        ("strange", r"cannot be had from the hub \(ValueError\): check the network connection and the name; the path"),
        ("full", "cannot be stored in the hub's cache at .*: No space left on device"),
    ],
)
def test_what_the_client_raises_is_one_sentence(kind: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*args: Any, **options: Any) -> None:
        raise getattr(Raised(), kind)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda address, timeout: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", raising)
    with pytest.raises(InputError, match=f"^model 'a/b': {told}"):
        ModelSpec.load("a/b")


def test_a_hub_that_does_not_answer_is_asked_once(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(address: str, timeout: float) -> None:
        asked.append((address, timeout))
        raise TimeoutError("timed out")

    asked: list[tuple[str, float]] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 3)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **options: pytest.fail("it tries again"))
    told = f"model 'a/b': no connection to the Hugging Face hub, and a/b is not in the cache ({hub_cache})"
    with pytest.raises(InputError, match=f"^{re.escape(told)}"):
        ModelSpec.load("a/b")
    assert asked == [("https://huggingface.co/a/b/resolve/main/config.json", 3)]
