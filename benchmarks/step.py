"""Rows about one refinement step on one CPU thread.

    python -m benchmarks heads-queue-loss queue loss micro-batches step step-bf16 attention-bf16
    python -m benchmarks attention-fp32

The peer is `plain_step.py`, the same step written straight from the method, with the same weights;
before anything is timed, losses and gradients of both are compared. `queue-lightly` compares with
lightly's NNMemoryBankModule, where lightly is installed.
"""

import copy
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel
from mim_refiner_hf.refinement.heads import IdHeads
from mim_refiner_hf.refinement.loss import nna_loss, pair_weights
from mim_refiner_hf.refinement.queue import NearestNeighbourQueue
from mim_refiner_hf.refinement.refiner import NnaSettings, Refiner
from mim_refiner_hf.runtime.attention import fp32_on_cpu
from mim_refiner_hf.runtime.device import emulates_bf16
from mim_refiner_hf.runtime.optimisation import encoder_groups, freeze, head_groups, update_average

from .plain_step import PlainQueue, PlainStep, plain_loss
from .rows import LeftOut, Row, interleaved, products, trained

HEADS = 4
WIDTH = 192
PROJECTOR = 512
PREDICTOR = 1024
EMBEDDING = 128
QUEUE = 16384
TOPK = 20
GLOBAL = 2
LOCAL = 6
BATCH = 16
# rows and width of the paper's queues, for the rows about nothing else
PAPER_QUEUE = (65536, 256)
QUEUE_SIZES = (
    f"{HEADS} heads, batch {BATCH}, {GLOBAL} global views, queue {PAPER_QUEUE[0]} x"
    f" {PAPER_QUEUE[1]}"
)
SIZES = f"{HEADS} heads, batch {BATCH}, {GLOBAL + LOCAL} views, queue {QUEUE} x {EMBEDDING}"
ENCODER = {
    "image_size": 64,
    "patch_size": 8,
    "hidden_size": WIDTH,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
}


def make_refiner(bf16: bool = False, local: int = LOCAL, **sizes: int) -> Refiner:
    """A refiner with random weights and a full queue; `sizes` in place of those of `ENCODER`."""
    torch.manual_seed(0)
    config = MimRefinerConfig(**{**ENCODER, **sizes}, intermediate_size=4 * WIDTH)
    encoder = MimRefinerModel(config)
    # fresh weights would give all images nearly the same features
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    freeze(encoder, 0)
    heads = IdHeads(HEADS, WIDTH, PROJECTOR, PREDICTOR, EMBEDDING)
    queue = NearestNeighbourQueue(HEADS, QUEUE, EMBEDDING)
    refiner = Refiner(
        encoder,
        list(range(6 - HEADS, 6)),
        heads,
        queue,
        NnaSettings(GLOBAL, GLOBAL + local, temperature=0.2),
        bf16=bf16,
    )
    return refiner.train()


def a_batch(batch: int = BATCH) -> tuple[list[Tensor], Tensor, Tensor]:
    """Views of both sizes, sample indices, and which neighbours are drawn."""
    views = [torch.randn(batch, GLOBAL, 3, 64, 64), torch.randn(batch, LOCAL, 3, 32, 32)]
    return views, torch.arange(batch), torch.randint(TOPK, (HEADS, GLOBAL, batch))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Relative difference of two tensors as a whole."""
    difference = float((ours - theirs).norm() / theirs.norm())
    assert difference <= tolerance, (
        f"the two ways differ by {difference:.1e}, allowed is {tolerance:.0e}"
    )


def loss_products() -> list[tuple[int, int, int]]:
    """All pairs of targets and predictions of a head, and the gradient of the predictions."""
    targets = GLOBAL * BATCH
    predictions = (GLOBAL + LOCAL) * BATCH
    return [(targets, EMBEDDING, predictions), (predictions, targets, EMBEDDING)] * HEADS


def head_products() -> list[tuple[int, int, int]]:
    """The layers of all heads in training, the queue's lookup, and the loss."""
    rows = (GLOBAL + LOCAL) * BATCH
    widths = [WIDTH, PROJECTOR, PROJECTOR, EMBEDDING, PREDICTOR, EMBEDDING]
    head = [(GLOBAL * BATCH, EMBEDDING, QUEUE)]
    for inputs, outputs in itertools.pairwise(widths):
        head += trained(rows, inputs, outputs)
    return head * HEADS + loss_products()


