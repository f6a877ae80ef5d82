"""What every block of an encoder is good for, and which should get a head when it is refined.

    # the quickstart's model on bundled digits
    python examples/block_profile.py
    # any model on your images, with the reconstruction loss of the paper's Fig. 6
    python examples/block_profile.py --model facebook/vit-mae-large --images my_images/ \\
        --reconstruction_epochs 20

Prints a table (k-NN accuracy where there are labels, agreement of neighbours under augmentation,
statistics, attention distance, with `--reconstruction_epochs` the reconstruction loss) and the
proposal that `--head_blocks auto` would make, and writes a picture. The result on a real small MAE:
benchmarks/results/block-profile.md.
"""

import argparse
import sys
from pathlib import Path

from mim_refiner_hf import load_encoder
from mim_refiner_hf.data.images import evenly_spaced, hold_out, open_images
from mim_refiner_hf.evaluation import (
    block_profile,
    draw_block_profile,
    profile_table,
    propose_head_blocks,
)

QUICKSTART = "outputs/quickstart/model"


def main() -> int:
    """Profile, print, propose, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=QUICKSTART, help="model folder, Hub name, or original checkpoint"
    )
    parser.add_argument(
        "--images",
        default="digits",
        help="image folder, parquet file or Hub name; by default bundled digits",
    )
    parser.add_argument(
        "--eval_images", help="images to measure on; by default a third of --images is held out"
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=1500,
        help="images in all, evenly spaced; a third of them to measure on",
    )
    parser.add_argument(
        "--reconstruction_epochs",
        type=int,
        default=0,
        help="of small decoders per block; 20 in the paper",
    )
    parser.add_argument("--output", type=Path, default=Path("block-profile.png"))
    options = parser.parse_args()
    if options.model == QUICKSTART and not Path(QUICKSTART).is_dir():
        print(
            f"{QUICKSTART} does not exist: run `accelerate launch training/refine.py` first, or"
            " give --model",
            file=sys.stderr,
        )
        return 2
    encoder = load_encoder(options.model).eval()
    channels = encoder.config.num_channels
    images = open_images(options.images, num_channels=channels)
    if options.eval_images is None:
        bank, measured = hold_out(evenly_spaced(images, options.limit), 1 / 3, seed=0)
    else:
        bank = evenly_spaced(images, 2 * options.limit // 3)
        measured = open_images(options.eval_images, num_channels=channels)
        measured = evenly_spaced(measured, options.limit // 3)

    profile = block_profile(
        encoder,
        encoder.image_processor,
        bank,
        measured,
        reconstruction_epochs=options.reconstruction_epochs,
    )
    blocks, reason = propose_head_blocks(profile)
    print(f"{options.model}: {len(bank)} images as k-NN bank, {len(measured)} measured\n")
    print(f"{profile_table(profile)}\n")
    print(f"Heads on blocks {', '.join(map(str, blocks))}: {reason}")
    draw_block_profile(profile, options.output, blocks)
    print(f"The picture: {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
