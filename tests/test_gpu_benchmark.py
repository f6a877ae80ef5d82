"""`python -m benchmarks.gpu` at a tiny size on the CPU.

Every case of the page, and the formula behind MFU.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gpu
from mim_refiner_hf import MimRefinerModel, RefineRecipe
from mim_refiner_hf.refinement.heads import IdHeads
from mim_refiner_hf.refinement.queue import NearestNeighbourQueue
from mim_refiner_hf.refinement.refiner import NnaSettings, Refiner
from mim_refiner_hf.refinement.resolve import resolve


@pytest.mark.slow
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
    assert "compiled | left out: compile: blocks are compiled for a GPU" in text
    refine = next(
        line for line in text.splitlines() if line.startswith("| l16, fast views, refine")
    )
    assert all(float(cell) > 0 for cell in refine.strip("| ").split(" | ")[1:8]), refine
    assert (
        "| k-NN, 180 x 16 bank" in text
        and "| k-means, 200 x 16" in text
        and "| features, l16, float32 |" in text
    )
    # in order, with what a run says in between
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if "s a step, by the first" not in line] == text.splitlines()


class CountedProducts(TorchDispatchMode):
    """Counts the operations of matrix products and convolutions by their shapes, 2 a multiply-add.

    torch's own counter is not asked: which kernels of attention it knows depends on its version.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        match function.overloadpacket.__name__:
            case "mm" | "bmm":
                self.operations += 2 * result.numel() * args[0].shape[-1]
            case "addmm" | "baddbmm":
                self.operations += 2 * result.numel() * args[1].shape[-1]
            case "convolution":
                self.operations += 2 * result.numel() * args[1][0].numel()
            case "convolution_backward":
                # one product for the pixels' gradient and one for the weights', where asked for
                asked = sum(args[-1][:2])
                self.operations += asked * 2 * args[0].numel() * args[2][0].numel()
        return result


def test_products_are_counted_by_their_shapes() -> None:
    rows, weight = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    with CountedProducts() as counter:
        (rows @ weight).sum().backward()
    assert counter.operations == 3 * 2 * 3 * 5 * 7
    kernel = torch.randn(6, 2, 4, 4, requires_grad=True)
    with CountedProducts() as counter:
        torch.nn.functional.conv2d(torch.randn(1, 2, 8, 8), kernel, stride=4).sum().backward()
    assert counter.operations == 2 * 2 * 4 * 6 * 2 * 16


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_useful_operations_are_those_that_are_counted(pooling: str) -> None:
    config = gpu.encoder_config("l16", tiny=True)
    config.pooling = pooling
    fields = {**gpu.TINY_RECIPE, "queue_size": 4, "batch_size": 4, "topk": 1}
    recipe = resolve(RefineRecipe(model="a", **fields), config, 64)  # type: ignore[arg-type]
    heads = IdHeads(len(recipe.head_blocks), 48, 24, 32, 16)
    queue = NearestNeighbourQueue(len(recipe.head_blocks), 4, 16)
    encoder = MimRefinerModel(config)
    # attention as plain products, whatever kernels this version of torch has
    encoder.set_attn_implementation("eager")
    refiner = Refiner(
        encoder,
        recipe.head_blocks,
        heads,
        queue,
        NnaSettings(2, 4, temperature=0.2),
    )
    views = [torch.randn(4, 2, 3, size, size) for size in (recipe.global_size, recipe.local_size)]
    for stage, expected in gpu.useful_operations(config, recipe).items():
        with CountedProducts() as counter:
            refiner.backward(
                views, torch.arange(4), torch.arange(4), train_encoder=stage == "refine"
            )
        assert 4 * expected == pytest.approx(counter.operations, rel=0.03)


@pytest.mark.parametrize("words", [["--size", "b16,x9"], ["--device", "cuda"], ["--steps", "4"]])
def test_wrong_words_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as refused:
        gpu.main(["--images", "nowhere", "--device", "cpu", *words])
    assert refused.value.code == 2 and words[0] in capsys.readouterr().err
