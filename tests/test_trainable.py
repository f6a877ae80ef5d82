"""`--trainable`: the last blocks, or low-rank adapters, which are then a PEFT adapter."""

import ast
import dataclasses
import json
import multiprocessing
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    SHAPE,
    assert_identical,
    final_state,
    losses,
    run_stopped_before,
    trained_folder,
)
from test_sharded import FSDP2, free_port, job

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel, RefineRecipe, load_encoder
from mim_refiner_hf.refinement import adapters
from mim_refiner_hf.refinement.adapters import adapt, adapter_of, merged_encoder
from mim_refiner_hf.refinement.memory import bytes_needed, encoder_parameters, fitting_micro_batch
from mim_refiner_hf.refinement.recipe_method import default_head_blocks
from mim_refiner_hf.refinement.resolve import ResolvedRecipe, resolve
from mim_refiner_hf.runs.plan import plan_text
from mim_refiner_hf.runs.refine import refine
from mim_refiner_hf.runs.run import run

pytestmark = pytest.mark.usefixtures("quick")

LAYERS = [*(f"attention.{part}_proj" for part in "qkvo"), "mlp.fc1", "mlp.fc2"]


# ---- what is trained


@pytest.mark.parametrize(("trainable", "frozen"), [("all", 0), ("last:1", 2), ("last:3", 0)])
def test_last_blocks_are_what_freezing_the_others_is(trainable: str, frozen: int) -> None:
    config = MimRefinerConfig(**SHAPE)
    asked = RefineRecipe(model="m", trainable=trainable)
    resolved = resolve(asked, config, num_images=1000)
    assert (resolved.freeze_blocks, resolved.lora_rank) == (frozen, 0)
    # heads stand on what is trained
    assert resolved.head_blocks == [block for block in (1, 2) if block >= frozen]
    # a run says both of itself, and goes on with both
    again = RefineRecipe(**resolved.as_written())
    assert resolve(again, config, num_images=1000).freeze_blocks == frozen


