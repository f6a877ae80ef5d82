"""One whole step against the authors' code.

Heads, queue, objective, every gradient, and the exact micro-batches.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_cases import contents, facts, tensors

from mim_refiner_hf import MimRefinerModel
from mim_refiner_hf.conversion import load_encoder
from mim_refiner_hf.refinement.heads import IdHeads
from mim_refiner_hf.refinement.loss import Pairs, head_weights, nna_loss, pair_weights
from mim_refiner_hf.refinement.queue import NearestNeighbourQueue
from mim_refiner_hf.refinement.refiner import NnaSettings, Refiner, neighbour_draw
from mim_refiner_hf.refinement.trainer import compile_blocks
from mim_refiner_hf.runtime.optimisation import freeze


def fill_heads(
    heads: IdHeads, queue: NearestNeighbourQueue, states: list[dict[str, torch.Tensor]]
) -> None:
    """Stack one state dict per head, in the authors' names, into the grouped parameters."""
    for part in ("projector", "predictor"):
        for i, layer in enumerate(getattr(heads, part)):
            stacked = {
                name: torch.stack([state[f"{part}.{i}.{key}"] for state in states])
                for name, key in (
                    ("weight", "0.weight"),
                    ("scale", "1.weight"),
                    ("shift", "1.bias"),
                    ("mean", "1.running_mean"),
                    ("var", "1.running_var"),
                )
            }
            with torch.no_grad():
                layer.weight.copy_(stacked["weight"])
                layer.norm.weight.copy_(stacked["scale"])
                layer.norm.bias.copy_(stacked["shift"])
            layer.norm.running_mean.copy_(stacked["mean"])
            layer.norm.running_var.copy_(stacked["var"])
    fill_queue(
        queue,
        [
            {key: state[f"queue.{key}"] for key in ("x", "idx", "cls", "age", "ptr")}
            for state in states
        ],
    )


def fill_queue(queue: NearestNeighbourQueue, states: list[dict[str, torch.Tensor]]) -> None:
    rows = torch.stack([state["x"] for state in states])
    queue.norms.copy_(rows.norm(dim=-1))
    queue.rows.copy_(rows / rows.norm(dim=-1, keepdim=True))
    for ours, theirs in (("sample_index", "idx"), ("labels", "cls"), ("age", "age")):
        getattr(queue, ours).copy_(states[0][theirs])
    queue.pointer.copy_(states[0]["ptr"].squeeze())


def raw_rows(queue: NearestNeighbourQueue) -> torch.Tensor:
    return queue.rows * queue.norms.unsqueeze(-1)


def head_gradients(heads: IdHeads, head: int) -> dict[str, torch.Tensor]:
    """Gradients of one head in the authors' names."""
    return {
        f"{part}.{i}.{key}": parameter.grad[head]
        for part in ("projector", "predictor")
        for i, layer in enumerate(getattr(heads, part))
        for key, parameter in (
            ("0.weight", layer.weight),
            ("1.weight", layer.norm.weight),
            ("1.bias", layer.norm.bias),
        )
    }


def encoder_gradient(encoder: torch.nn.Module, name: str) -> torch.Tensor:
    """The gradient of the tensor that the authors call `name`."""
    name = name.replace("patch_embed.proj", "embeddings.patch_embeddings").replace(
        "cls_tokens.tokens", "embeddings.cls_token"
    )
    name = (
        name.replace("embed_norm.", "embeddings.norm.")
        .replace("blocks.", "layers.")
        .replace(".attn.proj", ".attention.o_proj")
    )
    parameters = dict(encoder.named_parameters())
    if ".attn.qkv" in name:
        parts = [parameters[name.replace("attn.qkv", f"attention.{p}_proj")].grad for p in "qkv"]
        return torch.cat(parts)
    return parameters[name].grad


