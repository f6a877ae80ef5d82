"""Embed a data set of any size: the features of every image, once, as parquet shards.

    python training/embed.py facebook/vit-mae-large --dataset photos/ --out features/
    accelerate launch training/embed.py mae-refined-l16 --dataset imagenet-1k \\
        --split validation --streaming --dtype bf16 \\
        --blocks 11 23 --pooling cls mean --last4 --out features/
    python training/embed.py --help                           # every setting, explained

The same as `mim-refiner embed`. Run it again after an interruption, on as many processes as you
like: finished shards are verified and kept. Broken images are listed in `broken.json` and stop
nothing. Every protocol reads the folder, and `mim_refiner_hf.evaluation.FeatureStore` does.
"""

from mim_refiner_hf.cli import command

if __name__ == "__main__":
    raise SystemExit(command("embed"))
