"""A run of 200 steps, with an evaluation, checkpoints and a log, keeps no more at its end than
before: `python -m tests.memory_growth`.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from memory_growth import growth


@pytest.mark.slow
def test_nothing_is_kept_from_step_to_step(tmp_path: Path) -> None:
    """No tensor, and less than one Python object per step.

    Resident memory is given the room of an allocator's arena.
    """
    # nothing is left there of other tests
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        early, late = fresh.submit(growth, tmp_path, 200).result()
    assert (early.step, late.step) == (133, 199)
    assert late.tensors <= early.tensors and late.tensor_bytes <= early.tensor_bytes
    assert late.objects - early.objects < late.step - early.step
    assert late.resident - early.resident < 32 * 2**20
