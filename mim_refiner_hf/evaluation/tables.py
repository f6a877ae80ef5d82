"""Scores as tables: before beside after, in plain text for a terminal and in Markdown for reports and cards.

print(comparison_table(before.metrics, after.metrics))
print(report_table(report))                                # `report` as `evaluate` returns it; with errors and verdicts
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..runtime.text import plain

# Every scalar metric, in the order of the tables: name for readers, and whether it is a fraction of 1
METRICS: dict[str, tuple[str, bool]] = {
    "knn_accuracy": ("k-NN accuracy (k=10)", True),
    "cluster_accuracy": ("cluster accuracy", True),
    "nmi": ("NMI", True),
    "ami": ("AMI", True),
    "ari": ("ARI", True),
    "cluster_accuracy_mean": ("cluster accuracy, mean over runs", True),
    "nmi_mean": ("NMI, mean over runs", True),
    "rankme": ("RankMe (no labels needed)", False),
    "neighbour_agreement": (
        "agreement of neighbours under augmentation (no labels needed)",
        True,
    ),  # `block_analysis.neighbour_agreement`
    "silhouette": ("silhouette of the groups (no labels needed)", False),
}


def format_metric(name: str, value: float) -> str:
    """A fraction as a percentage, anything else with one decimal, or three below 1."""
    return (
        f"{100 * value:.1f} %" if METRICS[name][1] else f"{value:.{1 if abs(value) >= 1 else 3}f}"
    )


def format_change(name: str, before: float, after: float) -> str:
    """The signed difference; percentage points for fractions."""
    change = after - before
    return (
        f"{100 * change:+.1f} points"
        if METRICS[name][1]
        else f"{change:+.{1 if max(abs(before), abs(after)) >= 1 else 3}f}"
    )


def comparison_rows(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[tuple[str, str, str, str]]:
    """(name, before, after, change) of every scalar metric that both sides have, as text."""
    rows = []
    for name, (label, _) in METRICS.items():
        if name in before and name in after:
            old, new = before[name], after[name]
            rows.append(
                (
                    label,
                    format_metric(name, old),
                    format_metric(name, new),
                    format_change(name, old, new),
                )
            )
    return rows


def comparison_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The metrics of two evaluations as an aligned plain-text table: metric, before, after, change."""
    rows = [("metric", "before", "after", "change"), *comparison_rows(before, after)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    aligned = (str.ljust, str.rjust, str.rjust, str.rjust)
    lines = [
        "  ".join(
            align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a Markdown table, the first row its head; all columns but the first to the right."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def score_rows(
    report: Mapping[str, Any], labels: Mapping[str, str], against: str
) -> list[list[str]]:
    """The scores of `labels` (name -> what to call it) that were measured: a head and a row for each."""
    before, after, changes = report["before"], report["after"], report["changes"]

    def cell(metrics: Mapping[str, Any], name: str) -> str:
        text = (
            format_metric(name, metrics[name])
            if name in METRICS
            else f"{100 * metrics[name]:.1f} %"
        )
        error = metrics.get(f"{name}_standard_error")
        scale, digits = (1, 3) if name == "silhouette" else (100, 1)
        return text if error is None else f"{text} ± {scale * error:.{digits}f}"

    def row(name: str, label: str) -> list[str]:
        if before is None:
            return [label, cell(after, name)]
        sides = [label, cell(before, name), cell(after, name)]
        if name not in changes:
            return [*sides, "", "not judged"]
        low, value, high = (
            f"{100 * changes[name][key]:+.1f}" for key in ("low", "difference", "high")
        )
        return [*sides, f"{value} ({low} to {high})", changes[name]["verdict"]]

    head = (
        ["metric", "this model"]
        if before is None
        else ["metric", against, "this model", "change (95 %)", "verdict"]
    )
    shown = [name for name in labels if name in after and (before is None or name in before)]
    return [head, *(row(name, labels[name]) for name in shown)]


def protocol_labels(after: Mapping[str, Any]) -> dict[str, str]:
    """What to call the scores of the added protocols: those with an error that are no metrics of every evaluation."""
    names = [
        name.removesuffix("_standard_error") for name in after if name.endswith("_standard_error")
    ]
    return {
        name: name.removesuffix("_accuracy").replace("_", " ")
        for name in names
        if name not in METRICS
    }


def report_table(report: Mapping[str, Any], against: str | None = None) -> str:
    """Every score as a Markdown table; with `before`, the change, its 95 % interval and the verdict.

    `against` is what to call the other model, in Markdown; None for its name.
    """
    labels = {name: label for name, (label, _) in METRICS.items()} | protocol_labels(
        report["after"]
    )
    return markdown_table(score_rows(report, labels, against or plain(report["against"])))


__all__ = [
    "METRICS",
    "comparison_rows",
    "comparison_table",
    "format_metric",
    "protocol_labels",
    "report_table",
]
