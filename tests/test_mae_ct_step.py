"""MAE-CT's head, queue, loss and one whole step (arXiv 2304.10520), by our refiner, against the
authors' code.

ReLU, no batch norm at the predictor's end, a pass for each view, and in the third stage a momentum
projector that gives the targets and fills the queue.
"""

import re
from typing import Any

import pytest
import torch
from golden_cases import GOLDENS, contents, facts, tensors
from torch import Tensor, nn

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel
from mim_refiner_hf.conversion import load_encoder
from mim_refiner_hf.refinement.heads import IdHeads
from mim_refiner_hf.refinement.loss import nna_loss, pair_weights
from mim_refiner_hf.refinement.queue import NearestNeighbourQueue
from mim_refiner_hf.refinement.refiner import NnaSettings, Refiner
from mim_refiner_hf.runtime.optimisation import (
    encoder_groups,
    freeze,
    head_groups,
    learning_rate,
    set_learning_rate,
    update_average,
)

pytestmark = pytest.mark.usefixtures("goldens")

HEAD, QUEUE, STEP = "maect-head", "maect-queue-loss", "maect-step"
VIEWS = 2
# what a file of a head holds of its queue -> the same of ours
QUEUE_STATE = {"queue_id": "sample_index", "queue_y": "labels"}


def below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


# --- the authors' head in ours


def named_layers(refiner: Refiner) -> dict[str, nn.Module]:
    """The layers of projector, predictor and momentum projector by the authors' names.

    Their activations have numbers of their own: linear 0, 3, 6 and batch norm 1, 4, 7.
    """
    parts = {"projector": refiner.heads.projector, "predictor": refiner.heads.predictor}
    if refiner.target_projector is not None:
        parts["target_projector"] = refiner.target_projector
    named = {}
    for part, layers in parts.items():
        for number, layer in enumerate(layers):
            named[f"{part}.{3 * number}"] = layer
            named[f"{part}.{3 * number + 1}"] = layer.norm
    return named


def head_tensors(refiner: Refiner) -> dict[str, Tensor]:
    """Weights and statistics of the one head by the authors' names, as views."""
    found = {}
    for name, layer in named_layers(refiner).items():
        own = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
        found |= {f"{name}.{key}": tensor.detach()[0] for key, tensor in own}
    return found


def head_gradients(refiner: Refiner) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": parameter.grad[0]
        for name, layer in named_layers(refiner).items()
        for key, parameter in layer.named_parameters(recurse=False)
        if parameter.grad is not None
    }


def fill(refiner: Refiner, state: dict[str, Tensor]) -> None:
    """Put the authors' head into ours; every tensor of theirs has a place."""
    counts = {name for name in state if name.endswith("num_batches_tracked")}
    own = head_tensors(refiner)
    assert own.keys() == {name for name in state if not name.startswith("queue")} - counts
    for name, tensor in own.items():
        tensor.copy_(state[name])
    fill_queue(refiner.queue, below(state, "queue"))


def fill_queue(queue: NearestNeighbourQueue, state: dict[str, Tensor]) -> None:
    """From `queue`, `queue_id`, `queue_y` and `queue_ptr` without their common beginning."""
    queue.rows[0] = state[""]
    queue.norms.fill_(1.0)
    for theirs, ours in QUEUE_STATE.items():
        getattr(queue, ours).copy_(state.get(theirs.removeprefix("queue"), torch.tensor(-1)))
    queue.pointer.copy_(state.get("_ptr", torch.tensor(0)).squeeze())


def assert_queue(queue: NearestNeighbourQueue, state: dict[str, Tensor]) -> None:
    torch.testing.assert_close(queue.rows[0], state["queue"], atol=1e-4, rtol=0)
    for theirs, ours in QUEUE_STATE.items():
        assert torch.equal(getattr(queue, ours), state[theirs].long())
    assert int(queue.pointer) == int(state["queue_ptr"])


def build(case: dict[str, Any], encoder: MimRefinerModel, momentum: float | None) -> Refiner:
    """A refiner with MAE-CT's one head on the output, sized as the case says."""
    dim = case["output_dim"]
    heads = IdHeads(
        1,
        encoder.config.hidden_size,
        case["proj_hidden_dim"],
        case["pred_hidden_dim"],
        dim,
        activation="relu",
        predictor_norm=False,
    )
    return Refiner(
        encoder,
        [encoder.config.num_hidden_layers - 1],
        heads,
        NearestNeighbourQueue(1, case["queue_size"], dim),
        NnaSettings(
            num_global=VIEWS,
            num_views=VIEWS,
            temperature=case["temperature"],
            swap="all",
            norm_views="apart",
            target_momentum=momentum,
        ),
    ).train()


