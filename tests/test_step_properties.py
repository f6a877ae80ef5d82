"""Loss, queue and heads against ten slow, plain lines each, on shapes, fill states and settings
that hypothesis makes up.
"""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mim_refiner_hf.refinement.heads import IdHeads
from mim_refiner_hf.refinement.loss import nna_loss, pair_weights
from mim_refiner_hf.refinement.queue import NearestNeighbourQueue

small = st.integers(1, 4)
many = settings(max_examples=220, derandomize=True)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_loss(
    targets: Tensor,
    neighbours: Tensor,
    predictions: Tensor,
    temperature: float,
    swap: str,
    first: int,
) -> Tensor:
    """The mean over ordered pairs of views of one head, (G, b, E), (G, b, E), (V, B, E).

    Equation 1, pair by pair.
    """
    targets, neighbours, predictions = (
        x / x.norm(dim=-1, keepdim=True) for x in (targets, neighbours, predictions)
    )
    terms = []
    for i in range(len(targets)):
        for j in (j for j in range(len(predictions)) if j != i):
            logits = (neighbours if swap == "all" else targets)[i] @ predictions[j].T / temperature
            own = torch.arange(len(logits))
            if swap == "positive":
                swapped = (neighbours[i] * predictions[j, first : first + len(own)]).sum(
                    dim=-1
                ) / temperature
                logits = logits.index_put((own, first + own), swapped)
            terms.append(F.cross_entropy(logits, first + own))
    return torch.stack(terms).mean()


@many
@given(
    small,
    small,
    st.integers(0, 4),
    st.integers(1, 5),
    st.integers(0, 5),
    st.integers(2, 8),
    st.sampled_from(["positive", "all", "none"]),
    st.floats(0.1, 1.0),
    st.integers(0, 2**31),
)
def test_loss_and_its_gradient(
    heads: int,
    views: int,
    local: int,
    batch: int,
    others: int,
    dim: int,
    swap: str,
    temperature: float,
    seed: int,
) -> None:
    """`others` rows of other processes come before and after this process's."""
    local = max(local, 2 - views)
    targets, neighbours = (
        normal(seed, heads, views, batch, dim),
        normal(seed + 1, heads, views, batch, dim),
    )
    first, columns = others // 2, batch + others
    predictions = normal(seed + 2, heads, views + local, columns, dim).requires_grad_()
    weights = pair_weights(views, views + local)
    loss, alignment = nna_loss(
        targets,
        neighbours,
        predictions,
        weights,
        temperature=temperature,
        swap=swap,
        first_row=first,
    )
    (gradient,) = torch.autograd.grad((loss * torch.arange(1, heads + 1)).sum(), predictions)
    slow = torch.stack(
        [
            slow_loss(targets[h], neighbours[h], predictions[h], temperature, swap, first)
            for h in range(heads)
        ]
    )
    (expected,) = torch.autograd.grad((slow * torch.arange(1, heads + 1)).sum(), predictions)
    torch.testing.assert_close(loss, slow, atol=1e-6, rtol=1e-6)  # the pair weights are fp32
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)
    assert ((alignment > 0) & (alignment <= 1 + 1e-6)).all()
    # Jensen: the mean probability is at least e^-loss
    assert (alignment >= torch.exp(-slow) - 1e-6).all()


