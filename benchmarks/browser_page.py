"""Are groups found in the browser as good as Python's? Accuracy, features, seconds, pictures.

    python -m benchmarks.browser_page ../shared out/js [--screenshots shots/]

Writes the page of the small MAE of CIFAR-10 (`mim-refiner page`; out/js is where npm installed
transformers.js), gives a headless Chromium 300 and 2 000 images as PNG files, and groups the same
files in Python. Prints the tables of benchmarks/results/browser-page.md.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline

from mim_refiner_hf.clustering.pipeline_image_clustering import find_groups
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.evaluation.cluster_scores import cluster_accuracy
from mim_refiner_hf.publishing.browser_site import write_site
from mim_refiner_hf.publishing.convert import convert
from tests.chromium import Chromium, served

COUNTS = (300, 2000)
CLASSES = 10
# images whose features are compared
COMPARED = 64
SIZES = {"wide": 1280, "narrow": 390}
READY = "document.documentElement.dataset.ready"
DONE = "document.documentElement.dataset.groups"
PROBLEM = "document.querySelector('#problem').textContent"
FOUND = """(() => {
    const inside = document.querySelector('iframe').contentDocument;
    const data = JSON.parse(inside.querySelector('#data').textContent);
    return [data.name, data.group, inside.querySelector('header p').textContent];
})()"""
# the worker of the page, once more, for the features that the page keeps to itself
FEATURES = """new Promise(done => {
    const address = new URL('encoder-worker.js', location.href).href;
    const blob = new Blob([`import "${address}";`], { type: 'text/javascript' });
    const worker = new Worker(URL.createObjectURL(blob), { type: 'module' });
    const files = [...document.querySelector('#folder-input').files]
        .sort((one, two) => one.name < two.name ? -1 : 1).slice(0, COUNT);
    const features = [];
    worker.onmessage = ({ data }) => {
        if (data.feature) features[data.index] = [...data.feature];
        if (features.filter(row => row).length === COUNT) done(features);
    };
    worker.postMessage({ load: true });
    worker.postMessage({ batch: files.map((file, index) => ({ index, file })) });
})"""


def write_images(shared: Path, folder: Path, count: int) -> list[int]:
    """The first test images as PNG files, and their classes."""
    images = open_images(str(shared / "data/cifar10/test.parquet")).subset(range(count))
    folder.mkdir(parents=True)
    labels = []
    for place in range(count):
        images[place].image.save(folder / f"{place:05d}.png")
        labels.append(int(images[place].label))
    return labels


def photograph(chromium: Chromium, folder: Path, name: str) -> None:
    """The page wide and narrow, light and dark."""
    for size, width in SIZES.items():
        metrics = {"width": width, "height": 850, "deviceScaleFactor": 1, "mobile": width < 600}
        tell(chromium, "Emulation.setDeviceMetricsOverride", metrics)
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            tell(chromium, "Emulation.setEmulatedMedia", {"features": [feature]})
            time.sleep(1)
            chromium.photograph(f"{name}-{size}-{scheme}", folder)
    tell(chromium, "Emulation.clearDeviceMetricsOverride", {})


def tell(chromium: Chromium, command: str, parameters: dict[str, Any]) -> None:
    """A command of the DevTools protocol."""
    chromium.call("/goog/cdp/execute", {"cmd": command, "params": parameters})


def give_images(chromium: Chromium, folder: Path, groups: int | None) -> float:
    """Give the page a folder; seconds from the files to the groups."""
    chromium.run("location.reload()")
    chromium.wait(READY, 300)
    if groups is not None:
        chromium.type("#number", str(groups))
    began = time.monotonic()
    chromium.type("#folder-input", str(folder))
    chromium.wait(f"{DONE} || {PROBLEM}", 3000)
    assert not chromium.run(PROBLEM), chromium.run(PROBLEM)
    return time.monotonic() - began


def group_again(chromium: Chromium) -> float:
    """Have the number of groups of the same images proposed; seconds."""
    began = time.monotonic()
    chromium.click("#tools button")
    chromium.wait(f"{DONE} || {PROBLEM}", 3000)
    return time.monotonic() - began


def labels_in(chromium: Chromium) -> tuple[list[int], str]:
    """Groups in the order of the names, and the page's note."""
    names, labels, note = chromium.run(FOUND)
    found = dict(zip(names, labels, strict=True))
    return [found[name] for name in sorted(found)], note


def measure(chromium: Chromium, pipe: Any, folder: Path, labels: list[int]) -> None:
    """The rows of one number of images: as many groups as classes, and as many as proposed."""
    for groups in (CLASSES, None):
        seconds = group_again(chromium) if groups is None else give_images(chromium, folder, groups)
        browser, note = labels_in(chromium)

        began = time.monotonic()
        if groups is not None:
            pipe(str(folder), num_clusters=groups)
            python, reason = pipe.clustering.assignments, pipe.summary["reason"]
        else:
            clustering, why = find_groups(pipe.features, None, 0, "kmeans")
            python, reason = clustering.assignments, why.reason
        row = {
            "images": len(labels),
            "asked": groups,
            "browser": round(100 * cluster_accuracy(labels, browser), 2),
            "python": round(100 * cluster_accuracy(labels, python), 2),
            "agree": round(100 * cluster_accuracy(python, browser), 2),
            "browser_seconds": round(seconds, 1),
            "python_seconds": round(time.monotonic() - began, 1),
            "browser_note": note,
            "python_reason": reason,
        }
        print(json.dumps(row), flush=True)

    rows = torch.tensor(chromium.run(FEATURES.replace("COUNT", str(COMPARED))))
    cosines = torch.cosine_similarity(rows, pipe.features[:COMPARED], dim=1)
    worst, mean = float(cosines.min()), float(cosines.mean())
    print(f"cosine of {COMPARED} features: least {worst:.6f}, mean {mean:.6f}", flush=True)


def main() -> None:
    """All rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("transformers_js", type=Path)
    parser.add_argument("--screenshots", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        convert(str(options.shared / "models/mae-tiny-cifar10"), work / "model", license="mit")
        print(write_site(work / "model", work / "site", transformers_js=options.transformers_js))
        pipe = pipeline("image-clustering", model=str(work / "model"))
        chromium = Chromium(work / "profile")
        chromium.call("/timeouts", {"script": 600_000})
        with served(work / "site") as address:
            chromium.call("/url", {"url": f"{address}/"})
            for count in options.counts:
                labels = write_images(options.shared, work / f"photos{count}", count)
                measure(chromium, pipe, work / f"photos{count}", labels)
            print("errors in the console:", chromium.errors())
            if options.screenshots is not None:
                photograph(chromium, options.screenshots, "groups")
        chromium.quit()


if __name__ == "__main__":
    main()