def by_view(values: dict[str, Tensor], name: str) -> Tensor:
    """`name`.view0, `name`.view1, stacked."""
    return torch.stack([values[f"{name}.view{view}"] for view in range(VIEWS)])


class Watched:
    """What the refiner's queue is asked and finds, and what its predictors give."""

    def __init__(self, refiner: Refiner) -> None:
        self.refiner = refiner
        self.predicted: list[Tensor] = []
        refiner.heads.predictor.register_forward_hook(
            lambda _, inputs, output: self.predicted.append(output.detach()[0].T)
        )
        lookup = refiner.queue.lookup

        def watched(targets: Tensor, index: Tensor, **settings: Any) -> Any:
            self.targets = targets[0]
            found = lookup(targets, index, **settings)
            self.positions = found.positions[0]
            return found

        refiner.queue.lookup = watched  # type: ignore[method-assign]

    def assert_as(self, expected: dict[str, Tensor]) -> None:
        tolerance = {"atol": 1e-4, "rtol": 0.0}
        torch.testing.assert_close(self.targets, by_view(expected, "targets"), **tolerance)
        predicted = torch.stack(self.predicted)
        torch.testing.assert_close(predicted, by_view(expected, "predicted"), **tolerance)
        assert torch.equal(self.positions, by_view(expected, "nn_queue_index").long())


# --- the head


def head_stage(stage: str) -> tuple[Refiner, dict[str, Tensor], Tensor, Tensor | None]:
    """The refiner of a stage, its expected outputs, the features, and the draw of neighbours."""
    case = facts(HEAD)
    inputs, outputs = tensors(HEAD)
    shape = {"hidden_size": case["input_dim"], "num_attention_heads": 1, "num_hidden_layers": 1}
    encoder = MimRefinerModel(MimRefinerConfig(**shape))
    refining = stage == "stage3"
    refiner = build(case, encoder, case["target_factor"] if refining else None)
    fill(refiner, contents(HEAD, f"head_{stage}.th")["state_dict"])

    draw = by_view(inputs, "stage3.draw").unsqueeze(0).long() if refining else None
    features = by_view(inputs, "x").flatten(0, 1).unsqueeze(0)
    return refiner, below(outputs, f"{stage}."), features, draw


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_head(stage: str) -> None:
    """Targets, neighbours, loss, every gradient, statistics, queue, momentum; then in eval mode."""
    case = facts(HEAD)
    inputs, _ = tensors(HEAD)
    refiner, expected, features, draw = head_stage(stage)
    watched = Watched(refiner)
    features.requires_grad_()
    topk = case[f"topk_{stage}"]
    result = refiner.align(features, inputs["idx"], inputs["y"], topk=topk, draw=draw)
    result.loss.backward()

    train = below(expected, "train.")
    watched.assert_as(train)
    torch.testing.assert_close(result.loss.detach(), train["loss"], atol=1e-5, rtol=0)
    halves = [train[f"loss_of_view{view}_predictions"] for view in range(VIEWS)]
    torch.testing.assert_close(torch.stack(halves).mean(), train["loss"])
    of_features = by_view(train, "grad_x").flatten(0, 1)
    torch.testing.assert_close(features.grad[0], of_features, atol=1e-5, rtol=1e-3)

    # no gradient reaches the momentum projector
    gradients = head_gradients(refiner)
    assert {f"grad.{name}" for name in gradients} == {
        name for name in train if name.startswith("grad.")
    }
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, train[f"grad.{name}"], atol=1e-5, rtol=1e-3)
    assert_after(refiner, below(expected, "after_train."))

    refiner.follow_projectors()
    for name, tensor in below(expected, "after_momentum.").items():
        if not name.endswith("num_batches_tracked"):
            found = head_tensors(refiner)[name]
            torch.testing.assert_close(found, tensor, atol=1e-6, rtol=1e-6)


