"""Libraries that are to say nothing for a while.

with without_bars():
    model.save_pretrained(folder)       # no "Writing model shards" between the results
"""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging as transformers_logging


@contextmanager
def without_bars() -> Iterator[None]:
    """Within, transformers and huggingface_hub draw no progress bars; afterwards as before."""
    shown = transformers_logging.is_progress_bar_enabled()
    hub_shows_none = are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
        if hub_shows_none:
            disable_progress_bars()
