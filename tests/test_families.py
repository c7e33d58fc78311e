"""Every family of pipelines under every accelerator: counts add up, ControlNets are skipped with the UNet."""

import pytest
import torch
from tiny_pipelines import TINY, run

STEPS = 20


@pytest.mark.parametrize("accel", [{"sada": {"tolerance": 1e9}}, "sada", "sada:paper", "reuse"], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_counts(name, accel):
    case = TINY[name]
    pipe = case.build().to(accel=accel)
    result = run(case, pipe, STEPS)
    report = pipe.accel.report
    requested = case.updates(STEPS) * case.calls_per_step
    assert torch.isfinite(result).all()
    assert report.updates == case.updates(STEPS)
    assert report.requested == requested
    assert report.evaluated <= requested
    if accel != "sada":  # an untrained network may have nothing that can be skipped within tolerance
        assert report.evaluated < 0.7 * requested
    main = [action for action in report.actions if action.network != "controlnet"]
    skipped = sum(len(action.samples) for action in main) / report.batch
    assert skipped == pytest.approx(report.skipped)
    assert report.seconds["denoiser"] <= report.seconds["total"]


@pytest.mark.parametrize("accel", ["sada:fast", "reuse"])
def test_controlnet_is_skipped_with_the_unet(accel):
    case = TINY["sd_controlnet"]
    pipe = case.build().to(accel=accel)
    run(case, pipe, STEPS)
    counts = pipe.accel.report.counts
    assert counts["controlnet"].evaluated == counts["unet"].evaluated < STEPS
    assert pipe.accel.report.requested == STEPS, "the ControlNet is not a denoiser"


def test_second_network_starts_with_an_evaluation():
    case = TINY["wan22"]
    pipe = case.build().to(accel={"sada": {"tolerance": 1e9}})
    run(case, pipe, STEPS)
    report = pipe.accel.report
    switch = report.counts["transformer"].requested // 2
    assert switch not in report.skipped_steps() and switch > 0
    assert report.counts["transformer_2"].evaluated > 0
    assert str(report).startswith(f"{report.evaluated:.4g} of 40 evaluations")
    assert report.to_dict()["networks"]["transformer"]["requested"] == 2 * switch