def assert_after(refiner: Refiner, expected: dict[str, Tensor]) -> None:
    """Statistics of all batch norms, which moved twice, and the queue."""
    assert_queue(refiner.queue, expected)
    found = head_tensors(refiner)
    moved = {name for name in expected if re.search(r"running_(mean|var)$", name)}
    assert moved == {name for name in found if "running_" in name}
    for name in moved:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_head_in_evaluation(stage: str) -> None:
    """With the statistics of the file."""
    inputs, _ = tensors(HEAD)
    refiner, expected, features, _ = head_stage(stage)
    watched = Watched(refiner.eval())
    refiner.align(features, inputs["idx"], inputs["y"])
    evaluated = below(expected, "eval.")
    torch.testing.assert_close(watched.targets, by_view(evaluated, "targets"), atol=1e-4, rtol=0)
    predicted = torch.stack(watched.predicted)
    torch.testing.assert_close(predicted, by_view(evaluated, "predicted"), atol=1e-4, rtol=0)


def test_first_weights_are_those_of_torchs_layers() -> None:
    """As far and as evenly spread: kaiming-uniform with a slope of sqrt(5)."""
    heads = IdHeads(2, 48, 200, 160, 64, init="kaiming")
    for layer in (*heads.projector, *heads.predictor):
        own = layer.weight.detach()
        _, fan_out, fan_in = own.shape
        theirs = nn.Linear(fan_in, fan_out, bias=False).weight.detach()
        assert float(own.abs().max()) == pytest.approx(float(theirs.abs().max()), rel=0.01)
        assert float(own.std()) == pytest.approx(float(theirs.std()), rel=0.05)


# --- queue and loss


@pytest.mark.parametrize("kind", ["nearest", "topk"])
def test_queue(kind: str) -> None:
    """Every call: whom each view finds, or in which order, and what is in the queue after it."""
    case = facts(QUEUE)
    inputs, outputs = tensors(QUEUE)
    rows = inputs[f"{kind}.init.queue"]
    queue = NearestNeighbourQueue(1, *rows.shape)
    fill_queue(queue, {"": rows})
    calls = {name.split(".")[1] for name in inputs if re.match(rf"{kind}\.call\d", name)}
    assert len(calls) > 1
    for call in sorted(calls, key=lambda name: int(name.removeprefix("call"))):
        x, index, labels = (inputs[f"{kind}.{call}.{name}"] for name in ("x", "idx", "y"))
        expected = below(outputs, f"{kind}.{call}.")
        if kind == "nearest":
            found = queue.lookup(x.unsqueeze(0), index).positions[0]
            assert torch.equal(found, by_view(expected, "nn_queue_index").long())
            # theirs is that of view 0
            same = (queue.labels[found[0]] == labels).float().mean()
            torch.testing.assert_close(same, expected["nn_accuracy"].float())
        else:
            order = by_view(expected, "candidate_queue_indices").long()
            for place in range(case["topk"]):
                draw = torch.full((1, *x.shape[:2]), place)
                found = queue.lookup(x.unsqueeze(0), index, topk=case["topk"], draw=draw)
                assert torch.equal(found.positions[0], order[:, :, place])
        queue.enqueue(x[:1], index, labels)
        assert_queue(queue, below(expected, "after."))


def both_ways(rows: Tensor, predicted: Tensor, temperature: float, first: int = 0) -> Tensor:
    """Our all-swap loss of two views that are the same: so both halves of the mean are one."""
    twice = rows.expand(1, VIEWS, *rows.shape)
    columns = predicted.expand(1, VIEWS, *predicted.shape)
    loss, _ = nna_loss(
        twice,
        twice,
        columns,
        pair_weights(VIEWS, VIEWS),
        temperature=temperature,
        swap="all",
        first_row=first,
    )
    return loss[0]


@pytest.mark.parametrize("temperature", facts(QUEUE).get("temperatures", []))
def test_loss(temperature: float) -> None:
    """Of one process, with its gradient, and of each of two: own rows, the columns of both."""
    batch = facts(QUEUE)["batch_size"]
    inputs, outputs = tensors(QUEUE)
    neighbours, predicted = inputs["loss.neighbours"], inputs["loss.predicted"]
    expected = below(outputs, f"loss.t{temperature:g}.")
    own = predicted[:batch].clone().requires_grad_()
    loss = both_ways(neighbours[:batch], own, temperature)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected["one_process"], atol=1e-5, rtol=0)
    of_predicted = expected["one_process.grad_predicted"]
    torch.testing.assert_close(own.grad, of_predicted, atol=1e-5, rtol=1e-3)

    ranks = [name for name in expected if name.startswith("ddp2.rank")]
    assert len(ranks) == len(predicted) // batch
    for name in ranks:
        first = batch * int(name.removeprefix("ddp2.rank"))
        rows = neighbours[first : first + batch]
        loss = both_ways(rows, predicted, temperature, first)
        torch.testing.assert_close(loss, expected[name], atol=1e-5, rtol=0)


