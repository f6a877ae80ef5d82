"""Which loggers a run may report to, by name; nothing of them is imported here."""

from .wording import setting

LOGGERS = ("tensorboard", "wandb", "trackio")


def logger_names(report_to: str) -> list[str]:
    """The names of `report_to`, which stand between commas; none for "none".

    Raises:
        ValueError: for one that there is not.
    """
    named = [name.strip() for name in report_to.split(",")]
    names = [name for name in named if name not in ("", "none")]
    if not set(names) <= set(LOGGERS):
        allowed = f"allowed are {', '.join(LOGGERS)} (comma-separated), or none"
        raise ValueError(f"{setting('report_to', report_to)}: {allowed}")
    return names
