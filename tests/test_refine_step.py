"""One whole step against the authors' code: heads, queue, objective, every gradient, and the exact micro-batches."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mim_refiner_hf import MimRefinerModel
from mim_refiner_hf.conversion import load_encoder
from mim_refiner_hf.refinement.heads import IdHeads
from mim_refiner_hf.refinement.loss import head_weights, nna_loss, pair_weights
from mim_refiner_hf.refinement.queue import NearestNeighbourQueue
from mim_refiner_hf.refinement.refiner import Refiner, neighbour_draw
from mim_refiner_hf.refinement.trainer import compile_blocks
from mim_refiner_hf.runtime.optimisation import freeze


def load_golden(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")


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


def official_pairs(num_global: int, num_local: int) -> torch.Tensor:
    """The released code's pairs: its local loop starts at view 0."""
    weights = torch.zeros(num_global, num_global + num_local)
    weights[:, :num_global] += 1 - torch.eye(num_global)
    weights[:, :num_local] += 1
    return weights / (num_global * (num_global - 1) + num_global * num_local)


@pytest.mark.parametrize("local", [0, 4, 10])
@pytest.mark.parametrize("temperature", [0.2, 0.35])
@pytest.mark.parametrize("swap", ["nnclr", "allswap"])
@pytest.mark.parametrize("pairs", ["intended", "official"])
def test_nna_loss(goldens: Path, local: int, temperature: float, swap: str, pairs: str) -> None:
    inputs, outputs = load_golden(goldens / "nna-loss")
    pre, post, predicted = (
        inputs[f"g2l{local}.{n}"] for n in ("projected_preswap", "projected_postswap", "predicted")
    )
    predicted.requires_grad_()
    weights = pair_weights(2, 2 + local) if pairs == "intended" else official_pairs(2, local)
    columns = [
        t.transpose(0, 1).unsqueeze(0) for t in (pre, post, predicted)
    ]  # (1, views, batch, dim)
    loss, alignment = nna_loss(
        *columns, weights, temperature=temperature, swap="positive" if swap == "nnclr" else "all"
    )
    loss.sum().backward()
    key = f"g2l{local}.t{temperature}.{swap}.{pairs}"
    torch.testing.assert_close(loss[0], outputs[f"{key}.total"], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        predicted.grad, outputs[f"{key}.grad_predicted"], atol=1e-5, rtol=1e-3
    )
    if swap == "nnclr":
        terms = [(2, f"{key}.global_alignment"), (2 * local, f"{key}.local_alignment")]
        expected = sum(n * outputs[name] for n, name in terms if n) / sum(n for n, _ in terms)
        torch.testing.assert_close(alignment[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_nna_loss_of_one_process_of_two(goldens: Path, rank: int) -> None:
    inputs, outputs = load_golden(goldens / "nna-loss")
    own = slice(8 * rank, 8 * rank + 8)
    pre, post, predicted = (
        inputs[f"ddp2.{n}"].transpose(0, 1).unsqueeze(0)
        for n in ("projected_preswap", "projected_postswap", "predicted")
    )
    loss, _ = nna_loss(
        pre[:, :, own],
        post[:, :, own],
        predicted,
        official_pairs(2, 4),
        temperature=0.2,
        first_row=8 * rank,
    )
    torch.testing.assert_close(
        loss[0], outputs[f"ddp2.t0.2.nnclr.official.rank{rank}.total"], atol=1e-5, rtol=0
    )


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


@pytest.mark.parametrize("case", ["wrap", "exact", "top20"])
def test_queue(goldens: Path, case: str) -> None:
    inputs, outputs = load_golden(goldens / "nn-queue")
    config = next(
        c
        for c in json.loads((goldens / "nn-queue/config.json").read_text())["sequences"]
        if c["name"] == case
    )
    queue = NearestNeighbourQueue(1, config["size"], config["dim"])
    fill_queue(
        queue, [{key: inputs[f"{case}.init.{key}"] for key in ("x", "idx", "cls", "age", "ptr")}]
    )
    for call in range(config["calls"]):
        x, index, labels = (inputs[f"{case}.call{call}.{key}"] for key in ("x", "idx", "cls"))
        targets = x.view(1, 2, -1, config["dim"])
        if config["topk"] == 1:
            found = queue.lookup(targets, index)
            expected = outputs[f"{case}.call{call}.nn_queue_index"]
            assert torch.equal(found.positions.flatten(), expected)
            torch.testing.assert_close(
                raw_rows(queue)[0][found.positions.flatten()],
                outputs[f"{case}.call{call}.nn_x"],
                atol=1e-6,
                rtol=0,
            )
            torch.testing.assert_close(
                found.similarity.mean(),
                outputs[f"{case}.call{call}.nn_similarity"].squeeze(),
                atol=1e-5,
                rtol=0,
            )
            assert torch.equal(
                queue.age[found.positions].flatten(),
                outputs[f"{case}.call{call}.nn_age"].flatten().long(),
            )
            evaluated = queue.lookup(targets, index, exclude_self=False).positions.flatten()
            assert torch.equal(evaluated, outputs[f"{case}.call{call}.eval_mode_nn_queue_index"])
        else:
            for k in range(20):
                found = queue.lookup(
                    targets, index, topk=20, draw=torch.full((1, 2, len(index)), k)
                )
                assert torch.equal(
                    found.positions.flatten(),
                    outputs[f"{case}.call{call}.candidate_queue_indices"][:, k],
                )
        queue.enqueue(targets[:, 0], index, labels)
        torch.testing.assert_close(
            raw_rows(queue)[0], outputs[f"{case}.call{call}.after.x"], atol=1e-6, rtol=1e-6
        )
        for ours, theirs in (("sample_index", "idx"), ("labels", "cls"), ("age", "age")):
            assert torch.equal(
                getattr(queue, ours), outputs[f"{case}.call{call}.after.{theirs}"].long()
            )
        assert queue.pointer == outputs[f"{case}.call{call}.after.ptr"].squeeze()


def test_id_head(goldens: Path) -> None:
    inputs, outputs = load_golden(goldens / "id-head")
    state = torch.load(goldens / "id-head/head.th", weights_only=True)["state_dict"]
    heads, queue = IdHeads(1, 48, 40, 56, 16), NearestNeighbourQueue(1, 32, 16)
    fill_heads(heads, queue, [state])
    projected, predicted = heads(inputs["x"].unsqueeze(0))
    found = queue.lookup(projected[:, :12].detach().view(1, 2, 6, 16), inputs["idx"])
    torch.testing.assert_close(
        predicted[0], outputs["train.predicted"].reshape(30, 16), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        projected[0, :12], outputs["train.projected_preswap"].reshape(12, 16), atol=1e-4, rtol=0
    )
    postswap = raw_rows(queue)[0][found.positions.flatten()]
    torch.testing.assert_close(
        postswap, outputs["train.projected_postswap"].reshape(12, 16), atol=1e-4, rtol=0
    )
    for part in ("projector", "predictor"):
        for i, layer in enumerate(getattr(heads, part)):
            for name in ("running_mean", "running_var"):
                torch.testing.assert_close(
                    getattr(layer.norm, name)[0],
                    outputs[f"after_train.{part}.{i}.1.{name}"],
                    atol=1e-5,
                    rtol=1e-4,
                )


def build_refiner(
    goldens: Path, case: str, tmp_path: Path
) -> tuple[Refiner, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    folder = goldens / f"refine-step-{case}"
    inputs, outputs = load_golden(folder)
    state = torch.load(folder / "init.th", weights_only=True)["state_dict"]
    encoder_state = {
        k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")
    }
    torch.save({"state_dict": encoder_state}, tmp_path / "encoder.th")
    encoder = load_encoder(tmp_path / "encoder.th", num_heads=2)
    heads, queue = IdHeads(3, 24, 24, 32, 12), NearestNeighbourQueue(3, 24, 12)
    names = ["cls1", "cls2", "main"]
    fill_heads(
        heads,
        queue,
        [
            {
                k.removeprefix(f"heads.{n}."): v
                for k, v in state.items()
                if k.startswith(f"heads.{n}.")
            }
            for n in names
        ],
    )
    refiner = Refiner(
        encoder, [1, 2, 3], heads, queue, num_global=2, num_views=5, temperature=0.2
    ).train()
    return refiner, inputs, outputs


# every way through a step: images at a time, and what is done to the encoder. Grouped heads, the queue's kept norms, the loss in
# one product with its own gradient, and the last block without patches are part of all of them.
PATHS: dict[str, tuple[int | None, Callable[[MimRefinerModel], object]]] = {
    "whole batch": (None, lambda encoder: None),
    "micro-batches, one graph kept": (2, lambda encoder: None),
    "micro-batches, each computed twice": (1, lambda encoder: None),
    "activation checkpointing": (None, lambda encoder: encoder.gradient_checkpointing_enable()),
    "compiled blocks": (None, lambda encoder: compile_blocks(encoder, backend="aot_eager")),
}


@pytest.mark.parametrize("case", ["prenorm", "postnorm"])
@pytest.mark.parametrize("pairs", ["intended", "official"])
@pytest.mark.parametrize("path", PATHS)
def test_refine_step(goldens: Path, tmp_path: Path, case: str, pairs: str, path: str) -> None:
    refiner, inputs, outputs = build_refiner(goldens, case, tmp_path)
    micro, prepare = PATHS[path]
    prepare(refiner.encoder)
    if pairs == "official":
        refiner.weights = official_pairs(2, 3)
    views = [inputs["global_views"], inputs["local_views"]]
    result = refiner.backward(views, inputs["idx"], inputs["cls"], micro_batch_size=micro)
    torch.testing.assert_close(
        result.loss.detach(), outputs[f"{pairs}.loss.total"], atol=3e-5, rtol=0
    )
    for head, name in enumerate(["cls1", "cls2", "main"]):
        torch.testing.assert_close(
            result.head_losses[head], outputs[f"{pairs}.loss.{name}"], atol=1e-5, rtol=0
        )
        for key, gradient in head_gradients(refiner.heads, head).items():
            torch.testing.assert_close(
                gradient, outputs[f"{pairs}.grad.heads.{name}.{key}"], atol=1e-5, rtol=1e-3
            )
        torch.testing.assert_close(
            raw_rows(refiner.queue)[head],
            outputs[f"after_forward.heads.{name}.queue.x"],
            atol=1e-4,
            rtol=0,
        )
        for part in ("projector", "predictor"):
            for i, layer in enumerate(getattr(refiner.heads, part)):
                for statistic in ("running_mean", "running_var"):
                    expected = outputs[f"after_forward.heads.{name}.{part}.{i}.1.{statistic}"]
                    torch.testing.assert_close(
                        getattr(layer.norm, statistic)[head], expected, atol=1e-4, rtol=1e-4
                    )
    prefix = f"{pairs}.grad.encoder."
    checked = [key for key in outputs if key.startswith(prefix)]
    assert len(checked) > 50
    for key in checked:
        gradient = encoder_gradient(refiner.encoder, key.removeprefix(prefix))
        torch.testing.assert_close(gradient, outputs[key], atol=1e-5, rtol=1e-3)


def test_micro_batches_are_exact_in_double_precision(goldens: Path, tmp_path: Path) -> None:
    gradients = []
    for micro in (None, 2):
        refiner, inputs, _ = build_refiner(goldens, "prenorm", tmp_path)
        freeze(
            refiner.double().encoder, blocks=0
        )  # position tables are resized in fp32, and never trained
        views = [inputs["global_views"].double(), inputs["local_views"].double()]
        refiner.backward(views, inputs["idx"], inputs["cls"], micro_batch_size=micro)
        gradients.append(
            torch.cat([p.grad.flatten() for p in refiner.parameters() if p.grad is not None])
        )
    assert (gradients[0] - gradients[1]).norm() <= 1e-12 * gradients[0].norm()


def test_head_warmup_leaves_the_encoder_alone(goldens: Path, tmp_path: Path) -> None:
    refiner, inputs, _ = build_refiner(goldens, "prenorm", tmp_path)
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
    """20 epochs, 8 heads: staggered turns end at epochs 4, 6, ..., 16; the uniform decay starts at epoch 4."""
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
