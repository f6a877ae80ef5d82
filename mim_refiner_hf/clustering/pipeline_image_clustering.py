"""Unlabelled images to groups: `pipeline("image-clustering")`.

    import mim_refiner_hf              # or, without the package, `trust_remote_code=True` below
    from transformers import pipeline
    pipe = pipeline("image-clustering", model="outputs/quickstart/model")
    groups = pipe("photos/", num_clusters=None)
    groups[0]                          # {"image": "photos/a.jpg", "index": 0, "cluster": 2, ...}
    pipe.summary["num_clusters"], pipe.summary["reason"]    # how many groups, and why

    pipe("new_photos/", clustering=pipe.clustering)         # into the same groups
    pipe("photos/", num_clusters=12, method="heads")        # by cluster heads, not k-means

Every image gets a group and a confidence. Features are what the paper clusters (MIM-Refiner, Sec.
5.2): the pooled raw output of the last block, L2-normalised; of encoders that are not ours,
`pooler_output`. Images are decoded as everywhere in the package: `decoding.py`. This file travels
with every saved model: it imports only what transformers needs itself, and its flat neighbours.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor, Pipeline
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .channels import Picture, blank, check_channels
from .cluster_count import Entry, Proposal, propose_num_clusters
from .cluster_heads import train_heads
from .image_items import Images, find_items
from .k_means import Clustering, kmeans

TASK = "image-clustering"
METHODS: dict[str, Callable[..., Clustering]] = {"kmeans": kmeans, "heads": train_heads}

_FEWEST_GROUPS = {"kmeans": 1, "heads": 2}
_BATCH_SIZE = 32
# groups that the rule of thumb sqrt(n / 2) gives at most
_MAX_GUESS = 20

# What config.json says about the code beside it. An auto_map in preprocessor_config.json would make
# `pipeline()` look for a video processor there and ask users of the package whether to run custom
# code. The package's MimRefinerConfig ignores `custom_pipelines`, which would oblige its users to
# trust the code in the folder.
_AUTO_MAP: dict[str, str | list[str]] = {
    "AutoConfig": "configuration_mim_refiner.MimRefinerConfig",
    "AutoModel": "modeling_mim_refiner.MimRefinerModel",
    "AutoModelForImageClassification": "modeling_mim_refiner.MimRefinerForImageClassification",
    "AutoBackbone": "modeling_mim_refiner.MimRefinerBackbone",
    "AutoImageProcessor": [
        "image_processing_mim_refiner.MimRefinerImageProcessorPil",
        "image_processing_mim_refiner.MimRefinerImageProcessor",
    ],
}
_CUSTOM_PIPELINES = {
    TASK: {
        "impl": "pipeline_image_clustering.ImageClusteringPipeline",
        "pt": ["AutoModel"],
        "type": "image",
    }
}


def announce_code(folder: Path, **settings: Any) -> None:
    """Name the Python files that lie in a saved model's folder in its `config.json`.

    Further `settings` are written beside them.
    """
    code = {"auto_map": _AUTO_MAP, "custom_pipelines": _CUSTOM_PIPELINES}
    _change_json(folder / "config.json", {**code, **settings})

    # without a named type AutoImageProcessor goes by config.json: the registered class, or the
    # auto_map there
    path = folder / "preprocessor_config.json"
    _change_json(path, {"image_processor_type": None, "auto_map": None})


def _change_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Write `changes` into a JSON object in a file; None removes a key."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(changes)
    for key, value in changes.items():
        if value is None:
            del content[key]
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_num_clusters(
    num_clusters: int | None,
    num_images: int,
    method: str = "kmeans",
    name: str = "num_clusters",
) -> None:
    """A ValueError unless `method` can put that many images into that many groups.

    None for `num_clusters` asks for a proposal. `name` is what the message calls it.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed are {', '.join(map(repr, METHODS))}.")
    if num_images == 0:
        raise ValueError("There are no images, so there is nothing to group.")

    least = _FEWEST_GROUPS[method]
    whole = isinstance(num_clusters, Integral) and not isinstance(num_clusters, bool)
    if num_clusters is not None and not whole:
        raise ValueError(
            f"{name} is {str(num_clusters)[:40]!r}, a {type(num_clusters).__name__}; it must be a "
            "whole number, or left out."
        )
    if num_clusters is not None and not least <= num_clusters <= num_images:
        allowed = f"{least} to {num_images} with method {method!r}, or leave it out"
        raise ValueError(
            f"{name} is {num_clusters} for {num_images} images; allowed are {allowed}."
        )


def refuse_infinite(features: Tensor, names: Sequence[Any]) -> None:
    """A ValueError that names the first image whose features (N, D) are not finite, or too large.

    Too large are those whose length overflows.
    """
    wrong = (~features.norm(dim=1).isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"The features of {len(wrong)} of {len(features)} images are not finite, "
            f"first those of {names[wrong[0]]}: the model's weights are broken, "
            "or overflow in half precision (then load it with dtype=torch.float32)."
        )


