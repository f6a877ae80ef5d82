"""Measure an encoder, and whether it got better than another.

    python training/evaluate.py outputs/quickstart/model --dataset digits
    python training/evaluate.py out/model --dataset my_images/ \\
        --against facebook/vit-mae-large --output_dir out/evaluation
    accelerate launch training/evaluate.py out/model --dataset imagenet-1k \\
        --eval_split validation                               # processes share the work
    python training/evaluate.py --help                        # every setting, explained

k-NN, clustering, every block, with errors, verdicts and pictures. The same as `mim-refiner
evaluate`. It writes metrics.json, report.md and pictures, and updates the card of a model folder.
"""

import sys

from mim_refiner_hf.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["evaluate", *sys.argv[1:]]))
