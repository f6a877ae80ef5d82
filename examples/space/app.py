"""A web page that groups images without labels, and refines an encoder on a visitor's own.

    pip install -e ".[space]"
    python examples/space/app.py            # then open the address that it prints
    python examples/space/app.py --after out/model --before facebook/vit-mae-large
    python examples/space/app.py --sample cats=photos/cats

A visitor drops images, or chooses a sample set. Without `--after` the page shows the quickstart's
encoder, and what it was refined from; where `outputs/quickstart/` has no result, the quickstart
runs first: about 4 minutes on 2 cores, no download. Without `--before` the page shows one side.
Models are whatever `load_encoder` takes: model folders, Hub names, original checkpoints. On the
Hub, where a Space has no command line, the variables MODEL_AFTER, MODEL_BEFORE and SAMPLES
("cats=photos/cats food=user/food") say the same. The port is GRADIO_SERVER_PORT, or the first free
one from 7860 on.

"Refine on these images" refines the encoder on the left on what a visitor dropped, and shows the
verdict: better than the start or not, by which numbers. The model can be downloaded if it is. A run
that would take more than 15 minutes here is refused after its first steps.

Shown for each side: the groups, most confident images first, a map of all images, and scores with
errors and a verdict; with labels cluster accuracy, NMI and k-NN accuracy, without them RankMe and
the agreement of neighbours. `groups.csv` and one self-contained page per side can be downloaded.
The three endpoints, `/sample`, `/upload` and `/refine`, can be called from Python:

    from gradio_client import Client, handle_file
    client = Client("http://127.0.0.1:7860")
    # a number of groups, or 0 to have it proposed
    *_, numbers = client.predict("digits", 10, api_name="/sample")
    files = [handle_file("a.jpg"), handle_file("b.jpg")]
    *_, numbers = client.predict(files, 0, api_name="/upload")
    *_, numbers = client.predict(files, 0, api_name="/refine")
    numbers["verdict"]["outcome"]

What is shown is made by `comparison.py`. Nothing is kept: files are deleted within an hour, users
share nothing but the models, and no statistics leave the machine.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from comparison import (
    SIDES,
    Collection,
    Grouping,
    group_images,
    legend,
    show_note,
    show_scores,
    show_side,
    show_verdict,
    write_downloads,
)

from mim_refiner_hf import load_encoder, read_recipe, refine
from mim_refiner_hf.data.broken import readable
from mim_refiner_hf.data.images import ImageDataset, evenly_spaced, open_images
from mim_refiner_hf.data.sources import Entries, FoundImages
from mim_refiner_hf.publishing.cluster_folder import load_thumbnail
from mim_refiner_hf.runs.verdict import LEAST_PHOTOS
from mim_refiner_hf.runtime.text import spelt_out

QUICKSTART = Path("outputs/quickstart")
# of one upload, and of one file: a free Space has 2 cores
MAX_IMAGES = 500
MAX_MEGABYTES = 20
# of a refinement: the others wait meanwhile
MAX_MINUTES = 15
MINUTE = 60
# gradio finds it as the default of an argument
PROGRESS = gr.Progress()
INTRODUCTION = """# Groups without labels
An encoder turns every image into features, and k-means puts alike images into one group. No label
is used; where there are labels, they only score the result. On the left the encoder as it was
pre-trained, on the right the same one after [MIM-Refiner](https://arxiv.org/abs/2402.10093)."""


# --- images ----------------------------------------------------------------------------------


def uploaded(files: Sequence[Mapping[str, Any]] | None, num_channels: int) -> Collection:
    """What a user sent, as gradio hands it on: "path" on the server, "orig_name" at the user's.

    Files may be anything.
    """
    paths = [Path(file["path"]) for file in files or ()]
    if not 2 <= len(paths) <= MAX_IMAGES:
        raise ValueError(
            f"{len(paths)} images: give 2 to {MAX_IMAGES}; `mim-refiner cluster` takes any number."
        )

    names = []
    for file in files or ():
        names.append(spelt_out(Path(file.get("orig_name") or file["path"]).name))
    keys = [f"{path.name} {path.stat().st_size}" for path in paths]
    found = FoundImages(paths, None, None, "upload", Entries.of(range(len(paths)), keys))
    return Collection(ImageDataset(found, num_channels=num_channels), names)


def open_samples(samples: Sequence[str], num_channels: int) -> dict[str, Collection]:
    """The digits, and the sets given as NAME=FOLDER.

    Of a set that has too many images, evenly spaced ones are shown.
    """
    found = {"digits": open_images("digits", split="test", num_channels=num_channels)}
    for sample in samples:
        name, equals, folder = sample.partition("=")
        if not (name and equals and folder):
            raise ValueError(
                f"--sample {sample}: give a name and a folder (or a data set of the Hub), such as"
                " cats=photos/cats"
            )
        found[name] = open_images(folder, num_channels=num_channels)

    collections = {}
    for name, images in found.items():
        images = evenly_spaced(images, MAX_IMAGES)
        names = []
        for place in range(len(images)):
            names.append(spelt_out(images.describe(place)).removeprefix(f"{images.name}/"))
        collections[name] = Collection(images, names)
    return collections


# --- the page --------------------------------------------------------------------------------


def tell_progress(
    progress: gr.Progress, side: str, earlier: int, total: int, readings: int, place: int
) -> None:
    """Show the visitor which image of which side is encoded.

    `earlier` of all `readings` were those of the other side.
    """
    progress(0.8 * (earlier + place) / readings, desc=f"{side}: image {place + 1} of {total}")


def compare(
    collection: Collection,
    encoders: Mapping[str, Any],
    num_clusters: float | None,
    progress: gr.Progress,
) -> Iterator[tuple[str, str, str, list[str], dict[str, Any]]]:
    """Group and show the images: note, scores, both sides, downloads, numbers.

    A generator, so that it can clear up afterwards.
    """
    asked = int(num_clusters or 0) or None
    if asked != (num_clusters or None):
        raise ValueError(
            f"The number of groups is {num_clusters}; give a whole number, or 0 to have it"
            " proposed."
        )

    sides: list[Grouping] = []
    total = len(collection.images)
    readings = len(encoders) * total
    # the refined encoder proposes a number; the other one takes it, to be comparable
    for name in reversed(list(encoders)):
        tell = partial(tell_progress, progress, SIDES[name], len(sides) * total, total, readings)
        sides.insert(0, group_images(name, encoders[name], collection, asked, tell))
        asked = sides[-1].summary["num_clusters"]

    progress(0.8, desc="Maps and pages")
    found = sides[-1]
    thumbnails = [load_thumbnail(found.images, i) for i in range(len(found.images))]

    with tempfile.TemporaryDirectory(prefix="mim-refiner-space-") as folder:
        columns = "".join(show_side(side, thumbnails, Path(folder)) for side in sides)
        names = ("num_images", "num_clusters", "clear", "reason")
        numbers = {name: found.summary[name] for name in names}
        numbers["broken"] = found.broken_of(collection.names)
        for side in sides:
            numbers[side.side.name] = {**side.side.metrics, "sizes": side.summary["sizes"]}
        downloads = write_downloads(Path(folder), sides, thumbnails)
        yield (
            show_note(found, collection.names),
            show_scores([side.side for side in sides]),
            f'{legend(found)}<div class="sides">{columns}</div>',
            downloads,
            numbers,
        )


def tell_refinement(
    progress: gr.Progress, began: float, step: int | None, values: dict[str, Any]
) -> None:
    """Show the visitor how far the refinement is; ValueError where it would take too long.

    `began` is its start by `time.monotonic`.
    """
    left = values.get("seconds_left")
    if left is None:
        return
    minutes = left / MINUTE
    if minutes > MAX_MINUTES:
        raise ValueError(
            f"Refining would take about {minutes:.0f} minutes here, and {MAX_MINUTES} are allowed;"
            " give fewer or smaller images, or use `mim-refiner refine` on a machine of yours."
        )
    passed = time.monotonic() - began
    # the rest of the bar is for the groups
    share = 0.7 * passed / (passed + left)
    progress(share, desc=f"Refining: step {step}, about {minutes:.1f} minutes left")


def refine_here(
    collection: Collection,
    encoders: Mapping[str, Any],
    num_clusters: float | None,
    progress: gr.Progress,
) -> Iterator[tuple[Any, ...]]:
    """Refine the first encoder on the images, then `compare` it with what comes out.

    The verdict stands in place of the scores; the model is among the downloads if it is better.
    """
    start = next(iter(encoders.values()))
    progress(0, desc="Looking at the images")
    images, _ = readable(collection.images)
    if len(images) < LEAST_PHOTOS:
        raise ValueError(
            f"{len(images)} images that can be read: refining takes {LEAST_PHOTOS} or more, or"
            " nothing could be said about the result."
        )

    with tempfile.TemporaryDirectory(prefix="mim-refiner-space-") as folder:
        result = refine(
            images,
            model=start,
            output_dir=f"{folder}/run",
            num_workers=0,
            report_to="none",
            callbacks=partial(tell_refinement, progress, time.monotonic()),
        )
        assert result is not None
        verdict = result.verdict
        sides = {"before": start, "after": result.refined}
        with closing(compare(collection, sides, num_clusters, progress)) as compared:
            note, _, shown, downloads, numbers = next(compared)
            if verdict.outcome == "better":
                model = shutil.make_archive(f"{folder}/model", "zip", f"{folder}/run/model")
                downloads = [model, *downloads]
            numbers["verdict"] = {"outcome": verdict.outcome, **verdict.as_json()}
            yield note, show_verdict(verdict), shown, downloads, numbers


def answer(
    work: Callable[..., Iterator[tuple[Any, ...]]], collection: Collection, *settings: Any
) -> Iterator[tuple[Any, ...]]:
    """`compare` or `refine_here`, with wrong input said to the user in one sentence.

    gradio shows messages as HTML, so names are escaped.
    """
    try:
        yield from work(collection, *settings)
    except (ValueError, FloatingPointError) as error:
        message = escape(collection.without_paths(str(error)), quote=False)
        raise gr.Error(message, print_exception=False) from error


def build_page(encoders: Mapping[str, Any], samples: Mapping[str, Collection]) -> gr.Blocks:
    """The page and its endpoints; at most one request computes at a time, the others queue."""
    num_channels = encoders["after"].config.num_channels

    def from_sample(
        name: str, num_clusters: float | None, progress: gr.Progress = PROGRESS
    ) -> Iterator[tuple[Any, ...]]:
        yield from answer(compare, samples[name], encoders, num_clusters, progress)

    def opened(files: list[dict[str, Any]] | None) -> Collection:
        try:
            return uploaded(files, num_channels)
        except ValueError as error:
            raise gr.Error(escape(str(error), quote=False), print_exception=False) from error

    def from_upload(
        files: list[dict[str, Any]] | None,
        num_clusters: float | None,
        progress: gr.Progress = PROGRESS,
    ) -> Iterator[tuple[Any, ...]]:
        yield from answer(compare, opened(files), encoders, num_clusters, progress)

    def refined(
        files: list[dict[str, Any]] | None,
        num_clusters: float | None,
        progress: gr.Progress = PROGRESS,
    ) -> Iterator[tuple[Any, ...]]:
        yield from answer(refine_here, opened(files), encoders, num_clusters, progress)

    with gr.Blocks(
        title="Groups without labels",
        analytics_enabled=False,
        delete_cache=(10 * MINUTE, 50 * MINUTE),
    ) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=3), gr.Tabs():
                with gr.Tab("Sample set"):
                    sample = gr.Radio(
                        list(samples),
                        value=next(iter(samples)),
                        label="Images that are here already",
                    )
                    sample_button = gr.Button(
                        "Group this set", variant="primary", elem_id="group-sample"
                    )
                with gr.Tab("Your images"):
                    limits = (
                        f"2 to {MAX_IMAGES} images of any format, {MAX_MEGABYTES} MB each; deleted"
                        f" within an hour; to refine on: {LEAST_PHOTOS} or more,"
                        f" {MAX_MINUTES} minutes at most"
                    )
                    files = gr.File(file_count="multiple", label=limits, height=150)
                    with gr.Row():
                        upload_button = gr.Button(
                            "Group these images", variant="primary", elem_id="group-upload"
                        )
                        refine_button = gr.Button("Refine on these images", elem_id="refine-upload")
            with gr.Column(scale=1, min_width=220):
                info = "0: proposed from the images, with the evidence"
                number = gr.Number(
                    0, label="Number of groups", info=info, minimum=0, maximum=MAX_IMAGES, step=1
                )
        note = gr.HTML(elem_id="note")
        # the whole width: its table has five columns
        scores = gr.Markdown(elem_id="scores", elem_classes="result")
        with gr.Row(elem_classes="result"):
            label = "A table, and a page per side to search and zoom in"
            downloads = gr.File(label=label, file_count="multiple", height=240, interactive=False)
            with gr.Accordion("The numbers as JSON", open=False):
                numbers = gr.JSON(show_label=False)
        sides = gr.HTML(elem_id="sides")
        shared: dict[str, Any] = {
            "outputs": [note, scores, sides, downloads, numbers],
            "show_progress_on": note,
            "concurrency_id": "encoders",
            "concurrency_limit": 1,
        }
        sample_button.click(from_sample, [sample, number], api_name="sample", **shared)
        # not preprocessed: the names that files have at the user's, which gradio drops
        shared["preprocess"] = False
        upload_button.click(from_upload, [files, number], api_name="upload", **shared)
        refine_button.click(refined, [files, number], api_name="refine", **shared)
    return page.queue(max_size=20)


