from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.bundle import Scheduler
from deploy.errors import DeployError
from deploy.sampler import euler_step, sigmas

STATIC = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}
DYNAMIC = STATIC | {"use_dynamic_shifting": True}
CASES = {
    "no shift": STATIC | {"shift": 1.0},
    "shift of SD3": STATIC,
    "dynamic, exponential": DYNAMIC,
    "dynamic, linear": DYNAMIC | {"time_shift_type": "linear"},
}

# The same formula in another order differs in the last place or two of a float32 near 1.
ROUNDING = 2.5e-7


def reference(
    options: dict, num_steps: int, image_seq_len: int, spacing: str
) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    ranges = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(image_seq_len, *(options[name] for name in ranges))
    mu = mu if options["use_dynamic_shifting"] else None
    if spacing == "unit":  # as the pipeline of FLUX.1 asks for it
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    else:
        scheduler.set_timesteps(num_steps, mu=mu)
    return scheduler


@pytest.mark.parametrize("spacing", ["train_range", "unit"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@settings(max_examples=25)
@given(num_steps=st.integers(1, 100), image_seq_len=st.integers(4, 9216))
def test_sigmas_are_those_of_diffusers(
    options: dict, spacing: Any, num_steps: int, image_seq_len: int
) -> None:
    expected = reference(options, num_steps, image_seq_len, spacing)
    timesteps, levels = sigmas(Scheduler(spacing=spacing, **options), num_steps, image_seq_len)
    assert timesteps.dtype == levels.dtype == np.float32
    assert timesteps.shape == (num_steps,)
    np.testing.assert_allclose(levels, expected.sigmas.numpy(), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(timesteps, expected.timesteps.numpy(), rtol=0, atol=1000 * ROUNDING)


@pytest.mark.parametrize("spacing", ["train_range", "unit"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_steps_are_those_of_diffusers(options: dict, spacing: Any) -> None:
    scheduler = reference(options, 5, 64, spacing)
    timesteps, levels = sigmas(Scheduler(spacing=spacing, **options), 5, 64)
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((2, 4, 3, 3), np.float32)
    expected = torch.from_numpy(latents)
    for index in range(len(timesteps)):
        velocity = generator.standard_normal(latents.shape, np.float32)
        expected = scheduler.step(
            torch.from_numpy(velocity), scheduler.timesteps[index], expected, return_dict=False
        )[0]
        latents = euler_step(latents, velocity, levels[index], levels[index + 1])
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, expected.numpy(), rtol=0, atol=4e-6)


def test_no_steps_are_refused() -> None:
    with pytest.raises(DeployError, match="one step at least, not 0"):
        sigmas(Scheduler(spacing="train_range", **STATIC), 0, 64)
