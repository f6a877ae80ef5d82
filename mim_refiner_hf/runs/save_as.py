"""`refine --save_as native`: what ships, also in another library's format, beside `model/`.

check_save_as("native", config, pooling="mean")     # before any work
save_as(Path("out/model"), "native")                # out/native, compared with out/model
"""

import copy
from pathlib import Path

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.poolings_mim_refiner import LEARNED_POOLINGS, Pooling
from ..publishing.export import export
from ..publishing.twins import why_not_exported
from ..runtime.wording import setting


def check_save_as(
    to: str, config: MimRefinerConfig, pooling: Pooling, erased_directions: int = 0
) -> None:
    """Whether both that can ship, the start and the result, can be said in a format.

    Args:
        to: a format of `export`.
        config: of the start.
        pooling: of the result.
        erased_directions: how many are erased from the result.

    Raises:
        ValueError: naming the setting in the way, or what is not installed.
    """
    result = copy.deepcopy(config)
    result.pooling = pooling
    result.erased_directions += erased_directions
    if pooling not in LEARNED_POOLINGS:
        # as the trainer lets go of them
        result.predictor_layers = 0
        result.pooling_head = "none"

    for shipped in (result, config):
        reason = why_not_exported(shipped, to)
        if reason is not None:
            raise ValueError(f"{setting('save_as', to)}: {reason}")


def save_as(folder: Path, to: str) -> str:
    """Write the model of a folder in a format, beside it; a sentence for the end of a run."""
    twin = folder.with_name(to)
    differences = export(folder, twin, to)
    return f"The same for {to}: {twin}, at most {max(differences.values()):.1e} apart."
