"""Cost models: what one step costs and what it occupies."""

from costmodel import records
from costmodel.formulations.base import Formulation
from costmodel.formulations.flexgen import FlexGen
from costmodel.formulations.roofline import Roofline

FORMULATIONS: dict[str, Formulation] = {model.name: model for model in (Roofline(), FlexGen())}


def get(name: str) -> Formulation:
    """The formulation of this name; an unknown one is an error that suggests the nearest."""
    if name not in FORMULATIONS:
        raise records.nearest(name, FORMULATIONS, what="formulation")
    return FORMULATIONS[name]
