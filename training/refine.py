# /// script
# requires-python = ">=3.11"
# dependencies = ["mim_refiner_hf"]
#
# [tool.uv.sources]
# mim_refiner_hf = { path = "..", editable = true }
#
# [tool.hf-jobs]
# env = { UV_NO_SOURCES = "1" }
# ///
"""Refine a masked-image model until its features group images by meaning.

    accelerate launch training/refine.py                      # the quickstart: needs no data
    accelerate launch training/refine.py --model facebook/vit-mae-large --dataset my_images/ \\
        --output_dir out
    accelerate launch training/refine.py --recipe mae-refined-l16 --dataset imagenet-1k \\
        --output_dir out
    accelerate launch training/refine.py --help               # every setting, explained
    uv run training/refine.py --model facebook/vit-mae-large --dataset my_images/ --output_dir out

It prints a plan, trains the heads on the frozen encoder, refines the encoder, and measures it
before and after. In the output folder: model/ (an ordinary transformers model with its card),
metrics.json, clusters.png, curves.png, log.jsonl. The loop is
`mim_refiner_hf/refinement/trainer.py`; the same command continues an interrupted run. `uv run`
needs nothing installed: the head of this file says where the package is, docs/scale.md how it goes
without a checkout.
"""

from mim_refiner_hf import refine_command

if __name__ == "__main__":
    raise SystemExit(refine_command())
