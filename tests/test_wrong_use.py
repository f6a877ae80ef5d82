"""Wrong use: exit code 2 and one line that names flag, value and what is allowed, before any work
and before any file.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

import mim_refiner_hf
from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel, cli
from mim_refiner_hf.pretraining import mae
from mim_refiner_hf.publishing.hub import save_model_folder
from mim_refiner_hf.refinement.recipe_files import parse_recipe
from mim_refiner_hf.runs import run as run_module

FLAGS = {
    "model": "{model}",
    "dataset": "digits",
    "output_dir": "{out}",
    "batch_size": 64,
    "queue_size": 128,
    "topk": 5,
}


class Case(NamedTuple):
    """A command line as changes to FLAGS (None removes a flag), and what its one line must say."""

    name: str
    flags: dict[str, Any]
    says: list[str]


CASES = [
    # ---- data
    Case(
        "missing folder", {"dataset": "{tmp}/photo"}, ["{tmp}/photo", "did you mean {tmp}/photos"]
    ),
    Case(
        "missing parquet",
        {"dataset": "./train.parquet"},
        ["'./train.parquet'", "No file or folder"],
    ),
    Case("empty folder", {"dataset": "{tmp}/empty"}, ["No images in {tmp}/empty", ".png"]),
    Case("one image", {"dataset": "{tmp}/one"}, ["--dataset {tmp}/one", "1 image", "at least 2"]),
    Case(
        "a file that is no table",
        {"dataset": "{tmp}/photos/0.png"},
        ["{tmp}/photos/0.png", ".parquet", "folder"],
    ),
    Case("corrupt parquet", {"dataset": "{tmp}/corrupt.parquet"}, ["{tmp}/corrupt.parquet"]),
    Case(
        "no image column",
        {"dataset": "{tmp}/numbers.parquet"},
        ["No image column", "{tmp}/numbers.parquet", "['x', 'y']"],
    ),
    Case(
        "forgetting what is no column",
        {"forget": "camera,site"},
        ["--forget camera", "digits has no such column", "--metadata"],
    ),
    Case("no name of a column", {"forget": "camera,"}, ["--forget camera,", "with commas"]),
    Case(
        "forgetting and keeping",
        {"forget": "camera,site", "keep": "site"},
        ["--forget camera,site", "--keep site", "exclude each other"],
    ),
    Case(
        "metadata for nothing",
        {"metadata": "{tmp}/photos.csv"},
        ["--metadata {tmp}/photos.csv", "--forget", "--keep"],
    ),
    Case(
        "no file of metadata",
        {"dataset": "{tmp}/photos", "forget": "camera", "metadata": "{tmp}/gone.csv"},
        ["--metadata {tmp}/gone.csv", "no such file", "file_name"],
    ),
    Case(
        "forgetting in a stream",
        {"dataset": "{tmp}/photos", "streaming": True, "max_steps": 2, "forget": "camera"},
        ["--forget camera", "leave --streaming out"],
    ),
    Case("unknown split", {"split": "trian"}, ["'trian'", "['test', 'train']"]),
    Case(
        "unknown split of a folder",
        {"dataset": "{tmp}/photos", "split": "val"},
        ["{tmp}/photos", "'val'", "leave split out"],
    ),
    Case("unknown eval split", {"eval_split": "validation"}, ["'validation'", "['test', 'train']"]),
    Case("missing eval data", {"eval_dataset": "{tmp}/gone"}, ["{tmp}/gone"]),
    Case(
        "evaluation on the training images",
        {"eval_split": "train"},
        ["--eval_dataset digits", "--eval_split"],
    ),
    Case("eval fraction 1", {"eval_fraction": 1}, ["--eval_fraction 1", "less than 1"]),
    Case(
        "nearly all held back",
        {"eval_fraction": 0.99},
        ["--batch_size", "are left to train on", "--eval_fraction 0.99", "lower one of them"],
    ),
    Case(
        "batch larger than the data",
        {"batch_size": 1200, "queue_size": 1200},
        ["--batch_size 1200", "only 1167"],
    ),
    Case("batch of one", {"batch_size": 1}, ["--batch_size 1", "at least 2"]),
    Case("stream without a length", {"streaming": True}, ["--streaming", "--max_steps"]),
    Case("streamed digits", {"streaming": True, "max_steps": 2}, ["digits", "without streaming"]),
    # ---- model
    Case("no model", {"model": None}, ["--model", "facebook/vit-mae-large"]),
    Case(
        "model and pretrain",
        {"pretrain": "pretrain-digits"},
        ["--model {model}", "--pretrain pretrain-digits", "exclude each other"],
    ),
    Case(
        "unknown pre-training",
        {"model": None, "pretrain": "digits-mae"},
        ["--pretrain digits-mae", "pretrain-digits"],
    ),
    Case(
        "pre-training of another kind",
        {"model": None, "pretrain": "quickstart"},
        ["--pretrain quickstart", "unknown field", "topk"],
    ),
    Case("missing model file", {"model": "{tmp}/gone.pth"}, ["{tmp}/gone.pth", "does not exist"]),
    Case(
        "model file that is no checkpoint",
        {"model": "{tmp}/notes.pth"},
        ["{tmp}/notes.pth", "unreadable"],
    ),
    Case(
        "folder without weights", {"model": "{tmp}/empty"}, ["{tmp}/empty", "no model.safetensors"]
    ),
    Case(
        "truncated checkpoint",
        {"model": "{tmp}/truncated"},
        ["{tmp}/truncated/model.safetensors", "truncated"],
    ),
    Case("unknown family", {"family": "mea"}, ["'mea'", "allowed", "mae"]),
    Case(
        "CLS of a model without one",
        {"model": "{no_cls}", "pooling": "cls"},
        ["--pooling cls", "no CLS token", "mean"],
    ),
    Case("unknown pooling", {"pooling": "max"}, ["--pooling", "'max'", "cls", "mean"]),
    # ---- heads
    Case("head out of range", {"head_blocks": [0, 2]}, ["--head_blocks 0 2", "blocks 0 to 1"]),
    Case("negative head", {"head_blocks": [-1, 1]}, ["--head_blocks -1 1", "blocks 0 to 1"]),
    Case("descending heads", {"head_blocks": [1, 0]}, ["--head_blocks 1 0", "ascending"]),
    Case("the same head twice", {"head_blocks": [1, 1]}, ["--head_blocks 1 1", "different"]),
    Case("heads by comma", {"head_blocks": "0,1"}, ["--head_blocks 0,1"]),
    Case(
        "both ways to name heads",
        {"head_blocks": [1], "num_heads": 1},
        ["--head_blocks 1", "--num_heads 1", "exclude each other"],
    ),
    Case("too many heads", {"num_heads": 3}, ["--num_heads 3", "only 2 blocks"]),
    Case("no head", {"num_heads": 0}, ["--num_heads 0", "at least 1"]),
    Case(
        "queue smaller than the batch",
        {"queue_size": 32},
        ["--queue_size 32", "at least --batch_size 64"],
    ),
    Case("more neighbours than rows", {"topk": 200}, ["--topk 200", "at most --queue_size 128"]),
    Case("projector of width 0", {"projector_dim": 0}, ["--projector_dim 0", "at least 1"]),
    # ---- objective
    Case("temperature 0", {"temperature": 0}, ["--temperature 0", "greater than 0"]),
    Case("temperature nan", {"temperature": "nan"}, ["--temperature nan", "greater than 0"]),
    Case("unknown swap", {"swap": "negative"}, ["--swap", "'negative'", "positive", "all", "none"]),
    Case(
        "unknown loss schedule",
        {"loss_schedule": "cosine"},
        ["--loss_schedule", "'cosine'", "one_hot"],
    ),
    Case("all blocks frozen", {"freeze_blocks": 2}, ["--freeze_blocks 2", "has 2 blocks"]),
    Case(
        "head within the frozen blocks",
        {"freeze_blocks": 1, "head_blocks": [0, 1]},
        ["--freeze_blocks 1", "block 0", "at most 0"],
    ),
    # ---- views
    Case(
        "local size off the grid",
        {"local_size": 12},
        ["--local_size 12", "multiple of the patch size 8", "for example 16"],
    ),
    Case(
        "global size off the grid",
        {"global_size": 20},
        ["--global_size 20", "multiple of the patch size 8"],
    ),
    Case("scale reversed", {"global_scale": [0.8, 0.2]}, ["--global_scale 0.8 0.2", "low <= high"]),
    Case("one scale", {"local_scale": [0.2]}, ["--local_scale 0.2", "two numbers"]),
    Case("flip 2", {"flip": 2}, ["--flip 2", "between 0 and 1"]),
    Case(
        "one view",
        {"global_views": 1, "local_views": 0},
        ["--global_views 1", "--local_views 0", "two views"],
    ),
    # ---- schedule
    Case(
        "warm-up as long as the training",
        {"epochs": 4, "warmup_epochs": 4},
        ["--warmup_epochs 4", "less than --epochs 4"],
    ),
    Case("no epochs", {"epochs": 0}, ["--epochs 0", "greater than 0"]),
    Case("broken batch", {"batch_size": 2.5}, ["--batch_size", "'2.5'"]),
    Case("learning rate 0", {"learning_rate": 0}, ["--learning_rate 0", "greater than 0"]),
    Case("layer decay 0", {"layer_decay": 0}, ["--layer_decay 0", "at most 1"]),
    Case("average that never moves", {"ema_decay": 1}, ["--ema_decay 1", "less than 1"]),
    Case(
        "micro-batch larger than the batch",
        {"micro_batch_size": 65},
        ["--micro_batch_size 65", "64 images"],
    ),
    Case(
        "micro-batch of 0", {"micro_batch_size": 0}, ["--micro_batch_size 0", "at least 1, or auto"]
    ),
    Case(
        "neither number nor auto",
        {"micro_batch_size": "max"},
        ["--micro_batch_size max", "at least 1, or auto"],
    ),
    Case(
        "half an image",
        {"micro_batch_size": 2.5},
        ["--micro_batch_size 2.5", "at least 1, or auto"],
    ),
    Case("unknown precision", {"mixed_precision": "fp16"}, ["--mixed_precision", "'fp16'", "bf16"]),
    Case("compile without a GPU", {"compile": True}, ["--compile", "GPU", "leave --compile out"]),
    Case("heads are not warm", {"stage": "refine"}, ["--stage refine", "{out}", "--stage warmup"]),
    Case(
        "warm heads thrown away",
        {"stage": "warmup", "save_every": 0},
        ["--stage warmup", "--save_every 0"],
    ),
    Case("unknown stage", {"stage": "heads"}, ["--stage", "'heads'", "warmup"]),
    # ---- output
    Case(
        "another run's folder",
        {"output_dir": "{tmp}/other_run"},
        ["--output_dir {tmp}/other_run", "seed was 7, is 0"],
    ),
    Case(
        "unreadable recipe.json",
        {"output_dir": "{tmp}/spoilt_run"},
        ["--output_dir {tmp}/spoilt_run", "recipe.json"],
    ),
    Case(
        "output is a file",
        {"output_dir": "{tmp}/notes.pth"},
        ["--output_dir {tmp}/notes.pth", "is a file"],
    ),
    Case(
        "output below a file",
        {"output_dir": "{tmp}/notes.pth/out"},
        ["--output_dir {tmp}/notes.pth/out", "is a file"],
    ),
    Case(
        "model/ holds something else",
        {"output_dir": "{tmp}/photo_book"},
        ["{tmp}/photo_book/model", "not a model folder"],
    ),
    Case("push name without user", {"push_to_hub": "model"}, ["--push_to_hub model", "user/name"]),
    Case(
        "push name with a space", {"push_to_hub": "user/my model"}, ["user/my model", "user/name"]
    ),
    Case(
        "unknown logger",
        {"report_to": "comet"},
        ["--report_to comet", "tensorboard, wandb, trackio"],
    ),
    # ---- recipe and flags
    Case("unknown recipe", {"recipe": "mae-l61"}, ["--recipe mae-l61", "quickstart"]),
    Case(
        "missing recipe file",
        {"recipe": "{tmp}/gone.yaml"},
        ["--recipe {tmp}/gone.yaml", "no such file"],
    ),
    Case(
        "unknown field",
        {"recipe": "{tmp}/unknown_field.yaml"},
        ["--recipe {tmp}/unknown_field.yaml", "queue_length"],
    ),
    Case(
        "wrong type in a recipe", {"recipe": "{tmp}/wrong_type.yaml"}, ["--head_blocks 5", "list"]
    ),
    Case("nothing in a field", {"recipe": "{tmp}/null.yaml"}, ["--flip None", "float"]),
    Case(
        "recipe that is a list",
        {"recipe": "{tmp}/list.yaml"},
        ["--recipe {tmp}/list.yaml", "field: value"],
    ),
    Case(
        "recipe that is no YAML",
        {"recipe": "{tmp}/broken.yaml"},
        ["--recipe {tmp}/broken.yaml", "not valid YAML"],
    ),
    Case("unknown flag", {"learning-rat": 1}, ["--learning-rat"]),
    Case("wrong type", {"epochs": "many"}, ["--epochs", "'many'", "float"]),
    Case("flag without a value", {"seed": []}, ["--seed", "expected one argument"]),
    Case("neither true nor false", {"colour": "perhaps"}, ["--colour", "perhaps", "true/false"]),
]


OTHER_COMMANDS = [
    ("refin", ["'refin'", "refine"]),
    # ---- pretrain
    ("pretrain --epochs 0", ["--epochs 0", "at least 1"]),
    ("pretrain --epochs 10 --warmup_epochs 10", ["--warmup_epochs 10", "less than --epochs 10"]),
    ("pretrain --mask_ratio 1", ["--mask_ratio 1", "between 0 and 1"]),
    ("pretrain --scale 0", ["--scale 0", "greater than 0"]),
    ("pretrain --flip 2", ["--flip 2", "between 0 and 1"]),
    ("pretrain --seed -1", ["--seed -1", "at least 0"]),
    ("pretrain --seed 4294967296", ["--seed 4294967296", "at most 4294967295"]),
    ("pretrain --learning_rate 1e30", ["--learning_rate 1e+30", "at most 1000"]),
    ("pretrain --weight_decay inf", ["--weight_decay inf", "finite"]),
    ("pretrain --image_size 10000000 --patch_size 10", ["--image_size 10000000", "at most 8192"]),
    ("pretrain --decoder_size 4000000", ["--decoder_size 4000000", "at most 65536"]),
    ("pretrain --objective data2vec2 --mask_length 9999", ["--mask_length 9999", "at most 1024"]),
    ("pretrain --objective data2vec2 --decoder_kernel 1000", ["--decoder_kernel 1000", "64"]),
    ("pretrain --objective conmim --projector_size 1000000", ["--projector_size", "at most 65536"]),
    ("pretrain --objective conmim --layer_scale 1e9", ["--layer_scale 1000000000", "at most 100"]),
    ("pretrain --objective capi --prototypes 1", ["--prototypes 1", "at least 2"]),
    ("pretrain --objective capi --registers 400000", ["--registers 400000", "at most 4096"]),
    (
        "pretrain --objective capi --hidden_size 36 --num_attention_heads 2",
        ["--num_attention_heads 2", "--hidden_size 36", "multiple of 4"],
    ),
    ("pretrain digits more", ["unrecognized arguments: more", "pretrain"]),
    ("pretrain --learning_rate 0", ["--learning_rate 0", "greater than 0"]),
    ("pretrain --batch_size 0", ["--batch_size 0", "at least 1"]),
    ("pretrain --hidden_size x", ["--hidden_size", "'x'"]),
    (
        "pretrain --hidden_size 10 --num_attention_heads 3",
        ["--num_attention_heads 3", "--hidden_size 10"],
    ),
    ("pretrain --image_size 20 --patch_size 8", ["--patch_size 8", "--image_size 20"]),
    ("pretrain --decoder_size 30", ["--decoder_size 30", "multiple of 4"]),
    ("pretrain --num_channels 17", ["num_channels is 17", "1 to 16 channels"]),
    ("pretrain --num_workers -1", ["--num_workers", "-1", "at least 0"]),
    ("pretrain --max_bad_fraction 2", ["--max_bad_fraction 2.0", "between 0 and 1"]),
    ("pretrain --objective byol", ["--objective", "'byol'", "data2vec2"]),
    ("pretrain --num_masks 4", ["--num_masks 4", "--objective mae"]),
    ("pretrain --objective data2vec2 --target_layers 13", ["13", "--num_hidden_layers 12"]),
    ("pretrain --objective data2vec2 --decoder_groups 5", ["--decoder_groups 5", "768"]),
    ("pretrain --objective data2vec2 --image_size 32 --mask_ratio 0.9", ["--mask_ratio 0.9"]),
    ("pretrain --init_from ./gone", ["./gone"]),
    ("pretrain --init_from {model} --hidden_size 32", ["--hidden_size 32", "{model}", "leave"]),
    (
        "pretrain --init_from {no_cls} --objective data2vec2 --target_layers 1 --mask_ratio 0.5",
        ["CLS"],
    ),
    ("pretrain photos --dataset digits", ["photos", "--dataset", "give one of them"]),
    ("pretrain --eval_every 1 --dataset {tmp}/photos", ["--eval_every 1", "labels"]),
    ("pretrain --output_dir {model}", ["--output_dir {model}", "holds a model"]),
    ("pretrain --recipe mea", ["--recipe mea", "pretrain-digits"]),
    ("pretrain --recipe pretrain-digits --batch_size 5000", ["batch_size 5000", "1297"]),
    ("pretrain --dataset ./gone", ["./gone"]),
    ("pretrain --split trian", ["'trian'", "['test', 'train']"]),
    ("pretrain --output_dir {tmp}/photos", ["{tmp}/photos", "not a model folder"]),
    # ---- evaluate
    ("evaluate {model}", ["--dataset"]),
    ("evaluate", ["--model", "--dataset"]),
    ("evaluate --model {model} photos --dataset digits", ["photos", "name both already"]),
    ("evaluate {tmp}/gone.pth --dataset digits", ["{tmp}/gone.pth", "does not exist"]),
    ("evaluate {model} --dataset {tmp}/photo", ["{tmp}/photo", "did you mean {tmp}/photos"]),
    ("evaluate {model} --dataset digits --split trian", ["'trian'", "['test', 'train']"]),
    ("evaluate {model} --dataset digits --protocols knn", ["--protocols", "'knn'", "low_shot"]),
    (
        "evaluate {model} --dataset digits --protocols segmentation low_shot",
        ["--protocols segmentation", "masks"],
    ),
    (
        "evaluate {model} --dataset digits --recipe fine-tune-inat",
        ["--recipe fine-tune-inat", "--protocols fine_tuning"],
    ),
    (
        "evaluate {model} --dataset digits --protocols fine_tuning --recipe gone",
        ["--recipe gone", "fine-tune-inat"],
    ),
    (
        "evaluate {model} --dataset digits --against {model}",
        ["--against {model}", "name another one"],
    ),
    (
        "evaluate {model} --dataset digits --against {tmp}/empty",
        ["{tmp}/empty", "no model.safetensors"],
    ),
    (
        "evaluate {model} --dataset digits --features {tmp}/photos",
        ["{tmp}/photos", "not a folder of features"],
    ),
    ("evaluate {model} --dataset digits --transfer {tmp}/gone", ["{tmp}/gone"]),
    (
        "evaluate {model} --dataset digits --output_dir {tmp}/notes.pth",
        ["--output_dir {tmp}/notes.pth", "is a file"],
    ),
    ("evaluate {model} --dataset digits --seed -1", ["--seed", "-1", "at least 0"]),
    ("evaluate {model} --dataset digits --num_workers -1", ["--num_workers", "-1", "at least 0"]),
    # ---- embed
    ("embed {model} --dataset digits", ["--out"]),
    ("embed {model} --out out", ["--dataset"]),
    ("embed {tmp}/notes.pth --dataset digits --out out", ["{tmp}/notes.pth", "unreadable"]),
    ("embed {model} --dataset {tmp}/empty --out out", ["No images in {tmp}/empty"]),
    ("embed {model} --dataset digits --streaming --out out", ["digits", "without streaming"]),
    (
        "embed {model} --dataset digits --out {tmp}/photos",
        ["{tmp}/photos", "not a folder of features"],
    ),
    ("embed {model} --dataset digits --out out --blocks 2", ["blocks has 2", "0 to 1"]),
    ("embed {model} --dataset digits --out out --blocks last", ["--blocks", "'last'", "'output'"]),
    ("embed {model} --dataset digits --out out --pooling max", ["--pooling", "'max'", "'mean'"]),
    (
        "embed {no_cls} --dataset digits --out out --pooling cls",
        ["pooling 'cls'", "no CLS token", "'mean'"],
    ),
    ("embed {model} --dataset digits --out out --last4", ["last4", "the encoder has 2"]),
    ("embed {model} --dataset digits --out out --dtype int4", ["--dtype", "'int4'", "'bf16'"]),
    (
        "embed {model} --dataset digits --out out --batch_size 0",
        ["--batch_size", "0", "at least 1"],
    ),
    (
        "embed {model} --dataset digits --out out --num_workers -1",
        ["--num_workers", "-1", "at least 0"],
    ),
    (
        "embed {model} --dataset digits --out out --shard_size 0",
        ["--shard_size", "0", "at least 1"],
    ),
    # ---- cluster
    ("cluster {tmp}/photos", ["--model"]),
    ("cluster {tmp}/photo --model {model}", ["{tmp}/photo", "did you mean {tmp}/photos"]),
    ("cluster {tmp}/photos --model {tmp}/gone.pth", ["{tmp}/gone.pth", "does not exist"]),
    (
        "cluster {tmp}/photos --model {model} --num_clusters 0",
        ["--num_clusters", "0", "at least 1"],
    ),
    ("cluster {tmp}/photos --model {model} --num_clusters 9", ["num_clusters is 9", "3 images"]),
    ("cluster {tmp}/photos --model {model} --method dbscan", ["--method", "'dbscan'", "'kmeans'"]),
    (
        "cluster {tmp}/photos --model {model} --out {tmp}/photos",
        ["{tmp}/photos", "not a groups folder"],
    ),
    ("cluster {tmp}/photos --model {model} --batch_size 0", ["--batch_size", "0", "at least 1"]),
    (
        "cluster {tmp}/photos --model {model} --num_workers -1",
        ["--num_workers", "-1", "at least 0"],
    ),
    ("cluster {tmp}/photos --model {model} --seed -1", ["--seed", "-1", "at least 0"]),
    # ---- convert
    ("convert {model}", ["destination"]),
    ("convert {tmp}/gone.pth out", ["{tmp}/gone.pth", "does not exist"]),
    ("convert {tmp}/truncated out", ["{tmp}/truncated/model.safetensors", "truncated"]),
    ("convert {model} {tmp}/photos", ["{tmp}/photos", "not a model folder"]),
    ("convert {model} out --dtype int8", ["--dtype", "'int8'", "'bfloat16'"]),
    ("convert {model} out --family mea", ["'mea'", "allowed", "mae"]),
    ("convert {model} out --num_heads 3", ["num_heads=3", "states 2"]),
    ("convert {model} out --num_heads many", ["--num_heads", "'many'"]),
    ("convert {model} out --push model", ["'model'", "user/name"]),
    ("convert {model} out --to timm", ["--to timm"]),
    # ---- export
    ("export {model} out", ["--to"]),
    ("export {model} out --to keras", ["--to", "'keras'", "'onnx'"]),
    ("export {model} {model} --to timm", ["{model}", "overwrite the source"]),
    ("export {model} {tmp}/photos --to vit", ["{tmp}/photos", "not a model folder"]),
    ("export {tmp}/gone.pth out --to timm", ["{tmp}/gone.pth", "does not exist"]),
    # ---- page
    ("page", ["source"]),
    ("page {model} --out {tmp}/photos", ["{tmp}/photos", "not a site folder"]),
    ("page {model} --transformers_js {tmp}/photos", ["{tmp}/photos", "npm install"]),
    # ---- push
    ("push {model}", ["repository"]),
    ("push gone user/name", ["gone", "not a model folder"]),
    ("push {tmp}/photos user/name", ["{tmp}/photos", "config.json and model*.safetensors missing"]),
    ("push {model} name", ["'name'", "user/name"]),
    ("push {model} user/na^me", ["'user/na^me'", "user/name"]),
    # ---- replay
    ("replay {tmp}/photos", ["{tmp}/photos", "no recipe.json"]),
    ("replay {tmp}/spoilt_run", ["{tmp}/spoilt_run/recipe.json", "cannot be read"]),
    ("replay {tmp}/photos --step first", ["--step", "'first'"]),
    ("replay {tmp}/photos --mixed_precision fp16", ["--mixed_precision", "'fp16'", "'bf16'"]),
]
"""Command lines of the other commands, and what their one line must say."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model, one without CLS, and a folder {tmp} of things that are not what they seem."""
    root = tmp_path_factory.mktemp("wrong")
    shape = {
        "image_size": 16,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    processor = MimRefinerImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    for name, cls in (("model", True), ("no_cls", False)):
        save_model_folder(
            root / name, MimRefinerModel(MimRefinerConfig(**shape, use_cls_token=cls)), processor
        )
    shutil.copytree(root / "model", root / "truncated")
    weights = (root / "model/model.safetensors").read_bytes()
    (root / "truncated/model.safetensors").write_bytes(weights[: len(weights) // 2])
    for name, count in (("empty", 0), ("one", 1), ("photos", 3)):
        (root / name).mkdir()
        for i in range(count):
            Image.fromarray(np.full((9, 9), 80 * i, dtype=np.uint8)).save(root / name / f"{i}.png")
    (root / "notes.pth").write_text("not a checkpoint")
    (root / "corrupt.parquet").write_bytes(b"PAR1" + bytes(range(64)))
    Dataset.from_dict({"x": [1.0, 2.0], "y": [3.0, 4.0]}).to_parquet(root / "numbers.parquet")
    for name, text in (
        ("unknown_field", "queue_length: 5"),
        ("wrong_type", "head_blocks: 5"),
        ("null", "flip:"),
        ("list", "- epochs"),
        ("broken", "epochs: 5: 6"),
    ):
        (root / f"{name}.yaml").write_text(text + "\n")
    shutil.copytree(root / "photos", root / "photo_book/model")
    (root / "spoilt_run").mkdir()
    (root / "spoilt_run/recipe.json").write_text("{")
    names = {name: str(root / name) for name in ("model", "no_cls")}
    return {"tmp": str(root), **names}


@pytest.fixture(autouse=True)
def _no_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing may begin to train, and relative paths end in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def begun(*args: Any, **settings: Any) -> None:
        raise AssertionError("work began before the mistake was found")

    for name in ("Trainer", "pretrained_start", "evaluate_encoder"):
        monkeypatch.setattr(run_module, name, begun)
    monkeypatch.setattr(mae, "mae_loss", begun)


def command_line(flags: dict[str, Any], places: dict[str, str]) -> list[str]:
    """{"head_blocks": [0, 1]} -> ["--head_blocks", "0", "1"], with {tmp} and its like filled in."""
    words: list[str] = []
    for name, value in flags.items():
        if value is not None:
            words += [
                f"--{name}",
                *(
                    str(word).format(**places)
                    for word in (value if isinstance(value, list) else [value])
                ),
            ]
    return words


def exit_code(arguments: list[str]) -> int:
    """The code that the console command `mim-refiner` ends with."""
    try:
        return cli.main(arguments)
    except SystemExit as stopped:  # argparse's way
        assert isinstance(stopped.code, int)
        return stopped.code


def the_line(errors: str) -> str:
    """The one line on stderr, beside argparse's usage, whose further lines are indented."""
    lines = [line for line in errors.splitlines() if not line.startswith(("usage:", " "))]
    assert len(lines) == 1, errors
    return lines[0]


def everything(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_wrong_use_is_refused(
    case: Case, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {**places, "out": str(tmp_path / "out")}
    if case.name == "another run's folder":
        leave_a_run(places, capsys)
    before = everything(tmp_path, Path(places["tmp"]))
    assert exit_code(["refine", *command_line({**FLAGS, **case.flags}, places)]) == 2
    printed = capsys.readouterr()
    line = the_line(printed.err)
    for fragment in case.says:
        assert fragment.format(**places) in line, line
    assert "error: " in line and len(line) < 1200
    assert "Plan" not in printed.out
    assert everything(tmp_path, Path(places["tmp"])) == before


def leave_a_run(places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with the recipe of a run that had seed 7."""
    words = command_line({**FLAGS, "seed": 7, "output_dir": "{tmp}/other_run"}, places)
    prepared = run_module.prepare(run_module.RefineRecipe(**vars(parse_recipe(words))))
    folder = Path(places["tmp"]) / "other_run"
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(prepared.recipe.as_written()))
    capsys.readouterr()


def test_the_command_line_of_the_cases_is_otherwise_fine(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that no case is refused for another reason than its own; and a dry run writes nothing."""
    places = {**places, "out": str(tmp_path / "out")}
    assert exit_code(["refine", *command_line({**FLAGS, "dry_run": True}, places)]) == 0
    assert "Plan" in capsys.readouterr().out
    assert everything(tmp_path) == []


def test_there_are_enough_cases() -> None:
    """At least 100 different command lines in all, and some for every command."""
    lines = {f"refine {case.flags}" for case in CASES} | {line for line, _ in OTHER_COMMANDS}
    assert len(lines) == len(CASES) + len(OTHER_COMMANDS) >= 100
    assert {line.split()[0] for line, _ in OTHER_COMMANDS} | {"refine"} >= set(cli.COMMANDS)


@pytest.mark.parametrize(
    ("line", "says"), OTHER_COMMANDS, ids=[line.replace(" ", "_") for line, _ in OTHER_COMMANDS]
)
def test_wrong_use_of_the_other_commands(
    line: str,
    says: list[str],
    places: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = everything(Path(places["tmp"]))
    assert exit_code([word.format(**places) for word in line.split()]) == 2
    said = the_line(capsys.readouterr().err)
    for fragment in says:
        assert fragment.format(**places) in said, said
    assert "error: " in said and len(said) < 1200
    assert everything(tmp_path) == [] and everything(Path(places["tmp"])) == before


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"mim-refiner {mim_refiner_hf.__version__}\n"


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["refine", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "--temperature",
        "Auto: 0.2 up to width 1024 (L)",
        "--micro_batch_size",
        "exact, whatever the value",
    ):
        assert words in shown