def encoder_products() -> list[tuple[int, int, int]]:
    """The linear layers of all blocks but the last in training.

    Of the last one not every token is needed.
    """
    layers = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
    block = []
    for views, size in ((GLOBAL, 64), (LOCAL, 32)):
        tokens = views * BATCH * (1 + (size // 8) ** 2)
        for inputs, outputs in layers:
            block += trained(tokens, inputs, outputs)
    return block * 5


def heads_queue_loss() -> Row:
    """Heads, queue and loss, forward and backward, from features."""
    refiner = make_refiner()
    _, index, draw = a_batch()
    plain = PlainStep(refiner)
    features = torch.randn(HEADS, (GLOBAL + LOCAL) * BATCH, WIDTH, requires_grad=True)
    separate = [rows.detach().clone().requires_grad_() for rows in features]

    def ours() -> Tensor:
        refiner.zero_grad()
        features.grad = None
        result = refiner.align(features, index, index, topk=TOPK, draw=draw)
        result.loss.backward()
        return result.loss.detach()

    def theirs() -> Tensor:
        for module in (plain.projectors, plain.predictors):
            module.zero_grad()
        for rows in separate:
            rows.grad = None
        loss = plain.align(separate, index, TOPK, draw)
        loss.backward()
        return loss.detach()

    assert_close(ours(), theirs(), 1e-5)
    assert_close(features.grad, torch.stack([rows.grad for rows in separate]), 1e-4)
    measured, peer, floor = interleaved(ours, theirs, products(*head_products()))
    return Row(
        "heads-queue-loss",
        1.15,
        measured,
        peer,
        floor,
        f"{SIZES}; one module per head, a loop over pairs",
    )


def queue() -> Row:
    """Lookup and enqueue, against a queue per head and view that is normalised at every lookup."""
    torch.manual_seed(0)
    _, index, draw = a_batch()
    ours = NearestNeighbourQueue(HEADS, *PAPER_QUEUE)
    targets = torch.randn(HEADS, GLOBAL, BATCH, PAPER_QUEUE[1])
    theirs = [PlainQueue(rows) for rows in ours.rows * ours.norms.unsqueeze(-1)]
    unit = torch.nn.functional.normalize(targets, dim=-1).flatten(1, 2)

    def mine() -> Tensor:
        rows = ours.lookup(targets, index, topk=TOPK, draw=draw).rows
        ours.enqueue(targets[:, 0], index, index)
        return rows

    def plain() -> Tensor:
        found = [
            [q.lookup(targets[h, v], index, TOPK, draw[h, v]) for v in range(GLOBAL)]
            for h, q in enumerate(theirs)
        ]
        for head, each in enumerate(theirs):
            each.enqueue(targets[head, 0], index)
        return torch.stack([torch.stack(views) for views in found])

    assert_close(mine(), torch.nn.functional.normalize(plain(), dim=-1), 1e-5)
    measured, peer, floor = interleaved(
        mine, plain, lambda: torch.bmm(unit, ours.rows.transpose(1, 2))
    )
    return Row(
        "queue",
        1.7,
        measured,
        peer,
        floor,
        f"{QUEUE_SIZES}; normalised at every lookup; floor: its product alone",
    )


def queue_lightly() -> Row:
    """Nearest neighbour and enqueue, against lightly's memory bank, one per head.

    ModuleNotFoundError without lightly.
    """
    from lightly.models.modules import NNMemoryBankModule

    ours = NearestNeighbourQueue(HEADS, *PAPER_QUEUE)
    targets = torch.randn(HEADS, GLOBAL, BATCH, PAPER_QUEUE[1])
    index = torch.arange(BATCH)
    banks = [NNMemoryBankModule(size=PAPER_QUEUE) for _ in range(HEADS)]
    for bank, rows in zip(banks, ours.rows, strict=True):
        # the first call makes the bank
        bank(targets[0, 0])
        bank.bank.copy_(rows.T if bank.bank.shape[0] == PAPER_QUEUE[1] else rows)

    def mine() -> Tensor:
        rows = ours.lookup(targets, index, exclude_self=False).rows
        ours.enqueue(targets[:, 0], index, index)
        return rows

    def lightly() -> Tensor:
        found = []
        for own, bank in zip(targets, banks, strict=True):
            rows = [bank(view, update=number == 0) for number, view in enumerate(own)]
            found.append(torch.stack(rows))
        return torch.stack(found)

    first = ours.lookup(targets, index, exclude_self=False).rows
    found = torch.stack([bank(targets[h, 0], update=False) for h, bank in enumerate(banks)])
    assert_close(first[:, 0], torch.nn.functional.normalize(found, dim=-1), 1e-5)
    measured, peer = interleaved(mine, lightly)
    return Row(
        "queue-lightly",
        6.0,
        measured,
        peer,
        None,
        f"{QUEUE_SIZES}; lightly's NNMemoryBankModule, one per head, nearest only",
    )


def loss() -> Row:
    """The objective and its gradient, against a loop over heads and pairs."""
    targets, neighbours = torch.randn(2, HEADS, GLOBAL, BATCH, EMBEDDING)
    predictions = torch.randn(HEADS, GLOBAL + LOCAL, BATCH, EMBEDDING, requires_grad=True)
    weights = pair_weights(GLOBAL, GLOBAL + LOCAL)

    def ours() -> Tensor:
        total = nna_loss(targets, neighbours, predictions, weights, temperature=0.2)[0].sum()
        return torch.autograd.grad(total, predictions)[0]

    def theirs() -> Tensor:
        losses = [plain_loss(targets[h], neighbours[h], predictions[h], 0.2) for h in range(HEADS)]
        return torch.autograd.grad(torch.stack(losses).sum(), predictions)[0]

    assert_close(ours(), theirs(), 1e-5)
    measured, peer, floor = interleaved(ours, theirs, products(*loss_products()), rounds=15)
    return Row("loss", 4.0, measured, peer, floor, f"{SIZES}; a loop over heads and pairs of views")


def micro_batches(name: str, parts: int) -> Row:
    """A step in micro-batches against the same step in one pass.

    At four times the batch of the other rows. A quarter's largest pass then has 2080 tokens, where
    one of 64 images of 224 px has 25 216: what a pass costs beside its products weighs more than in
    use.
    """
    batch = 4 * BATCH
    refiner = make_refiner()
    views, index, draw = a_batch(batch)
    start = copy.deepcopy(refiner.state_dict())

    def step(micro: int | None) -> Tensor:
        refiner.zero_grad()
        refiner.backward(views, index, index, topk=TOPK, draw=draw, micro_batch_size=micro)
        trained = [p.grad for p in refiner.encoder.parameters() if p.grad is not None]
        return torch.cat([gradient.flatten() for gradient in trained])

    whole = step(None)
    # the queue has moved on
    refiner.load_state_dict(start)
    assert_close(step(batch // parts), whole, 1e-5)
    measured, peer = interleaved(lambda: step(batch // parts), lambda: step(None), rounds=3)
    sizes = SIZES.replace(f"batch {BATCH}", f"batch {batch}")
    return Row(
        name,
        1.25,
        measured,
        peer,
        None,
        f"{sizes}; {batch // parts} images at a time against all at once",
        at_most=True,
    )


def check_bf16() -> None:
    """LeftOut on a CPU without bfloat16: every way then spends its time on emulating it."""
    if emulates_bf16("cpu"):
        raise LeftOut(
            "this CPU emulates bfloat16 (neither AMX nor AVX-512 BF16), where it is slower than"
            " fp32 whoever writes it"
        )


def attention_bf16() -> Row:
    """Attention under bf16 autocast, forward and backward, against torch's kernel in bf16."""
    check_bf16()
    batch, heads, tokens, head_dim = 64, 3, 37, 64
    shape = (3, batch, heads, tokens, head_dim)
    inputs = torch.randn(shape).bfloat16().requires_grad_()
    gradient = torch.randn(batch, tokens, heads, head_dim).bfloat16()
    module = torch.nn.Identity()
    module.is_causal = False  # type: ignore[assignment]

    def attend(way: Callable[..., tuple[Tensor, object]]) -> Tensor:
        inputs.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = way(module, *inputs, None)
        output.backward(gradient)
        assert inputs.grad is not None
        return inputs.grad

    assert_close(attend(fp32_on_cpu), attend(sdpa_attention_forward), 0.02)
    measured, peer = interleaved(
        lambda: attend(fp32_on_cpu), lambda: attend(sdpa_attention_forward), rounds=15
    )
    note = f"{batch} x {tokens} tokens, {heads} heads of {head_dim}; torch's kernel in bf16"
    return Row("attention-bf16", 1.5, measured, peer, None, note)


def attention_fp32() -> Row:
    """The encoder in fp32 with the kernel that torch chooses, against the products written out.

    The kernel is taken as it comes because this row says that another one would not pay.
    """
    encoder = make_refiner().encoder
    sizes = (torch.randn(16, 3, 64, 64), torch.randn(96, 3, 32, 32))

    def gradient(kernel: str) -> Tensor:
        encoder.set_attn_implementation(kernel)
        encoder.zero_grad()
        for pixels in sizes:
            encoder(pixels, interpolate_pos_encoding=True).pooler_output.sum().backward()
        weight = encoder.layers[0].attention.q_proj.weight.grad
        assert weight is not None
        return weight

    assert_close(gradient("sdpa"), gradient("eager"), 1e-4)
    measured, peer = interleaved(lambda: gradient("sdpa"), lambda: gradient("eager"), rounds=9)
    note = f"6 blocks of width {WIDTH}, 3 heads, 16 x 65 and 96 x 17 tokens; eager attention"
    return Row("attention-fp32", 0.97, measured, peer, None, note)


def whole_step(name: str, bf16: bool, target: float) -> Row:
    """Gradients, optimiser and moving average, against the plain step.

    The plain one has `torch.optim.AdamW`'s loop, and an average in a loop. LeftOut for bf16 on a
    CPU without its arithmetic: both ways then spend their time on emulating it.
    """
    if bf16:
        check_bf16()
    refiner = make_refiner(bf16)
    views, index, draw = a_batch()
    other = copy.deepcopy(refiner)
    # attention as whoever writes it plainly calls it
    other.encoder.set_attn_implementation("sdpa")
    plain = PlainStep(other)

    groups = encoder_groups(refiner.encoder, 0.65, 0.05) + head_groups(refiner.heads, 1e-5)
    fused = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    average = copy.deepcopy(refiner.encoder)
    groups = encoder_groups(other.encoder, 0.65, 0.05)
    groups += head_groups(plain.projectors, 1e-5) + head_groups(plain.predictors, 1e-5)
    looped = torch.optim.AdamW(groups, lr=1e-5, foreach=False, fused=False)
    plain_average = copy.deepcopy(other.encoder)

    def ours() -> Tensor:
        fused.zero_grad()
        result = refiner.backward(views, index, index, topk=TOPK, draw=draw)
        fused.step()
        update_average(average, refiner.encoder, 0.9999)
        return result.loss.detach()

    @torch.no_grad()
    def move_average() -> None:
        for kept, new in zip(plain_average.parameters(), other.encoder.parameters(), strict=True):
            kept.mul_(0.9999).add_(new, alpha=1e-4)

    def theirs() -> Tensor:
        looped.zero_grad()
        total = plain.backward(views, index, TOPK, draw)
        looped.step()
        move_average()
        return total

    # the second step sees what the first one did to weights and queue
    tolerance = 0.02 if bf16 else 1e-4
    for _ in range(2):
        assert_close(ours(), theirs(), tolerance)
    least = products(*encoder_products(), *head_products())
    measured, peer, floor = interleaved(ours, theirs, least, rounds=9)
    note = f"{SIZES}; 6 blocks of width {WIDTH}; the step written straight from the method"
    return Row(name, target, measured, peer, None if bf16 else floor, note)


ROWS: dict[str, Callable[[], Row]] = {
    "heads-queue-loss": heads_queue_loss,
    "queue": queue,
    "queue-lightly": queue_lightly,
    "loss": loss,
    "micro-batches": lambda: micro_batches("micro-batches", 4),
    "micro-batches-half": lambda: micro_batches("micro-batches-half", 2),
    "step": lambda: whole_step("step", bf16=False, target=1.15),
    "step-bf16": lambda: whole_step("step-bf16", bf16=True, target=1.35),
    "attention-bf16": attention_bf16,
    "attention-fp32": attention_fp32,
}
"""The rows of this file by name."""