class SlowQueue:
    """One head's queue as the authors keep it: raw rows, oldest first, in a list."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = [(row, -1, -1, 0) for row in rows]
        self.next = 0

    def nearest(self, target: Tensor, index: int, exclude: bool) -> list[tuple[float, int]]:
        rows = torch.stack([row for row, *_ in self.rows])
        cosines = (rows @ target / rows.norm(dim=1) / target.norm()).tolist()
        cosines = [
            -1.0 if exclude and row[1] == index else c
            for row, c in zip(self.rows, cosines, strict=True)
        ]
        return sorted(((cosine, place) for place, cosine in enumerate(cosines)), reverse=True)

    def push(self, projected: Tensor, index: Tensor, labels: Tensor) -> None:
        self.rows = [(row, i, label, age + len(index)) for row, i, label, age in self.rows]
        for row, i, label in zip(projected, index.tolist(), labels.tolist(), strict=True):
            self.rows[self.next] = (row, i, label, len(index))
            self.next = (self.next + 1) % len(self.rows)


@many
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 9),
    st.integers(2, 6),
    st.data(),
    st.integers(0, 2**31),
)
def test_queue_over_several_steps(
    heads: int, views: int, batch: int, spare: int, dim: int, data: st.DataObject, seed: int
) -> None:
    """Empty, half full, wrapped around.

    Who is nearest, what is drawn, who is left out, and all that is remembered.
    """
    size = batch + spare
    topk, exclude = data.draw(st.integers(1, size)), data.draw(st.booleans())
    queue = NearestNeighbourQueue(heads, size, dim, seed=seed % 1000).double()
    slow = [SlowQueue(row) for row in (queue.rows * queue.norms.unsqueeze(-1)).clone()]
    for step in range(data.draw(st.integers(1, 4))):
        targets = 3 * normal(seed + step, heads, views, batch, dim)
        index, labels = (
            torch.arange(batch) + data.draw(st.integers(0, 3)),
            torch.arange(batch) % 3 - 1,
        )
        draw = torch.randint(
            topk, (heads, views, batch), generator=torch.Generator().manual_seed(seed)
        )
        found = queue.lookup(targets, index, topk=topk, draw=draw, exclude_self=exclude)
        for h in range(heads):
            for v in range(views):
                for k in range(batch):
                    cosine, place = slow[h].nearest(targets[h, v, k], int(index[k]), exclude)[
                        int(draw[h, v, k])
                    ]
                    assert abs(float(found.similarity[h, v, k]) - cosine) < 1e-6
                    # rows that are out are all equal
                    if cosine > -1:
                        assert int(found.positions[h, v, k]) == place
                        row = slow[h].rows[place][0]
                        torch.testing.assert_close(
                            found.rows[h, v, k], row / row.norm(), atol=1e-6, rtol=0
                        )
        queue.enqueue(targets[:, 0], index, labels)
        for h in range(heads):
            slow[h].push(targets[h, 0], index, labels)
            rows, indices, classes, ages = zip(*slow[h].rows, strict=True)
            torch.testing.assert_close(
                queue.rows[h] * queue.norms[h].unsqueeze(-1), torch.stack(rows)
            )
            assert queue.sample_index.tolist() == list(indices) and queue.labels.tolist() == list(
                classes
            )
            assert queue.age.tolist() == list(ages) and int(queue.pointer) == slow[h].next


def own_module(heads: IdHeads, head: int) -> nn.Sequential:
    """One head of the stack as the ordinary modules that it stands for."""
    parts: list[nn.Module] = []
    for layer in (*heads.projector, *heads.predictor):
        _, wide, narrow = layer.weight.shape
        linear = nn.Linear(narrow, wide, bias=False, dtype=torch.float64)
        norm = nn.BatchNorm1d(wide, dtype=torch.float64)
        linear.weight.data.copy_(layer.weight[head])
        norm.weight.data.copy_(layer.norm.weight[head])
        parts += [linear, norm, *([nn.GELU()] if layer.activation else [])]
    return nn.Sequential(*parts)


@settings(max_examples=70, derandomize=True)
@given(
    small,
    st.integers(2, 20),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(0, 2**31),
)
def test_stacked_heads_are_modules_one_by_one(
    count: int, rows: int, dim: int, projector: int, predictor: int, embedding: int, seed: int
) -> None:
    heads = IdHeads(count, dim, projector, predictor, embedding, seed=seed % 1000).double()
    for layer in (*heads.projector, *heads.predictor):
        layer.norm.weight.data.copy_(1 + normal(seed, *layer.norm.weight.shape) / 4)
    features = normal(seed + 1, count, rows, dim).requires_grad_()
    _, predicted = heads(features)
    upstream = normal(seed + 2, *predicted.shape)
    (gradient,) = torch.autograd.grad((predicted * upstream).sum(), features)
    for head in range(count):
        own, given_features = own_module(heads, head), features[head].detach().requires_grad_()
        output = own(given_features)
        (expected,) = torch.autograd.grad((output * upstream[head]).sum(), given_features)
        torch.testing.assert_close(predicted[head], output, atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(gradient[head], expected, atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(
            heads.predictor[-1].norm.running_var[head], own[-1].running_var, atol=1e-9, rtol=1e-6
        )


def test_spread_is_that_of_the_last_projections_around_the_end_of_the_queue() -> None:
    queue = NearestNeighbourQueue(num_heads=2, size=300, dim=16)
    # the last 200 lie at both ends
    for start in range(0, 800, 200):
        last = normal(start, 2, 200, 16).float()
        last[1] = last[1, :1] + 1e-3 * last[1]  # collapsed
        queue.enqueue(last, torch.arange(200), torch.full((200,), -1))
    unit = F.normalize(last, dim=-1)
    slow = torch.stack(
        [torch.stack([unit[head, :, i].std() for i in range(16)]).mean() * 4 for head in range(2)]
    )
    torch.testing.assert_close(queue.spread(200), slow)
    assert 0.95 < slow[0] < 1.05 and slow[1] < 0.01
