"""The quickstart over seeds as a table.

    python benchmarks/collect_quickstart.py outputs/quickstart outputs/quickstart-seed1 ...

Reads each run's metrics.json and writes benchmarks/results/quickstart.md.
"""

import json
import statistics
import sys
from pathlib import Path

METRICS = {"knn_accuracy": "k-NN", "cluster_accuracy": "cluster ACC", "nmi": "NMI", "ari": "ARI"}


def main(folders: list[str]) -> None:
    """Write the table of the runs in `folders`."""
    runs = [json.loads((Path(folder) / "metrics.json").read_text()) for folder in folders]
    head = " | ".join(METRICS.values())
    lines = [f"| seed | {head} | seconds of training |", f"|---:|{'---:|' * len(METRICS)}---:|"]
    pixels = [f"{100 * runs[0]['pixels'][key]:.1f}" for key in METRICS]
    lines.append(f"| raw pixels | {' | '.join(pixels)} | |")

    for run in runs:
        cells = []
        for key in METRICS:
            cells.append(f"{100 * run['before'][key]:.1f} -> {100 * run['after'][key]:.1f}")
        lines.append(f"| {run['seed']} | {' | '.join(cells)} | {run['seconds']:.0f} |")

    gains = []
    for key in METRICS:
        changes = [100 * (run["after"][key] - run["before"][key]) for run in runs]
        gains.append(f"{statistics.mean(changes):+.1f} ± {statistics.stdev(changes):.1f}")
    lines.append(f"| mean change ± deviation over seeds | {' | '.join(gains)} | |")
    commands = "\n".join(run["command"] for run in runs)
    text = (
        "# The quickstart over seeds\n\nPer cent, before -> after, on 500 held-out digits;"
        f" {runs[0]['hardware']}.\n\n"
    )
    text += f"```bash\n{commands}\n```\n\n"
    text += "The seconds were taken beside other work and are no timings.\n\n"
    versions = ", ".join(f"{name} {number}" for name, number in runs[0]["versions"].items())
    (Path(__file__).parent / "results" / "quickstart.md").write_text(
        text + "\n".join(lines) + f"\n\n{versions}\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
