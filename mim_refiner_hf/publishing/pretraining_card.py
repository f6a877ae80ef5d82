"""The card of a pre-trained encoder: how it was trained, how it loads, under which licence it is.

text = pretraining_card("my-mae", "mae", facts, licence, encoder.config)
"""

from collections.abc import Mapping

from ..conversion.licence import Licence
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..runtime.text import plain
from .card_licence import licence_line
from .model_card import REPO_PLACEHOLDER, card_metadata, is_hub_name
from .ways_to_use import ways_to_use

# what a method is called, and where it is described
_METHODS = {
    "mae": "MAE (masked autoencoding, arXiv 2111.06377)",
    "data2vec2": "data2vec 2.0 (arXiv 2212.07525)",
    "conmim": "ConMIM (arXiv 2205.09616)",
    "capi": "CAPI (arXiv 2502.08769)",
}


def pretraining_card(
    name: str,
    objective: str,
    facts: Mapping[str, object],
    licence: Licence,
    config: MimRefinerConfig,
    start: str = "",
) -> str:
    """The card of an encoder that was pre-trained here, in Markdown; it claims no score.

    Args:
        objective: method of the recipe.
        facts: how it was trained, by what they are of.
        licence: of the weights that it was trained from.
        config: of the encoder.
        start: these weights, as they were named; empty for fresh ones.
    """
    more = dict(licence.metadata())
    if is_hub_name(start):
        more |= {"base_model": start, "base_model_relation": "finetune"}
    method = _METHODS.get(objective, objective)
    lines = [f"- **{fact}:** {plain(str(value))}" for fact, value in facts.items()]
    lines.append(licence_line(licence, start))
    begun = f"from the weights of {plain(start)}" if start else "from fresh weights"

    parts = [
        f"---\n{card_metadata(**more).to_yaml()}\n---\n# {plain(name)}",
        f"A plain ViT, pre-trained {begun} on images without labels by {method}. "
        "Nothing was measured, so this card claims no score.",
        "\n".join(lines),
        "## How to use",
        ways_to_use(REPO_PLACEHOLDER, config),
    ]
    return "\n\n".join(parts) + "\n"
