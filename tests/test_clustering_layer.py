"""CAPI's Sinkhorn and online clustering layer, against the authors' code."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from golden_cases import facts, tensors
from safetensors.torch import load_file, save_file
from test_distributed import free_port
from torch import Tensor

from mim_refiner_hf.pretraining.clustering_layer import ClusteringLayer, sinkhorn
from mim_refiner_hf.runtime.distributed import average_gradients

CASE = "capi-sinkhorn"
ASSIGNMENTS = {"atol": 2e-5, "rtol": 0}
GRADIENTS = {"atol": 1e-5, "rtol": 1e-3}


def shared_out(logits: Tensor, temperature: float, iterations: int, plain: bool) -> Tensor:
    scaled = logits / temperature
    if plain:
        return sinkhorn(scaled.flatten(0, 1), iterations).view_as(logits)
    return sinkhorn(scaled, iterations)


@pytest.mark.usefixtures("goldens")
def test_sinkhorn_is_the_authors() -> None:
    inputs, expected = tensors(CASE)
    names = [name for name in expected if ".it" in name]
    assert names
    for name in names:
        variant, *extreme = name.split(".t")[0].split(".")
        temperature, iterations = name.split(".t")[1].split(".it")
        logits = inputs["extreme_logits" if extreme else "logits"]
        ours = shared_out(logits, float(temperature), int(iterations), variant == "plain")
        torch.testing.assert_close(ours, expected[name], **ASSIGNMENTS, msg=name)

        sums = facts(CASE)["row_sums_min_max"].get(name)
        if sums is not None:
            rows = ours.sum(dim=-1)
            assert [rows.min().item(), rows.max().item()] == pytest.approx(sums, abs=1e-5)


def golden_layer(positionwise: bool, chunk: int) -> ClusteringLayer:
    case = facts(CASE)
    layer = ClusteringLayer(
        case["D"],
        case["K"],
        positionwise=positionwise,
        target_temperature=case["target_temp"],
        temperature=case["pred_temp"],
        iterations=case["n_sk_iter"],
        chunk=chunk,
    )
    inputs, _ = tensors(CASE)
    layer.layer.load_state_dict({"weight": inputs["layer.weight"], "bias": inputs["layer.bias"]})
    return layer


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("variant", ["positional", "plain"])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_the_clustering_layer_is_the_authors_in_chunks_of_any_size(
    variant: str, chunk: int
) -> None:
    inputs, expected = tensors(CASE)
    layer = golden_layer(variant == "positional", chunk)
    # ours takes images first, and tells of chosen positions: here of all, in another order
    features = inputs["features"].transpose(0, 1)
    batch, positions, _ = features.shape
    order = torch.stack([torch.randperm(positions) for _ in range(batch)])
    result = layer.assign(features, order, backward=True)

    assigned = expected[f"online.{variant}.assignments"].transpose(0, 1)
    chosen = assigned[torch.arange(batch)[:, None], order]
    torch.testing.assert_close(result.targets, chosen, **ASSIGNMENTS)
    torch.testing.assert_close(
        result.loss, expected[f"online.{variant}.loss"].to(result.loss.dtype), atol=1e-5, rtol=0
    )
    for name, parameter in layer.layer.named_parameters():
        assert parameter.grad is not None
        theirs = expected[f"online.{variant}.grad.layer.{name}"]
        torch.testing.assert_close(parameter.grad, theirs, **GRADIENTS)


def test_without_backward_the_layer_gets_no_gradient() -> None:
    layer = ClusteringLayer(8, 4)
    layer.assign(torch.randn(6, 9, 8), torch.zeros(6, 2, dtype=torch.long))
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_targets_spread_over_more_prototypes_than_there_are_patches() -> None:
    features = torch.randn(8, 4, 16)
    predicted = torch.arange(4).expand(8, 4)
    for positionwise, rows in ((True, 8), (False, 32)):
        layer = ClusteringLayer(16, 64, positionwise=positionwise, iterations=20)
        targets = layer.assign(features, predicted).targets
        entropy = torch.special.entr(targets).sum(dim=-1).mean()
        # a mean of entropies: a single row may lie below
        assert entropy > 0.95 * math.log(64 / rows)


def share_of(rank: int, processes: int, port: int, folder: str, positionwise: bool) -> None:
    """One of several processes, with its share of the case's images."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=processes
    )
    features = tensors(CASE)[0]["features"].transpose(0, 1)
    share = features.tensor_split(processes)[rank]
    layer = golden_layer(positionwise, 4)
    order = torch.arange(share.shape[1]).expand(len(share), -1)
    targets, loss = layer.assign(share, order, backward=True)
    average_gradients(layer.parameters())
    dist.all_reduce(loss)
    kept = {"targets": targets, "loss": loss / processes}
    kept |= {name: parameter.grad for name, parameter in layer.layer.named_parameters()}
    save_file(kept, Path(folder) / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("variant", ["positional", "plain"])
def test_processes_share_out_what_one_does(tmp_path: Path, variant: str) -> None:
    # shares are equal: two processes, or the next number that divides the images
    images = facts(CASE)["B"]
    processes = next(count for count in range(2, images + 1) if images % count == 0)
    settings = (processes, free_port(), str(tmp_path), variant == "positional")
    torch.multiprocessing.spawn(share_of, settings, nprocs=processes)
    parts = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(processes)]

    _, expected = tensors(CASE)
    targets = torch.cat([part["targets"] for part in parts])
    assigned = expected[f"online.{variant}.assignments"].transpose(0, 1)
    torch.testing.assert_close(targets, assigned, atol=2e-6, rtol=0)
    for part in parts:
        loss = expected[f"online.{variant}.loss"].float()
        torch.testing.assert_close(part["loss"], loss, atol=1e-5, rtol=0)
        for name in ("weight", "bias"):
            theirs = expected[f"online.{variant}.grad.layer.{name}"]
            torch.testing.assert_close(part[name], theirs, **GRADIENTS)