def largest_first(clustering: Clustering) -> Clustering:
    """The same groups, numbered by falling size; groups without an image are dropped."""
    counts = clustering.counts
    filled = int((counts > 0).sum())
    order = counts.argsort(descending=True, stable=True)[:filled]
    number = torch.full_like(counts, -1)
    number[order] = torch.arange(filled)
    return clustering.joined(number)


def find_groups(
    features: Tensor, num_clusters: int | None, seed: int, method: str
) -> tuple[Clustering, Proposal]:
    """Groups of features (N, D), as many as asked for or as proposed, and why so many."""
    why = Proposal(num_clusters, None, True, "as asked for", [])
    if num_clusters is None:
        why = propose_num_clusters(features, seed=seed)
        guess = min(max(round(math.sqrt(len(features) / 2)), _FEWEST_GROUPS[method]), _MAX_GUESS)
        num_clusters = why.num_clusters or guess
        if not why.clear:
            source = "the best guess" if why.num_clusters else "a rule of thumb, sqrt(n / 2)"
            reason = f"no clear answer ({why.reason}); {num_clusters} is {source}"
            why = replace(why, reason=reason)

    clustering = largest_first(METHODS[method](features, num_clusters, seed=seed))
    filled = len(clustering.centroids)
    empty = num_clusters - filled
    if empty:
        left_out = f"; {empty} of {num_clusters} groups have no image and are left out"
        why = replace(why, reason=why.reason + left_out)
    return clustering, replace(why, num_clusters=filled)


def processor_of(model: Any) -> Any:
    """The image processor that belongs to a model object; None where there is none.

    It is the one attached to it (`load_encoder` does that), or the one saved under the name that
    the model was loaded by.
    """
    attached = vars(model).get("image_processor")
    name = model.config.name_or_path
    if attached is not None or not name:
        return attached
    # ours knows its own class, which `Auto` would find by the code in the folder
    if hasattr(model, "own_image_processor"):
        return model.own_image_processor()
    return AutoImageProcessor.from_pretrained(name)


class ImageInGroup(TypedDict):
    """One readable image: what the caller knows it by, its place, its group, the confidence."""

    image: Any
    index: int
    cluster: int
    score: float


class UnreadImage(TypedDict):
    """One image that cannot be read, and why."""

    index: int
    image: Any
    error: str


class Summary(TypedDict):
    """What a call of the pipeline found; see `ImageClusteringPipeline` and `Proposal`."""

    num_images: int
    sizes: list[int]
    exemplars: list[list[int]]
    broken: list[UnreadImage]
    num_clusters: int | None
    interval: tuple[int, int] | None
    clear: bool
    reason: str
    evidence: list[Entry]


