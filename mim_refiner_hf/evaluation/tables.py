"""Scores as tables: before beside after, the same rows in plain text and in Markdown.

print(comparison_table(before.metrics, after.metrics))     # plain text, for a terminal
print(report_table(report))     # Markdown, with errors and verdicts; `report` as `evaluate` gives

Of metrics only the numbers are looked at, not lists such as `knn_per_block`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..runtime.text import plain
from .evidence import JudgedChange


class Metric(NamedTuple):
    """What readers call a metric, whether it is a fraction of 1, and else its decimals.

    `decimals` None: one, or three for numbers below 1.
    """

    label: str
    is_fraction: bool
    decimals: int | None = None


# every scalar metric, in the order of the tables
METRICS = {
    "separation": Metric("separation d' of a photo from others, by a distorted copy", False, 2),
    "retrieval": Metric("finds a photo again from a distorted copy (MRR)", True),
    "cluster_stability": Metric("stability of the groups under distortion (ARI)", True),
    "knn_accuracy": Metric("k-NN accuracy (k=10)", True),
    "cluster_accuracy": Metric("cluster accuracy", True),
    "nmi": Metric("NMI", True),
    "ami": Metric("AMI", True),
    "ari": Metric("ARI", True),
    "cluster_accuracy_mean": Metric("cluster accuracy, mean over runs", True),
    "nmi_mean": Metric("NMI, mean over runs", True),
    "rankme": Metric("RankMe (falls in good runs too; near 0 = collapse)", False),
    "neighbour_agreement": Metric(
        "agreement of neighbours under augmentation (no labels needed)", True
    ),
    "silhouette": Metric("silhouette of the groups (no labels needed)", False),
}


NO_CHANGES: Mapping[str, JudgedChange] = {}
"""Where no change was judged."""


def _is_fraction(name: str) -> bool:
    """Every score of a protocol is a fraction; the others are told by `METRICS`."""
    return name not in METRICS or METRICS[name].is_fraction


def format_metric(name: str, value: float) -> str:
    """A fraction as a percentage, anything else with its decimals."""
    if _is_fraction(name):
        return f"{100 * value:.1f} %"
    return f"{value:.{_decimals(name, value)}f}"


def _decimals(name: str, value: float) -> int:
    """How many decimals tell a value of a metric that is no fraction."""
    stated = METRICS[name].decimals
    if stated is not None:
        return stated
    return 1 if abs(value) >= 1 else 3


def format_change(name: str, before: float, after: float) -> str:
    """The signed difference; percentage points for fractions."""
    change = after - before
    if _is_fraction(name):
        return f"{100 * change:+.1f} points"
    return f"{change:+.{_decimals(name, max(abs(before), abs(after)))}f}"


def _with_interval(name: str, text: str, changes: Mapping[str, JudgedChange]) -> str:
    """A change as text with its 95 % interval, where that is known."""
    if name not in changes:
        return text
    low, high = changes[name]["low"], changes[name]["high"]
    if _is_fraction(name):
        return f"{text} ({100 * low:+.1f} to {100 * high:+.1f})"
    decimals = _decimals(name, max(abs(low), abs(high)))
    return f"{text} ({low:+.{decimals}f} to {high:+.{decimals}f})"


def _with_error(metrics: Mapping[str, float], name: str) -> str:
    """A score as text, with its standard error where it has one."""
    text = format_metric(name, metrics[name])
    error = metrics.get(f"{name}_standard_error")
    if error is None:
        return text
    if not _is_fraction(name):
        return f"{text} ± {error:.{_decimals(name, metrics[name])}f}"
    return f"{text} ± {100 * error:.1f}"


# --- rows -----------------------------------------------------------------------------------------


def protocol_labels(after: Mapping[str, float]) -> dict[str, str]:
    """What to call the scores of the added protocols, by name.

    These are the scores with an error that are no metrics of every evaluation.
    """
    labels = {}
    for key in after:
        name = key.removesuffix("_standard_error")
        if name != key and name not in METRICS:
            labels[name] = name.removesuffix("_accuracy").replace("_", " ")
    return labels


def score_labels(after: Mapping[str, float]) -> dict[str, str]:
    """The scores that were measured, in the order of the tables, and what to call each."""
    measured = {name: metric.label for name, metric in METRICS.items() if name in after}
    return measured | protocol_labels(after)


def _both_sides(
    before: Mapping[str, float], after: Mapping[str, float]
) -> Iterator[tuple[str, str, str, str]]:
    """Name, label, before and after as text, of every score that both sides have."""
    for name, label in score_labels(after).items():
        if name in before:
            yield name, label, _with_error(before, name), _with_error(after, name)


def comparison_rows(
    before: Mapping[str, float],
    after: Mapping[str, float],
    changes: Mapping[str, JudgedChange] = NO_CHANGES,
) -> list[tuple[str, str, str, str]]:
    """(label, before, after, change) of every score that both sides have, as text.

    A change that is among `changes`, as JSON of `Change`, has its 95 % interval beside it.
    """
    rows = []
    for name, label, old, new in _both_sides(before, after):
        change = format_change(name, before[name], after[name])
        rows.append((label, old, new, _with_interval(name, change, changes)))
    return rows


def judged_rows(
    before: Mapping[str, float], after: Mapping[str, float], changes: Mapping[str, JudgedChange]
) -> list[tuple[str, str, str, str, str]]:
    """The same with the 95 % interval of the change, and its verdict.

    `changes` are those of a report.
    """
    rows = []
    for name, label, old, new in _both_sides(before, after):
        change = ""
        verdict = "not judged"
        if name in changes:
            difference = changes[name]["difference"]
            value = format_change(name, 0.0, difference).removesuffix(" points")
            change = _with_interval(name, value, changes)
            verdict = changes[name]["verdict"]
        rows.append((label, old, new, change, verdict))
    return rows


# --- tables ---------------------------------------------------------------------------------------


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned plain text, the first its head; all columns but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table, the first its head; all columns but the first to the right."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def comparison_table(
    before: Mapping[str, float],
    after: Mapping[str, float],
    changes: Mapping[str, JudgedChange] = NO_CHANGES,
    pixels: Mapping[str, float] | None = None,
) -> str:
    """The metrics of two evaluations as plain text: metric, before, after, change.

    `pixels` are scores of the images without an encoder, in a column of their own.
    """
    change = "change (95 %)" if changes else "change"
    rows = [("metric", "before", "after", change), *comparison_rows(before, after, changes)]
    if pixels is None:
        return text_table(rows)

    cells = ["raw pixels"]
    for name, *_ in _both_sides(before, after):
        cell = format_metric(name, pixels[name]) if name in pixels else ""
        cells.append(cell)
    return text_table([(row[0], cell, *row[1:]) for row, cell in zip(rows, cells, strict=True)])


def report_table(report: Mapping[str, Any], against: str | None = None) -> str:
    """Every score of a report as Markdown; with `before`, its change, 95 % interval and verdict.

    `against` is what to call the other model, in Markdown; None for its name.
    """
    before = report["before"]
    after = report["after"]
    if before is None:
        rows = [(label, _with_error(after, name)) for name, label in score_labels(after).items()]
        return markdown_table([("metric", "this model"), *rows])
    name = against or plain(report["against"])
    head = ("metric", name, "this model", "change (95 %)", "verdict")
    return markdown_table([head, *judged_rows(before, after, report["changes"])])