def test_adapters_learn_faster_and_longer_in_fewer_blocks() -> None:
    """Whatever the images; what is stated stays, and heads learn as beside the whole encoder."""
    pytest.importorskip("peft")
    config = MimRefinerConfig(**SHAPE)
    for images in (100, 1000, 10_000):
        whole = resolve(RefineRecipe(model="m"), config, images)
        asked = RefineRecipe(model="m", trainable="lora:4")
        found = resolve(asked, config, images)
        assert (found.freeze_blocks, found.layer_decay) == (1, 1.0)
        assert found.learning_rate == pytest.approx(10 * whole.learning_rate, rel=0.01)
        for rate in ("head_learning_rate", "refine_head_learning_rate"):
            assert getattr(found, rate) == pytest.approx(getattr(whole, rate), rel=0.01)
        assert found.steps.refine == pytest.approx(1.5 * whole.steps.refine, rel=0.05)

    # a head before the first adapter would train nothing
    placed: list[tuple[dict[str, Any], int]] = [
        ({"head_blocks": [0, 2]}, 0),
        ({"num_heads": 3}, 0),
        ({"num_heads": 2}, 1),
    ]
    for heads, first in placed:
        found = resolve(dataclasses.replace(asked, **heads), config, 1000)
        assert (found.freeze_blocks, found.head_blocks[0]) == (first, first)

    # no depth loses a head by it, nor a block that measuring may put one on
    for layers in range(1, 41):
        config = MimRefinerConfig(**{**SHAPE, "num_hidden_layers": layers})
        open_blocks = resolve(asked, config, 1000)
        assert open_blocks.head_blocks == default_head_blocks(layers)
        assert open_blocks.freeze_blocks == open_blocks.head_blocks[0]
        measured = resolve(dataclasses.replace(asked, head_blocks="auto"), config, 1000)
        assert measured.freeze_blocks == min(layers // 2, open_blocks.freeze_blocks)

    stated = dataclasses.replace(asked, freeze_blocks=0, learning_rate=0.5, epochs=3.0)
    found = resolve(stated, config, 1000)
    assert (found.freeze_blocks, found.learning_rate, found.epochs) == (0, 0.5, 3.0)
    assert found.refine_head_learning_rate == found.head_learning_rate == 0.5


@pytest.mark.parametrize("first", [0, 2])
def test_the_plan_counts_what_is_trained(first: int) -> None:
    pytest.importorskip("peft")
    config = MimRefinerConfig(**SHAPE)
    asked = RefineRecipe(model="m", trainable="lora:4", freeze_blocks=first, save_every=0)
    text = plan_text(
        resolve(asked, config, num_images=1000), config, num_eval=0, device="cpu", available=2**33
    )
    encoder = MimRefinerModel(config)
    adapt(encoder, 4, first, seed=0)
    trained = [p.numel() for p in encoder.parameters() if p.requires_grad]
    total = sum(p.numel() for p in encoder.parameters())
    counted = encoder_parameters(config, first, lora_rank=4)
    assert (counted.total, counted.trained) == (total, sum(trained))
    assert f"all but adapters of rank 4 in blocks {first} and later; " in text
    assert f"{sum(trained) / 1e3:.1f} k weights of the encoder train, " in text
    assert f"{100 * sum(trained) / total:.1f} %" in text


def test_the_plan_names_adapters_where_the_whole_does_not_fit() -> None:
    """A ViT with little memory: of 253 M weights, gradients and moments do not fit."""
    pytest.importorskip("peft")
    config = MimRefinerConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    resolved = resolve(RefineRecipe(model="m"), config, num_images=1000)

    def lines(recipe: ResolvedRecipe, gigabytes: float) -> str:
        free = int(gigabytes * 2**30)
        return plan_text(recipe, config, num_eval=0, device="cpu", available=free)

    named = re.search(
        r"it does not fit: (trainable='lora:8'.*) needs (\d\.\d\d) GiB and trains adapters in "
        "place of its weights; or lower",
        lines(resolved, 5),
    )
    assert named is not None and float(named[2]) < 5
    # what is named, and nothing else, needs as much; the micro-batch is open and chooses itself
    words = dict(re.findall(r"(\w+)=('[\w:]+'|\w+)", named[1]))
    settings = {name: ast.literal_eval(word) for name, word in words.items()}
    found = resolve(RefineRecipe(model="m", **settings), config, num_images=1000)
    micro = fitting_micro_batch(found, config, 5 * 2**30)
    needed = bytes_needed(dataclasses.replace(found, micro_batch_size=micro), config)
    assert needed / 2**30 == pytest.approx(float(named[2]), abs=0.01)
    for recipe, gigabytes in (
        # it fits, neither fits, adapters are there
        (resolved, 50),
        (resolved, 1),
        (dataclasses.replace(resolved, trainable="lora:8", freeze_blocks=16), 1),
    ):
        assert "trains adapters" not in lines(recipe, gigabytes)


@pytest.mark.parametrize("gated", [False, True])
def test_adapters_begin_as_none_and_merge(gated: bool) -> None:
    """On attention and MLP, and on nothing else; a pure function of the seed."""
    pytest.importorskip("peft")
    torch.manual_seed(3)
    kind = {"hidden_act": "silu", "gated_mlp": True} if gated else {}
    encoder = MimRefinerModel(MimRefinerConfig(**SHAPE, **kind)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    before = encoder(pixels).pooler_output
    names = encoder.state_dict().keys()
    drawn = torch.random.get_rng_state()
    adapt(encoder, 4, 1, seed=5)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert torch.equal(encoder(pixels).pooler_output, before)

    other = MimRefinerModel(MimRefinerConfig(**SHAPE, **kind))
    adapt(other, 4, 1, seed=5)
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        assert torch.equal(parameter, dict(other.named_parameters())[name])
    layers = [*LAYERS, "mlp.gate"] if gated else LAYERS
    assert {name.split(".lora_")[0] for name in trained} == {
        f"layers.{block}.{layer}" for block in (1, 2) for layer in layers
    }

    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(std=0.1)
    after = encoder(pixels).pooler_output
    plain = merged_encoder(encoder)
    assert type(plain) is MimRefinerModel and plain.state_dict().keys() == names
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(plain(pixels).pooler_output, after, atol=1e-5, rtol=0)
    # it is a copy
    assert torch.equal(encoder(pixels).pooler_output, after)
    assert merged_encoder(plain) is plain and adapter_of(plain) is None


# ---- whole runs


@pytest.fixture
def lora(recipe: Callable[..., RefineRecipe]) -> Callable[..., RefineRecipe]:
    pytest.importorskip("peft")
    return lambda output="out", **changes: recipe(output, trainable="lora:4", **changes)


def test_a_run_leaves_a_model_and_the_adapter_that_makes_it(
    lora: Callable[..., RefineRecipe],
) -> None:
    import peft

    asked = lora()
    result = refine(asked)
    assert result is not None and result.adapter is not None
    output = Path(asked.output_dir)
    start = load_encoder(asked.model)
    ours = load_encoder(trained_folder(output))
    assert ours.state_dict().keys() == start.state_dict().keys()
    changed = {
        name
        for name, tensor in ours.state_dict().items()
        if not torch.equal(tensor, start.state_dict()[name])
    }
    # from the first block with a head on
    assert changed == {f"layers.{block}.{layer}.weight" for block in (1, 2) for layer in LAYERS}

    name = "adapter_not_shipped" if result.verdict.ships_start else "adapter"
    folder = output / name
    assert {"adapter", "adapter_not_shipped"} & {path.name for path in output.iterdir()} == {name}
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    assert f"load_encoder({asked.model!r})" in (folder / "README.md").read_text()
    base = load_encoder(asked.model)
    adapted = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = ours(pixels).pooler_output
        found = adapted(pixels).pooler_output
        assert (expected - start(pixels).pooler_output).abs().max() > 1e-3
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    again = adapted.merge_and_unload().state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again[name], tensor), name

    # of an encoder that no name gives again, the start stays beside it
    result = refine(dataclasses.replace(asked, output_dir=f"{output}-2"), model=start)
    assert result is not None and result.adapter is not None
    assert result.adapter.base == str(output.with_name("out-2") / "start")
    assert (output.with_name("out-2") / "start/config.json").is_file()


def test_killed_and_continued_it_ends_with_the_same_bits(
    lora: Callable[..., RefineRecipe],
) -> None:
    whole = lora("whole")
    run(whole)
    asked = lora("pieces")
    run_stopped_before(asked, (3, 5, 7))
    assert_identical(asked, whole)
    state = final_state(whole)
    moved = [
        n
        for n in state
        if n.startswith("average.")
        and not torch.equal(state[n], state[n.replace("average.", "refiner.encoder.")])
    ]
    # averaged are the factors of both kinds, and nothing else
    assert moved and all("lora_" in name for name in moved)
    with pytest.raises(ValueError, match="trainable was lora:4, is lora:2"):
        run(dataclasses.replace(whole, trainable="lora:2"))

    # micro-batches, recomputed, are the same step
    other = lora("micro", micro_batch_size=5, gradient_checkpointing=True)
    run(other)
    assert losses(other) == pytest.approx(losses(whole), abs=1e-4)

    # another run begins with what the adapters have made of the encoder, with or without some
    for trainable in ("all", "lora:2"):
        new = lora(f"new-{trainable[:3]}", model=None, init_from=whole.output_dir, max_steps=1)
        run(dataclasses.replace(new, trainable=trainable, head_blocks=None))


def process(rank: int, port: int, recipe: RefineRecipe, sharded: bool) -> None:
    """One of two processes of a run."""
    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {name: str(value) for name, value in own.items()}
    if sharded:
        os.environ |= FSDP2
    with job(rank, port):
        result = run(recipe)
        assert result is not None and result.adapter is not None
        if rank == 0:
            torch.save(result.refined.state_dict(), Path(recipe.output_dir) / "refined.pt")


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "FSDP2"])
def test_two_processes_are_one(sharded: bool, lora: Callable[..., RefineRecipe]) -> None:
    # AdamW's first steps are the sign of the gradient, which makes much of rounding: small ones
    small = {"batch_size": 16, "learning_rate": 4e-5, "head_learning_rate": 4e-5}
    alone = run(lora("alone", **small))
    assert alone is not None
    asked = lora("two", **small)
    multiprocessing.set_forkserver_preload(["mim_refiner_hf.cli"])
    arguments = (free_port(), asked, sharded)
    torch.multiprocessing.start_processes(process, arguments, nprocs=2, start_method="forkserver")
    found = torch.load(Path(asked.output_dir) / "refined.pt", weights_only=True)
    for name, tensor in alone.refined.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)


