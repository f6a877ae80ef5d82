"""`python -m benchmarks.gpu` at a tiny size on the CPU: every case of the page, and the formula behind MFU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from mim_refiner_hf import MimRefinerConfig, MimRefinerModel, RefineRecipe
from mim_refiner_hf.refinement.heads import IdHeads
from mim_refiner_hf.refinement.queue import NearestNeighbourQueue
from mim_refiner_hf.refinement.refiner import Refiner
from mim_refiner_hf.refinement.resolve import resolve


def test_every_case_at_a_tiny_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), np.uint8)).save(
            tmp_path / f"{number}.jpg"
        )
    out = tmp_path / "new" / "gpu.md"
    words = [
        "--images",
        str(tmp_path),
        "--size",
        "l16",
        "--device",
        "cpu",
        "--tiny",
        "--out",
        str(out),
    ]
    gpu.main([*words, "--steps", "5", "--num_workers", "0"])
    text = out.read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| l16 |")]
    measured = [row for row in rows if "left out" not in row[2]]
    assert [row[1:3] for row in measured] == [
        [case.name, stage]
        for case in gpu.cases(["l16"])
        if "compile" not in case.changes
        for stage in ("warmup", "refine")
    ]
    assert all(float(row[5]) > 0 for row in measured) and {row[4] for row in measured} == {
        "all",
        "2",
    }
    assert "compiled | left out: --compile: blocks are compiled for a GPU" in text
    refine = next(
        line for line in text.splitlines() if line.startswith("| l16, fast views, refine")
    )
    assert all(float(cell) > 0 for cell in refine.strip("| ").split(" | ")[1:8]), refine
    assert (
        "| k-NN, 180 x 16 bank" in text
        and "| k-means, 200 x 16" in text
        and "| features, l16, float32 |" in text
    )
    assert text.strip() in capsys.readouterr().out


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_useful_operations_are_those_that_are_counted(pooling: str) -> None:
    config = MimRefinerConfig(**gpu.TINY, pooling=pooling)  # type: ignore[arg-type]
    fields = {**gpu.TINY_RECIPE, "queue_size": 4, "batch_size": 4, "topk": 1}
    recipe = resolve(RefineRecipe(model="a", **fields), config, 64)  # type: ignore[arg-type]
    heads = IdHeads(len(recipe.head_blocks), 48, 24, 32, 16)
    queue = NearestNeighbourQueue(len(recipe.head_blocks), 4, 16)
    refiner = Refiner(
        MimRefinerModel(config),
        recipe.head_blocks,
        heads,
        queue,
        num_global=2,
        num_views=4,
        temperature=0.2,
    )
    views = [torch.randn(4, 2, 3, size, size) for size in (recipe.global_size, recipe.local_size)]
    for stage, expected in gpu.useful_operations(config, recipe).items():
        with FlopCounterMode(display=False) as counter:
            refiner.backward(
                views, torch.arange(4), torch.arange(4), train_encoder=stage == "refine"
            )
        assert 4 * expected == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("words", [["--size", "b16,x9"], ["--device", "cuda"], ["--steps", "4"]])
def test_wrong_words_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as refused:
        gpu.main(["--images", "nowhere", "--device", "cpu", *words])
    assert refused.value.code == 2 and words[0] in capsys.readouterr().err
