"""Rates and momenta of a pre-training, against the authors' schedules."""

import pytest
from golden_cases import facts

from mim_refiner_hf.pretraining.schedules import WarmupCosine

FILE = "schedules.json"


@pytest.mark.usefixtures("goldens")
def test_capi_schedules_are_the_authors() -> None:
    cases = facts("capi-schedules", FILE)["schedules"]
    assert cases
    for name, case in cases.items():
        schedule = WarmupCosine(
            total=case["total_iters"],
            base=case["base_value"],
            final=case["final_value"],
            start=case.get("start_warmup_value", 0.0),
            warmup=case["warmup_iters"],
            truncate=case["truncate_cos"],
        )
        for step, value in case["values"]:
            assert schedule(step) == pytest.approx(value, rel=1e-12, abs=0), (name, step)


@pytest.mark.usefixtures("goldens")
def test_conmim_schedules_are_the_authors() -> None:
    runs = facts("conmim-schedules", FILE)["runs"]
    assert runs
    for name, run in runs.items():
        total = run["epochs"] * run["steps_per_epoch"]
        warmup = run["warmup_epochs"] * run["steps_per_epoch"]
        rate = WarmupCosine(total, base=run["lr"], final=run["min_lr"], warmup=warmup)
        momentum = WarmupCosine(total, base=run["momentum"], final=1.0)
        for step, lr, decay in run["rows_iteration_lr_momentum"]:
            assert rate(step) == pytest.approx(lr, rel=1e-9, abs=0), (name, step)
            assert momentum(step) == pytest.approx(decay, rel=1e-9, abs=0), (name, step)


def test_a_warm_up_of_one_step_starts_below() -> None:
    schedule = WarmupCosine(total=4, base=2.0, warmup=1)
    assert [schedule(step) for step in range(3)] == [0.0, 2.0, 1.5]