# --- one whole step


def our_names(name: str) -> list[str]:
    """What we call a tensor of the authors' encoder: q, k and v for a fused qkv."""
    for theirs, ours in (
        ("patch_embed.proj", "embeddings.patch_embeddings"),
        ("cls_token", "embeddings.cls_token"),
        ("blocks.", "layers."),
        (".attn.proj", ".attention.o_proj"),
    ):
        name = name.replace(theirs, ours)
    if ".attn.qkv" in name:
        return [name.replace("attn.qkv", f"attention.{part}_proj") for part in "qkv"]
    return [name]


def encoder_tensor(values: dict[str, Tensor], name: str) -> Tensor:
    """A tensor of the authors' encoder, put together of ours."""
    return torch.cat([values[own] for own in our_names(name)])


def step_encoder() -> MimRefinerModel:
    """The authors' encoder before the step."""
    heads = facts(STEP)["num_heads"]
    return load_encoder(GOLDENS / STEP / "encoder.th", family="maect", num_heads=heads)


def step_refiner() -> Refiner:
    """The refiner of the step: the authors' encoder and head, the lower blocks frozen."""
    case = facts(STEP)
    encoder = step_encoder()
    encoder.config.pooling = "cls" if case["pooling"] == "class_token" else "mean"
    freeze(encoder, blocks=len(case["frozen_blocks"]))
    refiner = build(case, encoder, case["target_factor"])
    fill(refiner, contents(STEP, "head.th")["state_dict"])
    return refiner


def take_step(refiner: Refiner, micro: int | None = None) -> Tensor:
    """The gradients of the step; its loss."""
    inputs, _ = tensors(STEP)
    views = [inputs["pixel_values"].transpose(0, 1).to(refiner.encoder.dtype)]
    draw = by_view(inputs, "draw").unsqueeze(0).long()
    topk = facts(STEP)["topk"]
    result = refiner.backward(
        views, inputs["idx"], inputs["y"], topk=topk, draw=draw, micro_batch_size=micro
    )
    return result.loss.detach()


@pytest.mark.parametrize("micro", [None, 4, 1], ids=["whole", "one graph kept", "all twice"])
def test_step(micro: int | None) -> None:
    """Features, targets, neighbours, loss, the gradient of all that is trained, and no other."""
    _, expected = tensors(STEP)
    refiner = step_refiner()
    watched = Watched(refiner)
    loss = take_step(refiner, micro)
    watched.assert_as(expected)
    torch.testing.assert_close(loss, expected["loss"], atol=1e-5, rtol=0)

    gradients = {
        name: parameter.grad
        for name, parameter in refiner.encoder.named_parameters()
        if parameter.grad is not None
    }
    of_encoder = below(expected, "grad.encoder.")
    assert {own for name in of_encoder for own in our_names(name)} == gradients.keys()
    for name, gradient in of_encoder.items():
        found = encoder_tensor(gradients, name)
        torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-3)

    of_head = below(expected, "grad.head.")
    found_of_head = head_gradients(refiner)
    assert found_of_head.keys() == of_head.keys()
    for name, gradient in of_head.items():
        torch.testing.assert_close(found_of_head[name], gradient, atol=1e-5, rtol=1e-3)
    assert_after(refiner, below(expected, "after_forward.head."))


def test_micro_batches_are_the_whole_batch_in_double_precision() -> None:
    """And what the step leaves in queue, statistics and momentum projector."""
    gradients = []
    states = []
    for micro in (None, 4, 1):
        refiner = step_refiner().double()
        take_step(refiner, micro)
        refiner.follow_projectors()
        trained = [p.grad.flatten() for p in refiner.parameters() if p.grad is not None]
        gradients.append(torch.cat(trained))
        states.append(refiner.state_dict())
    for gradient, state in zip(gradients[1:], states[1:], strict=True):
        assert (gradients[0] - gradient).norm() <= 1e-12 * gradients[0].norm()
        for name, tensor in states[0].items():
            torch.testing.assert_close(state[name], tensor, atol=1e-12, rtol=0, msg=name)


