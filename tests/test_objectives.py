"""What every objective of pre-training promises: micro-batches and processes change nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from test_distributed import free_port
from torch import Tensor

from mim_refiner_hf.pretraining.capi import CapiObjective
from mim_refiner_hf.pretraining.conmim import ConmimObjective
from mim_refiner_hf.pretraining.objective import Objective
from mim_refiner_hf.pretraining.objectives import make_objective
from mim_refiner_hf.pretraining.recipe import PretrainRecipe, PretrainSteps
from mim_refiner_hf.runtime.distributed import average_gradients
from mim_refiner_hf.runtime.optimisation import recompute_blocks

SHAPE: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "learning_rate": 1e-3,
}
BATCH = 6
STEPS = PretrainSteps(per_epoch=4, warmup=1, total=8)
CASES: dict[str, dict[str, Any]] = {
    "capi": {
        "objective": "capi",
        "predictor_layers": 2,
        "registers": 4,
        "prototypes": 5,
        "predicted_share": 0.2,
        "stochastic_depth": 0.4,
    },
    "capi-plain": {
        "objective": "capi",
        "predictor_layers": 2,
        "registers": 4,
        "prototypes": 16,
        "positionwise": False,
        "predicted_share": 0.2,
        "stochastic_depth": 0.0,
    },
    "conmim-squares": {
        "objective": "conmim",
        "mask_square": 8,
        "projector_hidden": 20,
        "projector_size": 8,
    },
    "conmim-blocks": {
        "objective": "conmim",
        "mask_kind": "blocks",
        "smallest_block": 4,
        "mask_ratio": 0.4,
        "projector_hidden": 20,
        "projector_size": 8,
    },
}


def make(case: str, **settings: Any) -> Objective:
    """A small objective in double precision."""
    recipe = PretrainRecipe(**{**SHAPE, "batch_size": BATCH, **CASES[case], **settings})
    return make_objective(recipe, STEPS).double().train()


def take_steps(case: str, rank: int, processes: int, micro: int | None) -> dict[str, Tensor]:
    """What two steps leave behind: gradients, losses, and all state."""
    objective = make(case)
    share = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    kept: dict[str, Tensor] = {}
    for step in range(1, 3):
        torch.manual_seed(step)
        pixels = torch.randn(BATCH, 2, 3, 32, 32).double()[share]
        objective.set_schedules(step)
        objective.zero_grad()
        masks = objective.masks(step, list(range(40, 40 + BATCH))[share])
        losses = objective.backward(pixels, masks, micro)
        average_gradients(objective.parameters())
        for name, loss in losses.items():
            value = loss.clone().double()
            if processes > 1:
                dist.all_reduce(value)
            kept[f"{step}.{name}"] = value / processes
        for name, parameter in objective.named_parameters():
            if parameter.grad is not None:
                kept[f"{step}.gradient.{name}"] = parameter.grad.clone()
        objective.step_optimizers()
    return kept | {name: tensor.clone() for name, tensor in objective.state_dict().items()}


def same(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Equal but for rounding in double precision; the optimiser's first steps are signs."""
    assert expected.keys() == found.keys()
    assert sum(".gradient." in name for name in expected) > 40
    for name, tensor in expected.items():
        tolerance = 1e-9 if ".gradient." in name else 1e-6
        torch.testing.assert_close(
            found[name], tensor, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_micro_batches_are_the_whole_batch(case: str, micro: int) -> None:
    same(take_steps(case, 0, 1, None), take_steps(case, 0, 1, micro))


def process(rank: int, processes: int, port: int, folder: str) -> None:
    """One of several processes; writes what every case left behind."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=processes
    )
    for case in CASES:
        kept = take_steps(case, rank, processes, 2)
        save_file(kept, Path(folder) / f"{case}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (2, free_port(), str(tmp_path)), nprocs=2)
    for case in CASES:
        expected = take_steps(case, 0, 1, None)
        parts = [load_file(tmp_path / f"{case}-{rank}.safetensors") for rank in range(2)]
        for name, tensor in parts[0].items():
            # the processes never drift apart
            assert torch.equal(tensor, parts[1][name]), name
        same(expected, parts[0])


@pytest.mark.parametrize("case", CASES)
def test_masks_are_a_pure_function_of_step_and_image(case: str) -> None:
    objective = make(case)
    whole = objective.masks(3, [7, 8, 9])
    others = [objective.masks(4, [7, 8, 9]), objective.masks(3, [17, 18, 19])]
    for name, tensor in whole.items():
        if name == "kept":
            continue
        assert torch.equal(tensor, objective.masks(3, [7, 8, 9])[name])
        # the order of the images, and their company, change nothing
        turned = objective.masks(3, [9, 7])[name]
        assert torch.equal(turned, tensor[[2, 0]])
        assert all(not torch.equal(tensor, other[name]) for other in others)


@pytest.mark.parametrize("case", CASES)
def test_weights_are_a_pure_function_of_the_seed(case: str) -> None:
    first, again, other = make(case), make(case), make(case, seed=1)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    name = "encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize("case", CASES)
def test_the_momentum_copy_ships(case: str) -> None:
    objective = make(case)
    with torch.no_grad():
        for parameter in objective.encoder.parameters():
            parameter.add_(1.0)
    pixels = torch.randn(2, 3, 32, 32).double()
    shipped = objective.shipped().eval()
    assert isinstance(objective, CapiObjective | ConmimObjective)
    expected = objective.teacher.eval()(pixels).last_hidden_state
    torch.testing.assert_close(shipped(pixels).last_hidden_state, expected)


@pytest.mark.parametrize("case", CASES)
def test_recomputed_blocks_give_the_same_gradients(case: str) -> None:
    found = []
    for recomputes in (False, True):
        objective = make(case)
        if recomputes:
            recompute_blocks(objective.encoder)
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        objective.encoder.layers[1].mlp.register_forward_pre_hook(count)
        torch.manual_seed(0)
        pixels = torch.randn(BATCH, 2, 3, 32, 32).double()
        objective.backward(pixels, objective.masks(0, list(range(BATCH))), None)
        assert calls == 1 + recomputes
        found.append({n: p.grad for n, p in objective.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
