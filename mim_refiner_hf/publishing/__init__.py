"""From a finished run to a model that others can use: its folder, its card, and the Hub."""

from typing import TYPE_CHECKING

from ..runtime.lazy import lazy_names

if TYPE_CHECKING:
    from .hub import PushError, check_repo_id, push_folder, save_model_folder
    from .model_card import CardData, write_card

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "hub": ["PushError", "check_repo_id", "push_folder", "save_model_folder"],
        "model_card": ["CardData", "write_card"],
    },
)

__all__ = [
    "CardData",
    "PushError",
    "check_repo_id",
    "push_folder",
    "save_model_folder",
    "write_card",
]