# the words of the fixtures, and ours
PAIRS: dict[str, Pairs] = {"intended": "intended", "official": "released"}


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("case", facts("nna-loss").get("cases", []), ids=lambda case: case["key"])
@pytest.mark.parametrize("swap", ["nnclr", "allswap"])
@pytest.mark.parametrize("pairs", ["intended", "official"])
def test_nna_loss(case: dict[str, Any], swap: str, pairs: str) -> None:
    inputs, outputs = tensors("nna-loss")
    num_global, num_local = case["num_global"], case["num_local"]
    views = case["key"].partition(".t")[0]
    names = ("projected_preswap", "projected_postswap", "predicted")
    pre, post, predicted = (inputs[f"{views}.{name}"] for name in names)
    predicted.requires_grad_()

    weights = pair_weights(num_global, num_global + num_local, PAIRS[pairs])
    # (1 head, views, batch, dim)
    columns = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (pre, post, predicted)]
    loss, alignment = nna_loss(
        *columns,
        weights,
        temperature=case["temperature"],
        swap="positive" if swap == "nnclr" else "all",
    )
    loss.sum().backward()

    key = f"{case['key']}.{swap}.{pairs}"
    torch.testing.assert_close(loss[0], outputs[f"{key}.total"], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        predicted.grad, outputs[f"{key}.grad_predicted"], atol=1e-5, rtol=1e-3
    )
    if swap == "nnclr":
        among_global = num_global * (num_global - 1)
        with_local = num_global * num_local
        expected = among_global * outputs[f"{key}.global_alignment"]
        if num_local:
            expected += with_local * outputs[f"{key}.local_alignment"]
        expected /= among_global + with_local
        torch.testing.assert_close(alignment[0], expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("goldens")
def test_nna_loss_of_one_process_of_several() -> None:
    inputs, outputs = tensors("nna-loss")
    names = ("projected_preswap", "projected_postswap", "predicted")
    pre, post, predicted = (inputs[f"ddp2.{name}"].transpose(0, 1).unsqueeze(0) for name in names)
    _, num_global, num_rows, _ = pre.shape
    num_local = predicted.shape[1] - num_global

    totals = [key for key in outputs if re.fullmatch(r"ddp2\.t.*\.rank\d+\.total", key)]
    batch = num_rows // len(totals)
    assert batch == facts("nna-loss")["batch_size"]
    for key in totals:
        temperature, rank = re.fullmatch(
            r"ddp2\.t(.*)\.nnclr\.official\.rank(\d+)\.total", key
        ).groups()
        first = batch * int(rank)
        own = slice(first, first + batch)
        loss, _ = nna_loss(
            pre[:, :, own],
            post[:, :, own],
            predicted,
            pair_weights(num_global, num_global + num_local, "released"),
            temperature=float(temperature),
            first_row=first,
        )
        torch.testing.assert_close(loss[0], outputs[key], atol=1e-5, rtol=0)


def test_nna_loss_of_many_heads_is_a_loop_over_pairs() -> None:
    targets, neighbours, predictions = (
        torch.randn(3, 2, 5, 7),
        torch.randn(3, 2, 5, 7),
        torch.randn(3, 6, 5, 7),
    )
    for swap in ("positive", "all", "none"):
        loss, _ = nna_loss(
            targets, neighbours, predictions, pair_weights(2, 6), temperature=0.3, swap=swap
        )
        for head in range(3):
            terms = []
            for i in range(2):
                for j in range(6):
                    if i == j:
                        continue
                    t, n, p = (
                        F.normalize(x, dim=-1)
                        for x in (targets[head, i], neighbours[head, i], predictions[head, j])
                    )
                    logits = (n if swap == "all" else t) @ p.T / 0.3
                    if swap == "positive":
                        logits = torch.where(torch.eye(5).bool(), n @ p.T / 0.3, logits)
                    terms.append(F.cross_entropy(logits, torch.arange(5)))
            torch.testing.assert_close(loss[head], torch.stack(terms).mean())


SEQUENCES = facts("nn-queue").get("sequences", [])


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("case", SEQUENCES, ids=lambda case: case["name"])
def test_queue(case: dict[str, Any]) -> None:
    inputs, outputs = tensors("nn-queue")
    name, topk, views = case["name"], case["topk"], case["num_views"]
    queue = NearestNeighbourQueue(1, case["size"], case["dim"])
    start = ("x", "idx", "cls", "age", "ptr")
    fill_queue(queue, [{key: inputs[f"{name}.init.{key}"] for key in start}])

    for number in range(case["calls"]):
        call = f"{name}.call{number}"
        x, index, labels = (inputs[f"{call}.{key}"] for key in ("x", "idx", "cls"))
        targets = x.view(1, views, -1, case["dim"])
        if topk == 1:
            assert_nearest(queue, targets, index, outputs, call)
        else:
            candidates = outputs[f"{call}.candidate_queue_indices"]
            for k in range(topk):
                draw = torch.full((1, views, len(index)), k)
                found = queue.lookup(targets, index, topk=topk, draw=draw)
                assert torch.equal(found.positions.flatten(), candidates[:, k])

        queue.enqueue(targets[:, 0], index, labels)
        after = outputs[f"{call}.after.x"]
        torch.testing.assert_close(raw_rows(queue)[0], after, atol=1e-6, rtol=1e-6)
        for ours, theirs in (("sample_index", "idx"), ("labels", "cls"), ("age", "age")):
            assert torch.equal(getattr(queue, ours), outputs[f"{call}.after.{theirs}"].long())
        assert queue.pointer == outputs[f"{call}.after.ptr"].squeeze()


def assert_nearest(
    queue: NearestNeighbourQueue,
    targets: torch.Tensor,
    index: torch.Tensor,
    outputs: dict[str, torch.Tensor],
    call: str,
) -> None:
    """The nearest row of every target: which, its values, its cosine, its age.

    Also in evaluation.
    """
    found = queue.lookup(targets, index)
    places = found.positions.flatten()
    assert torch.equal(places, outputs[f"{call}.nn_queue_index"])
    assert torch.equal(queue.age[places], outputs[f"{call}.nn_age"].flatten().long())
    torch.testing.assert_close(
        raw_rows(queue)[0][places], outputs[f"{call}.nn_x"], atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        found.similarity.mean(), outputs[f"{call}.nn_similarity"].squeeze(), atol=1e-5, rtol=0
    )
    evaluated = queue.lookup(targets, index, exclude_self=False).positions.flatten()
    assert torch.equal(evaluated, outputs[f"{call}.eval_mode_nn_queue_index"])


@pytest.mark.usefixtures("goldens")
def test_id_head() -> None:
    inputs, outputs = tensors("id-head")
    case = facts("id-head")
    dim, batch, views = case["output_dim"], case["batch_size"], case["num_teacher_views"]
    heads = IdHeads(1, case["input_dim"], case["proj_hidden_dim"], case["pred_hidden_dim"], dim)
    queue = NearestNeighbourQueue(1, case["queue_size"], dim)
    fill_heads(heads, queue, [contents("id-head", "head.th")["state_dict"]])

    projected, predicted = heads(inputs["x"].unsqueeze(0))
    preswap = projected[:, : views * batch].detach()
    found = queue.lookup(preswap.view(1, views, batch, dim), inputs["idx"])
    postswap = raw_rows(queue)[0][found.positions.flatten()]
    for name, tensor in (
        ("predicted", predicted[0]),
        ("projected_preswap", preswap[0]),
        ("projected_postswap", postswap),
    ):
        expected = outputs[f"train.{name}"].reshape(-1, dim)
        torch.testing.assert_close(tensor, expected, atol=1e-4, rtol=0)

    for part in ("projector", "predictor"):
        for i, layer in enumerate(getattr(heads, part)):
            for name in ("running_mean", "running_var"):
                statistic = getattr(layer.norm, name)[0]
                expected = outputs[f"after_train.{part}.{i}.1.{name}"]
                torch.testing.assert_close(statistic, expected, atol=1e-5, rtol=1e-4)


def head_names(case: dict[str, Any]) -> list[str]:
    """The heads from the earliest block to the output: "cls1" reads block 1, "main" the last."""
    earlier = [name for name in case["heads"] if name != "main"]
    return [*sorted(earlier, key=lambda name: int(name.removeprefix("cls"))), "main"]


def below(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def build_refiner(
    kind: str, tmp_path: Path, pairs: Pairs = "intended"
) -> tuple[Refiner, dict[str, torch.Tensor]]:
    """The whole model of a golden step, and the step's inputs."""
    case = facts(f"refine-step-{kind}")
    inputs, _ = tensors(f"refine-step-{kind}")
    state = contents(f"refine-step-{kind}", "init.th")["state_dict"]
    torch.save({"state_dict": below(state, "encoder.")}, tmp_path / "encoder.th")
    encoder = load_encoder(tmp_path / "encoder.th", num_heads=case["num_heads"])

    names = head_names(case)
    dim = case["output_dim"]
    heads = IdHeads(len(names), case["dim"], case["proj_hidden_dim"], case["pred_hidden_dim"], dim)
    queue = NearestNeighbourQueue(len(names), case["queue_size"], dim)
    fill_heads(heads, queue, [below(state, f"heads.{name}.") for name in names])

    blocks = [int(name.removeprefix("cls")) for name in names[:-1]]
    refiner = Refiner(
        encoder,
        [*blocks, case["depth"] - 1],
        heads,
        queue,
        NnaSettings(
            num_global=case["num_global"],
            num_views=case["num_global"] + case["num_local"],
            temperature=case["temperature"],
            pairs=pairs,
        ),
    )
    return refiner.train(), inputs


# every way through a step: images at a time, and what is done to the encoder. Grouped heads, the
# queue's kept norms, the loss in one product with its own gradient, and the last block without
# patches are part of all of them.
PATHS: dict[str, tuple[int | None, Callable[[MimRefinerModel], object]]] = {
    "whole batch": (None, lambda encoder: None),
    "micro-batches, one graph kept": (2, lambda encoder: None),
    "micro-batches, each computed twice": (1, lambda encoder: None),
    "activation checkpointing": (None, lambda encoder: encoder.gradient_checkpointing_enable()),
    "compiled blocks": (None, lambda encoder: compile_blocks(encoder, backend="aot_eager")),
}


@pytest.mark.slow
@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("kind", ["prenorm", "postnorm"])
@pytest.mark.parametrize("pairs", ["intended", "official"])
@pytest.mark.parametrize("path", PATHS)
def test_refine_step(tmp_path: Path, kind: str, pairs: str, path: str) -> None:
    case = facts(f"refine-step-{kind}")
    _, outputs = tensors(f"refine-step-{kind}")
    refiner, inputs = build_refiner(kind, tmp_path, PAIRS[pairs])
    micro, prepare = PATHS[path]
    prepare(refiner.encoder)

    views = [inputs["global_views"], inputs["local_views"]]
    result = refiner.backward(views, inputs["idx"], inputs["cls"], micro_batch_size=micro)
    names = head_names(case)
    torch.testing.assert_close(
        result.loss.detach(), outputs[f"{pairs}.loss.total"], atol=1e-5 * len(names), rtol=0
    )
    for head, name in enumerate(names):
        torch.testing.assert_close(
            result.head_losses[head], outputs[f"{pairs}.loss.{name}"], atol=1e-5, rtol=0
        )
        assert_head(refiner, head, below(outputs, f"after_forward.heads.{name}."))
        for key, gradient in head_gradients(refiner.heads, head).items():
            expected = outputs[f"{pairs}.grad.heads.{name}.{key}"]
            torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)

    # every tensor of the encoder but the positions, which are a buffer
    expected = below(outputs, f"{pairs}.grad.encoder.")
    state = below(contents(f"refine-step-{kind}", "init.th")["state_dict"], "encoder.")
    assert set(expected) == {name for name in state if not name.startswith("pos_embed")}
    for key, tensor in expected.items():
        gradient = encoder_gradient(refiner.encoder, key)
        torch.testing.assert_close(gradient, tensor, atol=1e-5, rtol=1e-3)


def assert_head(refiner: Refiner, head: int, expected: dict[str, torch.Tensor]) -> None:
    """The queue of one head and its statistics are those of the authors after the step."""
    rows = raw_rows(refiner.queue)[head]
    torch.testing.assert_close(rows, expected["queue.x"], atol=1e-4, rtol=0)
    for part in ("projector", "predictor"):
        for i, layer in enumerate(getattr(refiner.heads, part)):
            for name in ("running_mean", "running_var"):
                statistic = getattr(layer.norm, name)[head]
                torch.testing.assert_close(
                    statistic, expected[f"{part}.{i}.1.{name}"], atol=1e-4, rtol=1e-4
                )


@pytest.mark.usefixtures("goldens")
def test_micro_batches_are_exact_in_double_precision(tmp_path: Path) -> None:
    gradients = []
    for micro in (None, 2):
        refiner, inputs = build_refiner("prenorm", tmp_path)
        # position tables are resized in fp32, and never trained
        freeze(refiner.double().encoder, blocks=0)
        views = [inputs["global_views"].double(), inputs["local_views"].double()]
        refiner.backward(views, inputs["idx"], inputs["cls"], micro_batch_size=micro)
        trained = [p.grad.flatten() for p in refiner.parameters() if p.grad is not None]
        gradients.append(torch.cat(trained))
    assert (gradients[0] - gradients[1]).norm() <= 1e-12 * gradients[0].norm()


@pytest.mark.usefixtures("goldens")
def test_head_warmup_leaves_the_encoder_alone(tmp_path: Path) -> None:
    refiner, inputs = build_refiner("prenorm", tmp_path)
    views = [inputs["global_views"], inputs["local_views"]]
    refiner.backward(views, inputs["idx"], inputs["cls"], train_encoder=False)
    assert all(p.grad is None for p in refiner.encoder.parameters())
    assert all(p.grad is not None for p in refiner.heads.parameters())


def test_neighbour_draw_is_a_function_of_seed_and_step() -> None:
    first = neighbour_draw(0, 5, 20, 8, 2, 64)
    assert torch.equal(first, neighbour_draw(0, 5, 20, 8, 2, 64))
    assert not torch.equal(first, neighbour_draw(0, 6, 20, 8, 2, 64))
    assert first.min() == 0 and first.max() == 19
    assert neighbour_draw(0, 5, 1, 8, 2, 64) is None


def test_loss_schedules_match_the_released_recipes() -> None:
    """20 epochs, 8 heads: staggered turns end at epochs 4, 6, ..., 16.

    The uniform decay starts at epoch 4.
    """
    for step in range(101):
        progress = step / 100
        for schedule in (
            "constant",
            "uniform_decay",
            "staggered_decay",
            "staggered_step",
            "one_hot",
        ):
            weights = head_weights(schedule, 8, progress)
            assert len(weights) == 8 and weights[-1] == 1 and all(0 <= w <= 1 for w in weights)
    assert head_weights("constant", 8, 0.9) == [1.0] * 8
    assert head_weights("staggered_step", 8, 9 / 20) == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert head_weights("one_hot", 8, 5 / 20) == [0.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 1.0]
    assert head_weights("uniform_decay", 3, 0.6) == pytest.approx([0.5, 0.5, 1.0])
    assert head_weights("staggered_decay", 8, 18 / 20)[-2] == pytest.approx(0.5)
    assert head_weights("staggered_decay", 1, 0.5) == [1.0]
