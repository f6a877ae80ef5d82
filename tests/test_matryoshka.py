"""`--matryoshka`: heads on the first channels of the output, and vectors that are cut there."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import rankdata
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import StandardScaler
from small_runs import SHAPE, assert_identical, losses, run_stopped_before, trained_folder
from torch import Tensor

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel, RefineRecipe, load_encoder
from mim_refiner_hf.evaluation.label_free import TwoViews
from mim_refiner_hf.refinement.heads import GroupedLayer, IdHeads
from mim_refiner_hf.refinement.memory import head_parameters
from mim_refiner_hf.refinement.queue import NearestNeighbourQueue
from mim_refiner_hf.refinement.refiner import NnaSettings, Refiner, StepResult
from mim_refiner_hf.refinement.resolve import resolve
from mim_refiner_hf.refinement.trainer import make_refiner
from mim_refiner_hf.runs.plan import plan_text
from mim_refiner_hf.runs.refine import refine
from mim_refiner_hf.runs.run import run
from mim_refiner_hf.runs.run_record import nested_line

pytestmark = pytest.mark.usefixtures("quick")

WIDTH = SHAPE["hidden_size"]
WIDTHS = [WIDTH // 8, WIDTH // 4, WIDTH // 2]
BATCH = 6


# ---- the heads


def one_head(refiner: Refiner, number: int, width: int) -> Refiner:
    """A refiner of this head alone, which is given vectors of that width and no others."""
    heads = IdHeads(1, width, 24, 40, 16)
    layers = [layer for layer in refiner.heads.modules() if isinstance(layer, GroupedLayer)]
    own = [layer for layer in heads.modules() if isinstance(layer, GroupedLayer)]
    for old, new in zip(layers, own, strict=True):
        inputs = new.weight.shape[2]
        new.weight.data = old.weight.data[number : number + 1, :, :inputs].clone()
    queue = NearestNeighbourQueue(1, 32, 16)
    queue.rows.copy_(refiner.queue.rows[number : number + 1])
    queue.norms.copy_(refiner.queue.norms[number : number + 1])
    settings = dataclasses.replace(refiner.settings, nested_widths=())
    return Refiner(refiner.encoder, [2], heads, queue, settings).train()


def aligned(refiner: Refiner, features: Tensor, weights: list[float]) -> StepResult:
    """The loss of vectors (H, V * b, D), and its gradient at them."""
    index = torch.arange(BATCH)
    result = refiner.align(features, index, -torch.ones(BATCH).long(), head_weights=weights)
    result.loss.backward()
    return result


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_nested_head_is_a_head_of_that_width(number: int, momentum: float | None) -> None:
    """It sees its channels and no others, and leaves no gradient at those."""
    torch.manual_seed(1)
    encoder = MimRefinerModel(MimRefinerConfig(**SHAPE))
    heads = IdHeads(4, WIDTH, 24, 40, 16)
    queue = NearestNeighbourQueue(4, 32, 16, seed=3)
    settings = NnaSettings(2, 3, temperature=0.2, target_momentum=momentum, nested_widths=WIDTHS)
    refiner = Refiner(encoder, [2], heads, queue, settings).train()
    assert refiner.head_names == ["output", *(f"output:{width}" for width in WIDTHS)]
    width = WIDTHS[number - 1]
    alone = one_head(refiner, number, width)

    features = torch.randn(1, 3 * BATCH, WIDTH, requires_grad=True)
    cut = features.detach()[:, :, :width].clone().requires_grad_()
    weights = [float(head == number) for head in range(4)]
    found = aligned(refiner, features, weights)
    expected = aligned(alone, cut, [1.0])
    torch.testing.assert_close(found.head_losses[number], expected.head_losses[0])
    torch.testing.assert_close(found.alignment[number], expected.alignment[0])
    assert features.grad is not None and cut.grad is not None
    torch.testing.assert_close(features.grad[:, :, :width], cut.grad)
    assert not features.grad[:, :, width:].any()
    torch.testing.assert_close(queue.rows[number], alone.queue.rows[0])


def test_without_it_there_are_no_heads_more() -> None:
    """The weights of the others do not hang on it."""
    config = MimRefinerConfig(**SHAPE)
    plain = resolve(RefineRecipe(model="m"), config, num_images=1000)
    nested = resolve(RefineRecipe(model="m", matryoshka=True), config, num_images=1000)
    assert (plain.nested_widths, nested.nested_widths) == ([], WIDTHS)
    assert nested.num_heads == plain.num_heads + 3 == len(plain.head_blocks) + 3
    assert resolve(RefineRecipe(**nested.as_written()), config, 1000).nested_widths == WIDTHS

    # what the plan counts is there
    for recipe in (plain, nested):
        refiner = make_refiner(recipe, MimRefinerModel(config))
        layers = (layer for layer in refiner.heads.modules() if isinstance(layer, GroupedLayer))
        assert head_parameters(recipe, config) == sum(layer.weight.numel() for layer in layers)
        assert len(refiner.queue.rows) == recipe.num_heads
    text = plan_text(nested, config, num_eval=0, device="cpu", available=2**33)
    assert f"output, and on its first {', '.join(map(str, WIDTHS))} channels (0-based" in text


# ---- whole runs


def test_a_run_stopped_and_in_micro_batches(recipe: Callable[..., RefineRecipe]) -> None:
    whole = recipe("whole", matryoshka=True)
    assert run(whole) is not None
    asked = recipe("pieces", matryoshka=True)
    run_stopped_before(asked, (3, 5, 7))
    assert_identical(asked, whole)

    other = recipe("micro", matryoshka=True, micro_batch_size=5)
    run(other)
    assert losses(other) == pytest.approx(losses(whole), abs=1e-4)

    # heads go on in another run only if it has the same ones
    new = recipe("new", model=None, init_from=whole.output_dir, head_blocks=None)
    with pytest.raises(ValueError, match="matryoshka=False, there True"):
        run(new)
    assert run(dataclasses.replace(new, matryoshka=True)) is not None


def test_vectors_are_cut(
    recipe: Callable[..., RefineRecipe], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = recipe(matryoshka=True)
    assert refine(asked) is not None
    said = re.search(
        r"Of 32 channels the first ones alone: MRR (.*)\.$", capsys.readouterr().out, re.M
    )
    assert said is not None
    assert [part.split()[-1] for part in said[1].split(", ")] == [*map(str, WIDTHS), "32"]
    folder = trained_folder(Path(asked.output_dir))
    encoder = load_encoder(folder)
    images = [np.full((20, 24, 3), shade, np.uint8) for shade in (0, 90, 200)]
    whole = encoder.encode(images)
    for width in (1, *WIDTHS, WIDTH):
        assert np.array_equal(encoder.encode(images, truncate=width), whole[:, :width])
    for wrong in (0, -1, WIDTH + 1):
        with pytest.raises(ValueError, match=f"truncate={wrong}: must be 1 to {WIDTH}"):
            encoder.encode(images, truncate=wrong)

    # sentence-transformers cuts what it pools, after the final norm
    sentence_transformers = pytest.importorskip("sentence_transformers")
    pictures = [Image.fromarray(image) for image in images]
    vectors = []
    for cut in ({}, {"truncate_dim": WIDTHS[1]}):
        model = sentence_transformers.SentenceTransformer(str(folder), device="cpu", **cut)
        vectors.append(model.encode(pictures))
    np.testing.assert_allclose(vectors[1], vectors[0][:, : WIDTHS[1]], atol=1e-6)


def test_the_line_about_widths_counts_places() -> None:
    """As scikit-learn and scipy count them."""
    plain = torch.tensor([[1.0, 0.0], [2.0, 5.0], [3.0, 1.0], [-1.0, 2.0]])
    views = TwoViews(
        plain, plain.flip(0) * torch.tensor([1.0, 0.0]) + plain * torch.tensor([0.0, 1.0])
    )
    expected = []
    for width in (1, 2):
        table = StandardScaler().fit(plain[:, :width])
        a, b = (table.transform(side[:, :width]) for side in (views.plain, views.copies))
        cosines = cosine_similarity(b, a)
        ranks = [rankdata(-row)[place] for place, row in enumerate(cosines)]
        expected.append(f"{100 * np.mean(1 / np.array(ranks)):.1f} % by {width}")
    assert (
        nested_line(views, [1]) == f"Of 2 channels the first ones alone: MRR {', '.join(expected)}."
    )


# ---- wrong use


@pytest.mark.parametrize(
    ("fields", "shape", "says"),
    [
        ({"head_blocks": [0, 1]}, {}, r"matryoshka.*needs a head on the encoder's output; add"),
        (
            {},
            {"hidden_size": 36, "num_attention_heads": 3},
            r"the encoder's width must be a multiple of 8, is 36",
        ),
    ],
)
def test_what_cannot_be_nested_is_refused(
    fields: dict[str, Any], shape: dict[str, int], says: str
) -> None:
    config = MimRefinerConfig(**{**SHAPE, **shape})
    with pytest.raises(ValueError, match=says) as refused:
        resolve(RefineRecipe(model="m", matryoshka=True, **fields), config, num_images=1000)
    assert "\n" not in str(refused.value)
