"""Unlabelled images to groups: `pipeline("image-clustering")`.

    import mim_refiner_hf                                     # or, without the package, `trust_remote_code=True` below
    from transformers import pipeline
    pipe = pipeline("image-clustering", model="outputs/quickstart/model")
    groups = pipe("photos/", num_clusters=None)               # [{"image": "photos/a.jpg", "index": 0, "cluster": 2, "score": 0.93}, ...]
    pipe.summary["num_clusters"], pipe.summary["reason"]      # how many groups, and why
    pipe("new_photos/", clustering=pipe.clustering)           # into the same groups; `clustering.save` and `.load` keep them
    pipe("photos/", num_clusters=12, method="heads")          # by cluster heads in place of k-means

Every image gets a group and a confidence. Features are what the paper clusters (MIM-Refiner, Sec. 5.2): the pooled raw output of
the last block, L2-normalised; of encoders that are not ours, `pooler_output`. This file travels with every saved model, so it
imports only torch, transformers, Pillow, NumPy and its flat neighbours.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save
from transformers.image_utils import load_image
from transformers.utils import logging

from .cluster_count import Proposal, propose_num_clusters
from .cluster_heads import train_heads
from .k_means import Clustering, kmeans

TASK = "image-clustering"
METHODS: dict[str, Callable[..., Clustering]] = {"kmeans": kmeans, "heads": train_heads}
FEWEST = {"kmeans": 1, "heads": 2}  # groups
BATCH_SIZE = 32
MAX_GUESS = 20  # groups of the rule of thumb sqrt(n / 2)
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)

# What config.json says about the code beside it. An auto_map in preprocessor_config.json would make `pipeline()` look for a
# video processor there and ask users of the package whether to run custom code. The package's MimRefinerConfig ignores
# `custom_pipelines`, which would oblige its users to trust the code in the folder.
AUTO_MAP: dict[str, str | list[str]] = {
    "AutoConfig": "configuration_mim_refiner.MimRefinerConfig",
    "AutoModel": "modeling_mim_refiner.MimRefinerModel",
    "AutoModelForImageClassification": "modeling_mim_refiner.MimRefinerForImageClassification",
    "AutoBackbone": "modeling_mim_refiner.MimRefinerBackbone",
    "AutoImageProcessor": [
        "image_processing_mim_refiner.MimRefinerImageProcessorPil",
        "image_processing_mim_refiner.MimRefinerImageProcessor",
    ],
}
CUSTOM_PIPELINES = {
    TASK: {
        "impl": "pipeline_image_clustering.ImageClusteringPipeline",
        "pt": ["AutoModel"],
        "type": "image",
    }
}


def announce_code(folder: Path, **settings: Any) -> None:
    """Name the Python files that lie in a saved model's folder in its `config.json`, beside further `settings`."""
    for name, changes in (
        ("config.json", {"auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES, **settings}),
        # without a named type AutoImageProcessor goes by config.json: the registered class, or the auto_map there
        ("preprocessor_config.json", {"image_processor_type": None, "auto_map": None}),
    ):
        path = folder / name
        content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
        kept = {
            key: value
            for key, value in content.items()
            if key not in changes or changes[key] is not None
        }
        path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def images_at(path: str | Path) -> list[str]:
    """The image files of a folder at any depth, sorted, hidden ones left out; or the one file or URL that `path` is."""
    if str(path).startswith(("http://", "https://")):
        return [str(path)]
    root = Path(path).expanduser()
    if root.is_file():
        return [str(root)]
    if not root.is_dir():
        raise FileNotFoundError(
            f"No file or folder {str(path)!r}; give a folder of images, a list of paths or a data set."
        )
    files = (
        file for file in root.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file()
    )
    found = sorted(
        str(file)
        for file in files
        if not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    if not found:
        raise ValueError(
            f"No images in {root}: looked at every depth for {', '.join(sorted(EXTENSIONS))}."
        )
    return found


def find_items(images: Any) -> Sequence[Any]:
    """What the pipeline was called with as a sequence of paths, URLs, PIL images or rows of a data set, none of it read."""
    if isinstance(images, str | Path):
        return images_at(images)
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, Mapping):
        raise ValueError(
            f"These are {len(images)} sets of images: {', '.join(map(str, images))}; choose one of them."
        )
    if hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        return images
    if isinstance(images, Iterable):
        return list(images)
    raise ValueError(
        f"Images come as a folder, paths, URLs, PIL images or a data set, not as {type(images).__name__}."
    )


def to_image(item: Any, mode: str) -> Image.Image:
    """An upright image of `mode` "RGB" or "L" from a path, a URL, a PIL image, or a row that holds one; transparency is white."""
    if isinstance(item, Mapping):  # a row of `datasets`
        item = next((value for value in item.values() if isinstance(value, Image.Image)), item)
    elif isinstance(item, tuple):  # (image, label) of torchvision, `Sample` of this package
        item = item[0]
    if isinstance(item, str | Path):
        is_file = Path(item).expanduser().is_file()
        item = (
            Image.open(Path(item).expanduser()) if is_file else load_image(str(item), timeout=30.0)
        )
    if not isinstance(item, Image.Image):
        raise ValueError(
            f"{type(item).__name__} is neither a path, a URL nor a PIL image, and holds none"
        )
    image: Image.Image = ImageOps.exif_transpose(item)
    if image.mode.startswith("I;16"):  # `convert` alone would clip
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


class Images(Dataset[Image.Image | str]):
    """Item i: the i-th image, or in its place the sentence that says why it cannot be read."""

    def __init__(self, items: Sequence[Any], mode: str) -> None:
        self.items, self.mode = items, mode

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Image.Image | str:
        try:
            return to_image(self.items[i], self.mode)
        except Exception as error:  # Pillow, the network and data sets each raise their own
            return " ".join(f"{error or type(error).__name__}".split())[:300]


def check_num_clusters(num_clusters: int | None, num_images: int, method: str = "kmeans") -> None:
    """A ValueError unless `method` can put that many images into that many groups; None asks for a proposal."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed are {', '.join(map(repr, METHODS))}.")
    if num_images == 0:
        raise ValueError("There are no images, so there is nothing to group.")
    least = FEWEST[method]
    if num_clusters is not None and not least <= num_clusters <= num_images:
        allowed = f"{least} to {num_images} with method {method!r}, or None"
        raise ValueError(
            f"num_clusters is {num_clusters} for {num_images} images; allowed are {allowed}."
        )


def check_finite(features: Tensor, names: Sequence[Any]) -> None:
    """A ValueError that names the first image whose features (N, D) hold NaN or infinity, or are too large to have a length."""
    wrong = (~features.norm(dim=1).isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"The features of {len(wrong)} of {len(features)} images are not finite, first those of {names[wrong[0]]}: "
            "the model's weights are broken, or overflow in half precision (then load it with dtype=torch.float32)."
        )


def largest_first(clustering: Clustering) -> Clustering:
    """The same groups, numbered by falling size; groups without an image are dropped."""
    order = clustering.counts.argsort(descending=True, stable=True)[
        : int((clustering.counts > 0).sum())
    ]
    number = torch.full_like(clustering.counts, -1)
    number[order] = torch.arange(len(order))
    return clustering.joined(number)


def find_groups(
    features: Tensor, num_clusters: int | None, seed: int, method: str
) -> tuple[Clustering, dict[str, Any]]:
    """Groups of features (N, D), as many as asked for or as proposed, and the facts about their number for the summary."""
    facts: dict[str, Any] = {
        "clear": True,
        "reason": "as asked for",
        "interval": None,
        "evidence": [],
    }
    if num_clusters is None:
        proposal: Proposal = propose_num_clusters(features, seed=seed)
        guess = min(max(round(math.sqrt(len(features) / 2)), FEWEST[method]), MAX_GUESS)
        num_clusters = proposal.num_clusters or guess
        reason = proposal.reason
        if not proposal.clear:
            source = "the best guess" if proposal.num_clusters else "a rule of thumb, sqrt(n / 2)"
            reason = f"no clear answer ({reason}); {num_clusters} is {source}"
        facts = {**vars(proposal), "reason": reason}
    clustering = largest_first(METHODS[method](features, num_clusters, seed=seed))
    if empty := num_clusters - len(clustering.centroids):
        facts["reason"] += f"; {empty} of {num_clusters} groups have no image and are left out"
    return clustering, {**facts, "num_clusters": len(clustering.centroids)}


class ImageClusteringPipeline(Pipeline):
    """Groups of alike images, see the file's docstring.

    Attributes, set by each call:
        summary: "num_images", "num_clusters", "sizes" (largest group first), "exemplars" (per group up to 9 places in the returned
            list, most typical first), "broken" ("index", "image" and "error" of each image that cannot be read), and about the
            number of groups "clear" (False: there was no clear answer), "reason", "interval", "evidence".
        clustering: the groups; `clustering.save(path)` keeps them for later images.
        features: (N, D) fp32, one row per returned image.
    """

    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = True  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    model: Any
    image_processor: Any
    summary: dict[str, Any]
    clustering: Clustering
    features: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        name = type(self.model).__name__
        if self.model.main_input_name != "pixel_values" or self.image_processor is None:
            raise ValueError(
                f"{name} is no image encoder with an image processor, which {TASK} needs; give a model of images."
            )
        self.model.eval()

    @property
    def mode(self) -> str:
        """Pillow's name for the channels that the model reads."""
        return "L" if getattr(self.model.config, "num_channels", 3) == 1 else "RGB"

    def _sanitize_parameters(
        self, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if kwargs:
            raise ValueError(
                f"{TASK} knows no {', '.join(kwargs)}; num_clusters, method, clustering and seed belong to the call."
            )
        return {}, {}, {}

    def preprocess(self, input_: Image.Image | str) -> dict[str, Any]:  # type: ignore[override]
        """An image to pixel_values (1, C, H, W); a broken one to black ones, with the reason under "error"."""
        error = input_ if isinstance(input_, str) else ""
        image = Image.new(self.mode, (8, 8)) if error else input_
        pixel_values = self.image_processor(image, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values.to(self.dtype), "error": error}

    def _forward(self, input_tensors: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        pixel_values, error = input_tensors["pixel_values"], input_tensors["error"]
        config = self.model.config
        if hasattr(self.model, "pool") and config.pooling != "global_repr":
            depth = config.num_hidden_layers
            outputs = self.model(pixel_values, output_hidden_states=[depth])
            return {"features": self.model.pool(outputs.hidden_states[depth]), "error": error}
        features = getattr(self.model(pixel_values), "pooler_output", None)
        if features is None:
            raise ValueError(
                f"{type(self.model).__name__} gives no pooler_output, one vector per image, which {TASK} needs; "
                "`mim_refiner_hf.load_encoder` makes an encoder that does of most checkpoints."
            )
        return {"features": features.flatten(1), "error": error}

    def postprocess(self, model_outputs: dict[str, Any]) -> tuple[Tensor, str]:  # type: ignore[override]
        """Features (1, D) and the error of one image."""
        return model_outputs["features"].float(), model_outputs["error"]

    def encode(
        self, items: Sequence[Any], **settings: Any
    ) -> tuple[Tensor, list[int], list[dict[str, Any]]]:
        """Features (N, D) of the readable images, their places in `items`, and the entries of the broken ones."""
        rows: list[Tensor] = []
        kept: list[int] = []
        broken: list[dict[str, Any]] = []
        outputs = super().__call__(Images(items, self.mode), **settings)
        for index, (row, error) in enumerate(
            logging.tqdm(outputs, total=len(items), desc="features", unit="image")
        ):
            if error:
                broken.append({"index": index, "image": self.name_of(items, index), "error": error})
            else:
                rows.append(row)
                kept.append(index)
        if not rows:
            raise ValueError(
                f"None of the {len(items)} images can be read; the first, {broken[0]['image']}: {broken[0]['error']}"
            )
        return torch.cat(rows), kept, broken

    @staticmethod
    def name_of(items: Sequence[Any], index: int) -> Any:
        """How the caller knows an image: the path, URL or PIL image of a list, or the row of a data set."""
        return (
            items[index]
            if isinstance(items, list | tuple) and not isinstance(items[index], tuple | dict)
            else index
        )

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
    ) -> list[dict[str, Any]]:
        """Put every image into a group.

        Args:
            images: a folder (read at any depth), a list of paths, URLs or PIL images, or a data set: rows of `datasets`, or
                anything with a length whose items are images or begin with one.
            num_clusters: number of groups; None to have it proposed from the images.
            method: "kmeans", or "heads": cluster heads, slower (`cluster_heads.train_heads`; benchmarks/results/cluster-heads.md
                of the package says where they are better). Groups that they leave empty are dropped, with a warning.
            clustering: groups of an earlier call, to sort these images into.
            seed: of everything random.
            batch_size: images per forward pass, 32 unless the pipeline was made with another; `num_workers` processes decode.

        Returns:
            One entry per readable image, in the order given: "image" (path, URL or PIL image as given; of a data set the row),
            "index" (its place among those given), "cluster" (0 is the largest group), "score" (confidence in (0, 1]).

        Raises:
            FileNotFoundError: for a path that does not exist.
            ValueError: for no (readable) image, an unknown method, a number of groups that does not fit, features that are not
                finite.
        """
        items = find_items(images)
        check_num_clusters(None if clustering else num_clusters, len(items), method)
        batch_size = batch_size or self._batch_size or BATCH_SIZE
        features, kept, broken = self.encode(items, batch_size=batch_size, num_workers=num_workers)
        names = [self.name_of(items, index) for index in kept]
        check_finite(features, names)
        if clustering is not None:
            assignments, confidence = clustering.assign(features)
            clustering = replace(clustering, assignments=assignments, confidence=confidence)
            facts: dict[str, Any] = {
                "clear": True,
                "reason": "as given",
                "num_clusters": len(clustering.centroids),
            }
        else:
            check_num_clusters(num_clusters, len(kept), method)
            clustering, facts = find_groups(features, num_clusters, seed, method)
        self.features, self.clustering = features, clustering
        sizes = clustering.assignments.bincount(minlength=len(clustering.centroids)).tolist()
        exemplars = clustering.exemplars(features)
        self.summary = {
            "num_images": len(kept),
            "sizes": sizes,
            "exemplars": exemplars,
            "broken": broken,
            **facts,
        }
        entries = zip(
            names,
            kept,
            clustering.assignments.tolist(),
            clustering.confidence.tolist(),
            strict=True,
        )
        return [
            {"image": name, "index": index, "cluster": group, "score": score}
            for name, index, group, score in entries
        ]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write model (`kwargs` as in its own `save_pretrained`), preprocessing and code: the folder loads with and without the package."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder, **kwargs)
        self.image_processor.save_pretrained(folder)
        if self.model.config.model_type == "mim_refiner":
            for part in (
                self,
                self.model,
                self.image_processor,
            ):  # each with the flat files that its own imports
                custom_object_save(part, folder)
            announce_code(folder)

    save = save_pretrained


__all__ = ["ImageClusteringPipeline", "announce_code", "check_num_clusters"]