class ImageClusteringPipeline(Pipeline):
    """Groups of alike images, see the file's docstring.

    Attributes, set by each call:
        summary: "num_images", "num_clusters", "sizes" (largest group first), "exemplars" (per group
            up to 9 places in the returned list, most typical first), "broken" ("index", "image" and
            "error" of each image that cannot be read), and about the number of groups "clear"
            (False: there was no clear answer), "reason", "interval", "evidence".
        clustering: the groups; `clustering.save(path)` keeps them for later images.
        features: (N, D) fp32, one row per returned image.
    """

    # what messages call this argument
    number_called = "num_clusters"

    _load_processor = False  # type: ignore[assignment]
    # None: where none can be loaded, as of a model object, the model is asked
    _load_image_processor = None
    _load_video_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    model: Any
    image_processor: Any
    summary: Summary
    clustering: Clustering
    features: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.image_processor is None:
            self.image_processor = processor_of(self.model)
        if self.model.main_input_name != "pixel_values" or self.image_processor is None:
            raise ValueError(
                f"{type(self.model).__name__} is no image encoder with an image processor, "
                f"which {TASK} needs; give a model of images."
            )
        check_channels(self.num_channels)
        self.model.eval()

    @property
    def num_channels(self) -> int:
        """Channels of the images that the model reads."""
        return int(getattr(self.model.config, "num_channels", 3))

    def _sanitize_parameters(
        self, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if kwargs:
            raise ValueError(
                f"{TASK} knows no {', '.join(kwargs)}; "
                "num_clusters, method, clustering and seed belong to the call."
            )
        return {}, {}, {}

    def preprocess(self, input_: Picture | str) -> dict[str, Any]:  # type: ignore[override]
        """An image to pixel_values (1, C, H, W); a broken one to black ones, with its "error"."""
        error = input_ if isinstance(input_, str) else ""
        image = blank(self.num_channels) if error else input_
        pixel_values = self.image_processor(image, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values.to(self.dtype), "error": error}

    def _forward(self, input_tensors: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        pixel_values = input_tensors["pixel_values"]
        error = input_tensors["error"]
        config = self.model.config
        if hasattr(self.model, "pool") and config.pooling not in ("attention", "global_repr"):
            depth = config.num_hidden_layers
            outputs = self.model(pixel_values, output_hidden_states=[depth])
            return {"features": self.model.pool(outputs.hidden_states[depth]), "error": error}

        features = getattr(self.model(pixel_values), "pooler_output", None)
        if features is None:
            raise ValueError(
                f"{type(self.model).__name__} gives no pooler_output, one vector per image, "
                f"which {TASK} needs; "
                "`mim_refiner_hf.load_encoder` makes an encoder that does of most checkpoints."
            )
        return {"features": features.flatten(1), "error": error}

    def postprocess(  # type: ignore[override]
        self, model_outputs: dict[str, Any]
    ) -> tuple[Tensor, str]:
        """Features (1, D) and the error of one image."""
        return model_outputs["features"].float(), model_outputs["error"]

    def encode(
        self, items: Sequence[Any], **settings: Any
    ) -> tuple[Tensor, list[int], list[UnreadImage]]:
        """Features (N, D) of the readable images, their places in `items`, and the broken ones."""
        rows: list[Tensor] = []
        kept: list[int] = []
        broken: list[UnreadImage] = []
        outputs = super().__call__(Images(items, self.num_channels), **settings)
        bar = logging.tqdm(outputs, total=len(items), desc="features", unit="image")
        for index, (row, error) in enumerate(bar):
            if error:
                broken.append({"index": index, "image": self.name_of(items, index), "error": error})
            else:
                rows.append(row)
                kept.append(index)

        if not rows:
            first = broken[0]
            raise ValueError(
                f"None of the {len(items)} images can be read; "
                f"the first, {first['image']}: {first['error']}"
            )
        return torch.cat(rows), kept, broken

    @staticmethod
    def name_of(items: Sequence[Any], index: int) -> Any:
        """How the caller knows an image: the path, URL or PIL image, or its place among others."""
        if not isinstance(items, list | tuple):
            return index
        item = items[index]
        return index if isinstance(item, tuple | dict | bytes | np.ndarray | Tensor) else item

    def __call__(  # type: ignore[override]
        self,
        images: Any,
        *,
        num_clusters: int | None = None,
        method: str = "kmeans",
        clustering: Clustering | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        num_workers: int | None = None,
    ) -> list[ImageInGroup]:
        """Put every image into a group.

        Args:
            images: a folder (read at any depth), a list of paths, URLs, PIL images or arrays, or a
                data set: rows of `datasets`, or anything with a length whose items are images or
                begin with one.
            num_clusters: number of groups; None to have it proposed from the images.
            method: "kmeans", or "heads": cluster heads, slower (`cluster_heads.train_heads`;
                benchmarks/results/cluster-heads.md of the package says where they are better).
                Groups that they leave empty are dropped, with a warning.
            clustering: groups of an earlier call, to sort these images into.
            seed: of everything random.
            batch_size: images per forward pass, 32 unless the pipeline was made with another.
            num_workers: processes that decode.

        Returns:
            One entry per readable image, in the order given: "image" (path, URL or PIL image as
            given; of a data set the row), "index" (its place among those given), "cluster" (0 is
            the largest group), "score" (confidence in (0, 1]).

        Raises:
            FileNotFoundError: for a path that does not exist.
            ValueError: for no (readable) image, an unknown method, a number of groups that does
                not fit, features that are not finite.
        """
        items = find_items(images)
        name = self.number_called
        # groups of an earlier call have their number
        asked = None if clustering else num_clusters
        check_num_clusters(asked, len(items), method, name)

        batch_size = batch_size or self._batch_size or _BATCH_SIZE
        features, kept, broken = self.encode(items, batch_size=batch_size, num_workers=num_workers)
        names = [self.name_of(items, index) for index in kept]
        refuse_infinite(features, names)

        if clustering is None:
            check_num_clusters(num_clusters, len(kept), method, name)
            clustering, why = find_groups(features, num_clusters, seed, method)
        else:
            assignments, confidence = clustering.assign(features)
            clustering = replace(clustering, assignments=assignments, confidence=confidence)
            why = Proposal(len(clustering.centroids), None, True, "as given", [])

        self._keep(features, clustering, broken, why)
        groups = clustering.assignments.tolist()
        scores = clustering.confidence.tolist()
        rows = zip(names, kept, groups, scores, strict=True)
        return [ImageInGroup(image=i, index=n, cluster=g, score=s) for i, n, g, s in rows]

    def _keep(
        self,
        features: Tensor,
        clustering: Clustering,
        broken: list[UnreadImage],
        why: Proposal,
    ) -> None:
        """Set what the caller may ask for after a call."""
        self.features = features
        self.clustering = clustering

        self.summary = {
            "num_images": len(features),
            "sizes": clustering.counts.tolist(),
            "exemplars": clustering.exemplars(features),
            "broken": broken,
            "num_clusters": why.num_clusters,
            "interval": why.interval,
            "clear": why.clear,
            "reason": why.reason,
            "evidence": why.evidence,
        }

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, **kwargs: Any
    ) -> None:
        """Write model, preprocessing and code: the folder loads with and without the package.

        `kwargs` are those of the model's own `save_pretrained`.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder, **kwargs)
        self.image_processor.save_pretrained(folder)

        if self.model.config.model_type == "mim_refiner":
            # each with the flat files that its own imports
            for part in (self, self.model, self.image_processor):
                custom_object_save(part, folder)
            announce_code(folder)

    save = save_pretrained