# --- the start -------------------------------------------------------------------------------


def choose_models(before: str | None, after: str | None) -> dict[str, str]:
    """The names of the models by side: those given, or what the quickstart leaves.

    The quickstart is run if it has not been.
    """
    if after is None:
        after = str(QUICKSTART / "model")
        if not Path(after).is_dir():
            print(
                f"{after} does not exist, so the quickstart makes it first: about 4 minutes on 2"
                " cores",
                flush=True,
            )
            refine(read_recipe("quickstart"))
        if before is None and (QUICKSTART / "pretrained").is_dir():
            before = str(QUICKSTART / "pretrained")
    return {"after": after} if before is None else {"before": before, "after": after}


def main(arguments: Sequence[str] | None = None) -> int:
    """Load models and samples, and serve the page until it is interrupted; 2 for a wrong option."""
    environment = os.environ.get
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--after",
        default=environment("MODEL_AFTER"),
        help="the refined model; default: the quickstart's",
    )
    parser.add_argument(
        "--before",
        default=environment("MODEL_BEFORE"),
        help="what it was refined from; default: one side",
    )
    parser.add_argument(
        "--sample",
        action="append",
        default=environment("SAMPLES", "").split(),
        metavar="NAME=FOLDER",
    )
    options = parser.parse_args(arguments)

    try:
        models = choose_models(options.before, options.after)
        encoders = {side: load_encoder(name) for side, name in models.items()}
        channels = {encoder.config.num_channels for encoder in encoders.values()}
        if len(channels) > 1:
            raise ValueError(
                f"--before {options.before}: its number of input channels is not that of the"
                " refined model"
            )
        samples = open_samples(options.sample, channels.pop())
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2

    # no fonts from the network
    theme = gr.themes.Base(
        primary_hue="blue",
        neutral_hue="zinc",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    build_page(encoders, samples).launch(
        theme=theme,
        css_paths=Path(__file__).with_name("style.css"),
        max_file_size=f"{MAX_MEGABYTES}mb",
        share=False,
        ssr_mode=False,
        run_history=False,
        footer_links=["api"],
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
