"""Would the silhouette after UMAP propose a better number of groups? python -m benchmarks.cluster_count_umap [../shared]

Lowe et al. (arXiv 2406.02465) found that the silhouette in a UMAP-reduced space follows the true quality of a clustering. Here it is
asked to choose the number of groups of the real images of `cluster_count_study` (and of its clouds without groups, where a high
value would mislead), alone and in place of the silhouette of the principal components. Needs umap-learn. Writes
benchmarks/results/cluster-count-umap.md.
"""

import argparse
import datetime
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.cluster_count_study import SAMPLES, cases
from mim_refiner_hf.cluster_count import Entry, propose_num_clusters

CLOUDS = 3  # cases without groups
RULES: dict[str, Callable[[Entry], float]] = {
    "ours: stability x silhouette (PCA)": lambda entry: entry["score"],
    "silhouette (UMAP)": lambda entry: entry["silhouette_umap"],
    "stability x silhouette (UMAP)": lambda entry: max(0.0, entry["stability"]) * max(0.0, entry["silhouette_umap"]),
}


def main(shared: Path | None) -> None:
    """Ask about the real cases and some clouds, and write the table."""
    torch.set_num_threads(1)
    lines, began, clouds = list[str](), time.process_time(), 0
    right = dict.fromkeys(RULES, 0)
    real = 0
    for case in cases(shared):
        clouds += case.kind == "no groups"
        if not case.kind.startswith("real") and not (case.kind == "no groups" and clouds <= CLOUDS):
            continue
        proposal = propose_num_clusters(torch.tensor(case.features, dtype=torch.float32), max_samples=SAMPLES)
        found = {name: max(proposal.evidence, key=rule) for name, rule in RULES.items()}
        cells = [f"{entry['k']:.0f} ({rule(entry):.2f})" for entry, rule in zip(found.values(), RULES.values(), strict=True)]
        lines.append(f"| {case.kind}: {case.name} | {case.truth or '-'} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        if case.truth is not None:
            real += 1
            for name, entry in found.items():
                right[name] += abs(entry["k"] - case.truth) <= 0.1 * case.truth
    text = [
        "# Would the silhouette after UMAP propose a better number of groups?",
        "",
        f"{SAMPLES} rows per case; each column: the number with the highest value, and that value. All rules choose among the same",
        "numbers, which are dense around the best of ours only.",
        "",
        "```bash",
        f"pip install umap-learn && python -m benchmarks.cluster_count_umap{' ../shared' if shared else ''}",
        "```",
        "",
        f"| case | classes | {' | '.join(RULES)} |",
        "|---|---|---|---|---|",
        *lines,
        f"| **within 10 % of the classes, of {real}** | | {' | '.join(str(count) for count in right.values())} |",
        "",
        f"{(time.process_time() - began) / 60:.1f} minutes of processor time, {datetime.date.today()}, 1 of {os.cpu_count()} CPU cores "
        f"({platform.machine()}), torch {version('torch')}, umap-learn {version('umap-learn')}",
    ]
    (Path(__file__).parent / "results" / "cluster-count-umap.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path, nargs="?", help="folder with data/cifar10 and models/mae-tiny-cifar10")
    main(parser.parse_args().shared)
