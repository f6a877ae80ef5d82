"""How a model folder is used, by every library that takes it: the snippets of all model cards.

    text = ways_to_use("user/name", encoder.config)

A card shows what is true of its encoder: of the formats that not every encoder can take, those
whose `refusal` has nothing against it. The words are in `ways_to_use.md.jinja`;
tests/test_ways_to_use.py runs them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from ..conversion.layouts import LAYOUTS
from ..model.configuration_mim_refiner import MimRefinerConfig
from .native_classes import class_of
from .twins import why_not_exported

_TEMPLATE = Path(__file__).with_suffix(".md.jinja")


def family_config(family: str) -> MimRefinerConfig:
    """What the encoders of a family of `LAYOUTS` are, shapes aside: enough to say their formats."""
    settings = {layout.family: layout.settings for layout in LAYOUTS}[family]
    # CrossMAE's, as released, have no final norm; every other layout states whether
    fields: Mapping[str, Any] = {"final_norm": False, **settings}
    return MimRefinerConfig(**fields)


def ways_to_use(name: str, config: MimRefinerConfig, *, local: bool = False) -> str:
    """The snippets as Markdown, from AutoModel to transformers.js.

    Args:
        name: of the repository on the Hub, or of the folder.
        config: of the encoder.
        local: whether `name` is a folder.
    """
    template = jinja2.Template(
        _TEMPLATE.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined
    )
    return template.render(name=name, local=local, twins=_twins(config)).strip()


def _twins(config: MimRefinerConfig) -> list[tuple[str, str]]:
    """(format, what loads it) of the formats that not every encoder can take."""
    twins = []
    kind = class_of(config)
    if not isinstance(kind, str):
        twins.append(("native", f"AutoModel, as {kind.name}"))
    if why_not_exported(config, "timm") is None:
        twins.append(("timm", 'timm.create_model("local-dir:timm-copy", pretrained=True)'))
    return twins