# ---- wrong use


@pytest.mark.parametrize("word", ["some", "lora", "lora:0", "last:0", "lora:-1", "last:x", ""])
def test_an_unknown_word_is_refused(word: str) -> None:
    with pytest.raises(ValueError) as refused:
        RefineRecipe(model="m", trainable=word)
    assert "trainable=" in str(refused.value) and "\n" not in str(refused.value)
    assert "must be all, last:N or lora:R" in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"trainable": "last:4"}, r"trainable='?last:4'?: the encoder has only 3 blocks"),
        (
            {"trainable": "last:1", "freeze_blocks": 1},
            r"freeze_blocks=1 and trainable='?last:1'? exclude each other",
        ),
        ({"trainable": "last:1", "head_blocks": [1, 2]}, "head on block 1 would train nothing"),
        ({"trainable": "lora:33"}, r"trainable='?lora:33'?: the rank must be at most 32"),
        ({"trainable": "lora:4", "freeze_blocks": 3}, "at least one must be trained"),
    ],
)
def test_what_does_not_fit_the_encoder_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        resolve(RefineRecipe(model="m", **fields), MimRefinerConfig(**SHAPE), num_images=1000)


def test_nothing_to_adapt_and_no_peft_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = RefineRecipe(model="m", trainable="lora:4")
    with monkeypatch.context() as patched:
        patched.setattr(adapters, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r'peft is missing; pip install ".*\[lora\]"'):
            resolve(asked, MimRefinerConfig(**SHAPE), num_images=1000)
        # nobody else needs it
        all_of_it = RefineRecipe(model="m")
        assert resolve(all_of_it, MimRefinerConfig(**SHAPE), num_images=1000).trainable == "all"
    monkeypatch.setattr(adapters, "adapted_layers", lambda encoder, first: {})
    with pytest.raises(ValueError, match="no linear layers of attention and MLP to adapt"):
        resolve(asked, MimRefinerConfig(**SHAPE), num_images=1000)
