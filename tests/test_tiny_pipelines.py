"""The tiny pipelines run, are deterministic, and call their denoisers as often as the table says."""

import collections
import functools

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import TINY, TinyCase, load, run

CASES = [pytest.param(case, id=name) for name, case in TINY.items()]
STEPS = 4


@functools.cache
def built(name: str) -> DiffusionPipeline:
    """One shared pipeline of a case; the tests leave it as it is."""
    return TINY[name].build()


def observed(case: TinyCase, steps: int) -> tuple[collections.Counter, list[torch.Tensor]]:
    """Number of calls of the scheduler and of each denoiser, and what the denoisers gave."""
    pipe, calls, outputs = built(case.name), collections.Counter(), []

    def record(name, module, args, output):
        calls[name] += 1
        outputs.append(output[0])

    hooks = [getattr(pipe, n).register_forward_hook(functools.partial(record, n)) for n in case.denoisers]
    with pytest.MonkeyPatch.context() as patch:
        step = pipe.scheduler.step

        @functools.wraps(step)
        def counting_step(*args, **kwargs):
            calls["step"] += 1
            return step(*args, **kwargs)

        patch.setattr(pipe.scheduler, "step", counting_step, raising=False)
        run(case, pipe, steps)
    for hook in hooks:
        hook.remove()
    return calls, outputs


@pytest.mark.parametrize("case", CASES)
def test_output_is_finite_and_deterministic(case):
    first, second = (run(case, built(case.name), STEPS) for _ in range(2))
    assert torch.isfinite(first).all()
    assert 0.05 < first.std() < 5
    assert torch.equal(first, second)
    assert not torch.equal(first, run(case, built(case.name), STEPS, seed=1))


@pytest.mark.parametrize("case", CASES)
def test_build_gives_the_same_weights_and_keeps_the_global_generator(case):
    state = torch.get_rng_state()
    other = case.build()
    assert torch.equal(torch.get_rng_state(), state)
    for name in case.denoisers:
        weights, again = getattr(built(case.name), name).state_dict(), getattr(other, name).state_dict()
        assert all(torch.equal(weights[key], again[key]) for key in weights)
        assert not getattr(other, name).training
        assert not getattr(other, name)._forward_hooks and not getattr(other, name)._forward_pre_hooks


@pytest.mark.parametrize("case", CASES)
def test_denoisers_are_called_as_often_as_the_table_says(case):
    calls, _ = observed(case, STEPS)
    updates = case.updates(STEPS)
    assert calls["step"] == updates
    if case.name == "wan22":
        assert calls["transformer"] == calls["transformer_2"] == case.calls_per_step * updates / 2
    else:
        assert calls[case.denoisers[-1]] == case.calls_per_step * updates
        assert all(calls[name] == updates for name in case.denoisers[:-1])


@pytest.mark.parametrize("case", [case for case in CASES if case.values[0].calls_per_step == 2])
def test_sequential_guidance_sees_the_prompt(case):
    _, outputs = observed(case, STEPS)
    assert all((a - b).norm() > 1e-2 * a.norm() for a, b in zip(outputs[::2], outputs[1::2], strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case.values[0].guided == "stacked"])
def test_stacked_guidance_sees_the_prompt(case):
    _, outputs = observed(case, STEPS)
    for output in outputs:
        if isinstance(output, torch.Tensor):  # not that of a controlnet
            a, b = output.chunk(2)
            assert (a - b).norm() > 1e-2 * a.norm()


@pytest.mark.parametrize("name", TINY)
def test_save_and_load(name, tmp_path):
    case, pipe = TINY[name], built(name)
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is type(pipe)
    assert torch.equal(run(case, pipe, STEPS), run(case, loaded, STEPS))
