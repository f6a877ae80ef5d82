"""Features of images from a refined model, and the images most like one of them.

    # the quickstart's model on bundled digits
    python examples/extract_features.py
    # the model of refine_your_own_images.py
    python examples/extract_features.py --model outputs/example/model
    # any model on your images
    python examples/extract_features.py --model user/mae-refined-l16 --images photos/ --query 3

The second takes 15 s on 2 cores, most of it imports (November 2026), and prints

    200 features of 64 numbers -> features.safetensors
    nearest to  row 0 of digits  class 1
         1.000  row 139 of digits  class 1
         1.000  row 106 of digits  class 1
         0.999  row 128 of digits  class 1
         0.999  row 68 of digits  class 8
         0.999  row 52 of digits  class 2

`features.safetensors` holds one tensor, features (N, D), and the names of the images as JSON in its
metadata.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel

import mim_refiner_hf  # noqa: F401  registers the Auto classes
from mim_refiner_hf.data.images import ImageDataset, open_images

QUICKSTART = "outputs/quickstart/model"


@torch.inference_mode()
def extract(name: str, images: ImageDataset, batch_size: int = 64) -> torch.Tensor:
    """(N, D) features: the pooled token (CLS) after the final norm, in the order of the images."""
    # Without this package installed: the same two lines with trust_remote_code=True, and no other
    # change.
    model = AutoModel.from_pretrained(name).eval()
    processor = AutoImageProcessor.from_pretrained(name)  # type: ignore[no-untyped-call]
    features = []
    for start in range(0, len(images), batch_size):
        batch = [images[i].image for i in range(start, min(start + batch_size, len(images)))]
        features.append(model(**processor(batch, return_tensors="pt")).pooler_output)
    return torch.cat(features)


def main() -> int:
    """Extract, save, and print the nearest neighbours of one image."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=QUICKSTART, help="model folder or Hub name")
    parser.add_argument(
        "--images", help="folder of images; left out: 200 bundled handwritten digits"
    )
    parser.add_argument(
        "--query", type=int, default=0, help="number of the image whose neighbours are printed"
    )
    parser.add_argument("--output", type=Path, default=Path("features.safetensors"))
    options = parser.parse_args()
    if options.model == QUICKSTART and not Path(QUICKSTART).is_dir():
        print(
            f"{QUICKSTART} does not exist: run `accelerate launch training/refine.py` first, or"
            " give --model",
            file=sys.stderr,
        )
        return 2
    if options.images:
        images = open_images(options.images)
    else:
        images = open_images("digits", split="test").subset(range(200))
    if not 0 <= options.query < len(images):
        print(
            f"--query {options.query}: there are {len(images)} images, numbered from 0",
            file=sys.stderr,
        )
        return 2

    features = extract(options.model, images)
    names = [images.describe(i) for i in range(len(images))]
    save_file({"features": features}, options.output, metadata={"images": json.dumps(names)})
    print(f"{len(features)} features of {features.shape[1]} numbers -> {options.output}")

    unit = F.normalize(features, dim=1)
    similarity = unit @ unit[options.query]  # cosine, (N,)
    nearest = similarity.topk(min(6, len(images)))
    for place, i in enumerate(nearest.indices.tolist()):
        # the first is the image itself
        heading = f"{similarity[i]:10.3f}" if place else "nearest to"
        label = ""
        if images.class_names is not None:
            label = f"  class {images.class_names[images[i].label]}"
        print(f"{heading}  {names[i]}{label}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
