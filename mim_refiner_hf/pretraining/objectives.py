"""The methods of pre-training by the name that a recipe states."""

from ..model.modeling_mim_refiner import MimRefinerModel
from .capi import CapiObjective
from .conmim import ConmimObjective
from .data2vec2 import Data2vec2Objective
from .mae import MaeObjective
from .objective import Objective
from .recipe import PretrainRecipe, PretrainSteps

OBJECTIVES: dict[str, type[Objective]] = {
    "mae": MaeObjective,
    "data2vec2": Data2vec2Objective,
    "conmim": ConmimObjective,
    "capi": CapiObjective,
}


def make_objective(
    recipe: PretrainRecipe, steps: PretrainSteps, encoder: MimRefinerModel | None = None
) -> Objective:
    """The method of a recipe, with fresh weights or those of an encoder to go on from."""
    return OBJECTIVES[recipe.objective](recipe, steps, encoder)
