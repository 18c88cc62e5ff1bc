"""The stages of :mod:`benchmarks.gpu_loop`: what each runs, when it is done, and how long it takes by bytes and rates.

Nothing here runs a stage, and nothing imports torch before an image has to be made.
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from costmodel import words
from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.validation import Validation

START_S = 15.0
"""A process imports torch and starts CUDA."""

ASSUMED_BYTES_PER_S = 1e9
"""The disk's rate, each way, until a profile knows better."""

SLACK = 1.6
"""By how much runs may take longer than bytes and rates say, where it is asked whether one still fits a call: a little
more than ``runtime.validate`` asks for with ``--time-limit``."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a loop works: ``folder`` keeps what must survive, ``offload`` is on the disk that is the third tier.

    ``dtype`` is what values are kept in.
    """

    folder: Path
    offload: Path
    device: str
    dtype: str

    def result(self, stage: str) -> Path:
        """The file that a stage writes."""
        return self.folder / f"{stage}.json"

    def images(self, model: str) -> Path:
        """The offload directory of one model, which goes when its last stage is done."""
        return self.offload / Path(model.removeprefix("dummy:")).name

    def rates(self, profile: str) -> tuple[float, float]:
        """Bytes/s of reading and of writing the disk, as profiled or assumed."""
        path = self.result(profile)
        if not path.is_file():
            return ASSUMED_BYTES_PER_S, ASSUMED_BYTES_PER_S
        links = Hardware.from_file(path).links
        return links.disk_read.bytes_per_s.effective, links.disk_write.bytes_per_s.effective


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One program, with one file as its result; ``model`` is what ``--model`` takes, such as ``dummy:opt-1.3b``.

    ``{out}``, ``{images}``, ``{folder}``, ``{device}`` and ``{dtype}`` in ``command`` stand for those of the
    place. ``takes_s`` is how long it runs without images; ``needs`` names the profile that it reads.
    """

    name: str
    about: str
    model: str
    command: tuple[str, ...]
    takes_s: float = 0.0
    needs: str | None = None
    image_forms: tuple[bool, ...] = ()

    def is_done(self, place: Place) -> bool:
        """Whether nothing is left to be run."""
        return place.result(self.name).is_file()

    def progress(self, place: Place) -> str:
        """What there is of it."""
        return "done" if self.is_done(place) else "to be run"

    def words(self, place: Place) -> list[str]:
        """The command with its places filled in."""
        known = {
            "out": place.result(self.name),
            "images": place.images(self.model),
            "folder": place.folder,
            "device": place.device,
            "dtype": place.dtype,
        }
        return [sys.executable, *(word.format(**known) for word in self.command)]

    def left_s(self, place: Place) -> float:
        """Seconds until it is done."""
        return self.images_s(place) + START_S + self.takes_s

    def least_s(self, place: Place) -> float:
        """Seconds of the least that gets it further: all of it, where nothing of a part is kept."""
        return self.left_s(place)

    def images_s(self, place: Place) -> float:
        """Seconds to write the images that are missing."""
        writes = place.rates(self.needs or self.name)[1]
        return sum(weight_bytes(self.model, compressed=form) for form in self._missing(place)) / writes

    def make_images(self, place: Place, progress: Progress | None = None) -> None:
        """Write the images that are missing; their disk is checked for room first."""
        missing = self._missing(place)
        place.images(self.model).mkdir(parents=True, exist_ok=True)
        if not missing:
            return
        from runtime.image import open_image
        from runtime.settings import DTYPES

        for form in missing:
            open_image(
                self.model,
                directory=place.images(self.model),
                dtype=DTYPES[place.dtype],
                compressed=form,
                progress=progress,
            )

    def _missing(self, place: Place) -> list[bool]:
        folders = [path.name for path in (place.images(self.model) / "models").glob(f"[!.]*-{place.dtype}-*")]
        there = {f"{place.dtype}-4bit-" in name for name in folders}
        return [form for form in self.image_forms if form not in there]


@dataclass(frozen=True, kw_only=True)
class Validating(Stage):
    """A stage of ``runtime.validate``: ``runs`` policies, each predicted to take ``max_seconds`` at most."""

    runs: int
    max_seconds: float

    def is_done(self, place: Place) -> bool:
        found = self._found(place)
        return found is not None and not found.left

    def progress(self, place: Place) -> str:
        found = self._found(place)
        return "to be run" if found is None else found.progress

    def left_s(self, place: Place) -> float:
        found = self._found(place)
        left = self.runs if found is None else len(found.left)
        return self.images_s(place) + START_S + (1 + left) * self._run_s(place) if left else 0.0

    def least_s(self, place: Place) -> float:
        """A process warms up with a small run before the first one that counts."""
        return SLACK * (self.images_s(place) + START_S + 2 * self._run_s(place))

    def _run_s(self, place: Place) -> float:
        """Seconds of a run at the most: weights are read from the disk, then the block takes its time."""
        return weight_bytes(self.model, compressed=False) / place.rates(self.needs or "")[0] + self.max_seconds

    def _found(self, place: Place) -> Validation | None:
        path = place.result(self.name)
        return Validation.from_file(path) if path.is_file() else None


def weight_bytes(model: str, *, compressed: bool) -> float:
    """Bytes of a model's weights in 16 bits, or with its layers in 4."""
    spec = ModelSpec.load(model.removeprefix("dummy:"))
    layers = spec.num_layers * spec.layer_weight_bytes(compressed=compressed)
    return spec.embedding_bytes + spec.head_bytes + layers