def groups_of(refiner: Refiner) -> list[dict[str, Any]]:
    """Parameter groups of encoder and head; the peak of the heads' rate is beside the encoder's."""
    case = facts(STEP)
    scale = case["base_lr_head"] / case["base_lr_encoder"]
    encoder = encoder_groups(refiner.encoder, case["layer_decay"], case["weight_decay_encoder"])
    return encoder + head_groups(refiner.heads, case["weight_decay_head"], scale)


def test_parameter_groups() -> None:
    """Scale, weight decay and first rate of every parameter by its name."""
    case = facts(STEP)
    refiner = step_refiner()
    names = {id(layer): name for name, layer in named_layers(refiner).items()}
    of_head = {
        id(parameter): f"{names[id(layer)]}.{key}"
        for layer in named_layers(refiner).values()
        for key, parameter in layer.named_parameters(recurse=False)
    }
    found = {}
    for group in groups_of(refiner):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            name = of_head.get(id(parameter), name)
            found[name] = (group["lr_scale"], group["weight_decay"])
    peak = case["peak_lr_encoder"]
    warmup, total = schedule_of(case)
    first = learning_rate(0, warmup, total, peak, 0.0)

    expected = {}
    for group in case["groups"]:
        names_of_ours = [
            own
            for name in group["names"]
            for own in (our_names(name) if group["part"] == "encoder" else [name])
        ]
        for name in names_of_ours:
            scale, decay = found[name]
            assert scale * first == pytest.approx(group["lr_first_update"], rel=1e-9), name
            assert decay == group["weight_decay"], name
            expected[name] = group
    assert found.keys() == expected.keys()


def schedule_of(case: dict[str, Any]) -> tuple[int, int]:
    """Updates of warm-up, a fifth of all rounded down, and all updates."""
    total = case["epochs"] * case["updates_per_epoch"]
    return int(0.2 * total), total


@pytest.mark.parametrize("part", ["encoder", "head"])
def test_learning_rates(part: str) -> None:
    """Of every update: base x 2 x batch / 256, a warm-up of a fifth, a cosine to 0."""
    case = facts(STEP)
    _, outputs = tensors(STEP)
    warmup, total = schedule_of(case)
    peak = 2 * case[f"base_lr_{part}"] * case["batch_size"] / 256
    assert peak == pytest.approx(case[f"peak_lr_{part}"], rel=1e-12)
    rates = [learning_rate(step, warmup, total, peak, 0.0) for step in range(total)]
    expected = outputs[f"learning_rates.{part}"].tolist()
    assert rates == pytest.approx(expected, rel=1e-9)


def test_after_the_step() -> None:
    """Weights, momentum projector and moving average.

    AdamW's first step goes by the gradient's sign: it is compared where that is sure, and to the
    last bit of a weight, for the first rate is as small.
    """
    exact = {"atol": 1e-8, "rtol": 1.2e-7}
    case = facts(STEP)
    _, outputs = tensors(STEP)
    refiner = step_refiner()
    average = step_encoder()
    optimizer = torch.optim.AdamW(groups_of(refiner), lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    warmup, total = schedule_of(case)
    set_learning_rate(optimizer, learning_rate(0, warmup, total, case["peak_lr_encoder"], 0.0))
    take_step(refiner)
    optimizer.step()
    update_average(average, refiner.encoder, case["encoder_ema"])
    refiner.follow_projectors()

    expected = below(outputs, "after_step.")
    own = dict(refiner.encoder.named_parameters())
    for name, tensor in below(expected, "encoder.").items():
        found = encoder_tensor({key: value.detach() for key, value in own.items()}, name)
        sure = outputs[f"grad.encoder.{name}"].abs() > 1e-4
        torch.testing.assert_close(found[sure], tensor[sure], **exact, msg=name)
    for name, tensor in below(expected, "ema.").items():
        found = encoder_tensor(average.state_dict(), name)
        torch.testing.assert_close(found, tensor, atol=1e-6, rtol=0)

    head = head_tensors(refiner)
    for name, tensor in below(expected, "head.").items():
        if name.endswith("num_batches_tracked"):
            continue
        gradient = outputs.get(f"grad.head.{name}")
        if gradient is not None:
            sure = gradient.abs() > 1e-4
            torch.testing.assert_close(head[name][sure], tensor[sure], **exact, msg=name)
        else:
            atol = 1e-5 if "running_" in name else 1e-6
            torch.testing.assert_close(head[name], tensor, atol=atol, rtol=1e-6, msg=name)