def plan(device: str) -> list[Stage]:
    """What is run on a GPU, small models first; on a CPU the same loop in small."""
    if device == "cpu":
        return _of_model("opt-125m", "quick", capped=("180MiB", "50MiB"), runs=(6, 3), max_seconds=3, limits=True)
    return [
        *_of_model("opt-1.3b", "quick", capped=("1GiB", "1GiB"), runs=(12, 6), max_seconds=3, limits=True),
        *_of_model("opt-6.7b", "thorough", capped=("4GiB", "4GiB"), runs=(10, 4), max_seconds=6),
        *_of_model("opt-13b", "quick", capped=("8GiB", "8GiB"), runs=(6, 3), max_seconds=10),
    ]


def _of_model(
    name: str, effort: str, *, capped: tuple[str, str], runs: tuple[int, int], max_seconds: int, limits: bool = False
) -> list[Stage]:
    """A profile with layers as wide as the model's; runs in so little memory that all tiers are used, and in all."""
    from profiler.effort import EFFORTS

    model, profile = f"dummy:{name}", f"profile-{name}"
    place = ("--device", "{device}", "--offload-dir", "{images}")
    hardware = ("--hardware", f"{{folder}}/{profile}.json")
    stages = [
        Stage(
            name=profile,
            about=f"{effort} profile",
            model=model,
            command=("-m", "profiler", f"--{effort}", "--model", name, *place, "--out", "{out}"),
            takes_s=EFFORTS[effort].budget_s,
        )
    ]
    budgets = ("--gpu-memory", capped[0], "--cpu-memory", capped[1])
    for kind, memory, count in (("capped", budgets, runs[0]), ("uncapped", (), runs[1])):
        stages.append(
            Validating(
                name=f"validate-{name}-{kind}",
                about=f"{words.counted(count, 'policy', 'policies')} in "
                + (f"{capped[0]} + {capped[1]}" if memory else "what is free"),
                model=model,
                command=(
                    *("-m", "runtime.validate", "--model", model, *place, "--dtype", "{dtype}", *hardware, *memory),
                    *("--runs", str(count), "--max-seconds", str(max_seconds), "--prompt-len", "64", "--gen-len", "8"),
                    *("--out", "{out}", "--resume"),
                ),
                needs=profile,
                image_forms=(False, True),
                runs=count,
                max_seconds=max_seconds,
            )
        )
    if limits:
        command = ("-m", "benchmarks.runtime_limits", "--model", model, *place, *hardware, "--json", "{out}")
        stages.append(
            Stage(
                name=f"limits-{name}",
                about="beside the machine's limits",
                model=model,
                command=command,
                takes_s=60.0,
                needs=profile,
                image_forms=(False, True),
            )
        )
    return stages


def discard_images(stage: Stage, stages: list[Stage], place: Place) -> None:
    """Give a model's disk back when all of its stages are done."""
    if all(one.is_done(place) for one in stages if one.model == stage.model):
        shutil.rmtree(place.images(stage.model), ignore_errors=True)
