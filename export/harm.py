"""What rounding a weight does to the velocity, for every linear of the blocks at once.

One weight at a time can be rounded and the velocity compared, at the price of a forward pass for each. The
same is known to first order from gradients: a small error E of a weight W changes the velocity by <E, dv/dW>,
and rounding errors are as often up as down, so their squares add up. With v asked in random directions, one
backward pass a state gives the harm of every weight, and its mean over some dozens of states orders the
components of `shapes` as rounding them one by one does (rank correlation 0.99).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from export.bits import Weight
from export.calibrate import Moments
from export.errors import ExportError
from export.quantize import choose_group_size
from export.rounding import dequantize, quantize_matrix
from toolchain.families.blocks import components_of
from toolchain.families.mmdit import MMDiT
from toolchain.families.view import Model
from toolchain.trajectories import States

__all__ = ["component_of_weights", "rounding_harms", "weight_bits"]

# Linears with a smaller group are not stored in 4 or 8 bits, so there is nothing to decide.
_SMALLEST_GROUP = 16


@dataclass(frozen=True, kw_only=True)
class _Rounded:
    """A weight in 4 and 8 bits."""

    squares: torch.Tensor
    """Of the errors in 4 bits, shaped as the parameter."""
    ratio: float
    """How much of the error is left in 8 bits, as energy of the output."""
    bytes: Mapping[int, int]


def rounding_harms(
    model: Model,
    moments: Moments,
    states: States,
    *,
    group_size: int = 128,
    num_states: int = 64,
    seed: int = 0,
    on_step: Callable[[], None] | None = None,
) -> list[Weight]:
    """Estimate what rounding each linear of the blocks alone to 4 and to 8 bits does to the velocity.

    The harm is that of `velocity_errors`: |v - v_rounded|² / |v|², of what the sampler follows, as a mean
    over states. Takes memory for the weights twice more, and for the activations of one state.

    Args:
        model: What will be exported; left as it is.
        moments: Of its inputs.
        states: Of its own sampling.
        group_size: Most weights that share a scale.
        num_states: How many of the states to take.
        seed: Of the directions that the velocity is asked in.
        on_step: Called after every state.

    Returns:
        One for each weight, which is a unit of its own; `dataclasses.replace` makes components the units.

    Raises:
        ExportError: The moments are of another model, or there are no states.
    """
    count = min(num_states, len(states) // states.copies)
    if not count:
        raise ExportError("the harm of rounding is measured on states of sampling, and there are none")
    view, parameters = model.mmdit, dict(model.pipeline.transformer.named_parameters())
    rounded = {
        name: item
        for name in component_of_weights(view)
        if (item := _round(name, parameters[name], moments, group_size)) is not None
    }
    sums = dict.fromkeys(rounded, 0.0)
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in rounded)
        generator = torch.Generator().manual_seed(seed)
        for number in range(count):
            rows = slice(number * states.copies, (number + 1) * states.copies)
            latents, timesteps, text, said = states.batch(rows)
            with torch.enable_grad():
                velocity = states.followed(view.velocity(latents, timesteps, text).float())
                signs = torch.randint(0, 2, velocity.shape, generator=generator) * 2 - 1
                asked = (velocity * signs).sum() / states.followed(said).float().norm()
                wanted = [parameters[name] for name in rounded]
                gradients = torch.autograd.grad(asked, wanted, allow_unused=True)
            for (name, item), gradient in zip(rounded.items(), gradients, strict=True):
                if gradient is not None:  # the end of the text stream reaches no velocity
                    sums[name] += float((gradient.float().square() * item.squares).sum())
            if on_step is not None:
                on_step()
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
    return [
        Weight(
            name=name,
            unit=name,
            bytes4=item.bytes[4],
            bytes8=item.bytes[8],
            bytes16=item.bytes[16],
            error4=sums[name] / count,
            error8=sums[name] / count * item.ratio,
        )
        for name, item in rounded.items()
    ]


def component_of_weights(view: MMDiT) -> dict[str, str]:
    """The component (`7.ff`) that each linear's weight belongs to, by the names of the parameters."""
    names = {
        id(part.weight): f"{name}.weight"
        for name, part in view.transformer.named_modules()
        if isinstance(part, nn.Linear)
    }
    units = [f"{index}.{name}" for index, block in enumerate(view.blocks) for name in components_of(block)]
    return {
        names[id(parameter)]: unit
        for unit in units
        for parameter in view.parameters_of(unit)
        if id(parameter) in names
    }


def weight_bits(view: MMDiT, bits: Mapping[str, int]) -> dict[str, int]:
    """Bits by weight where they are given by component; those of no component named are left out.

    Args:
        view: Of the model that is exported, which the components' numbers are of.
        bits: By component, as `CompressionPlan.student_bits` has them.

    Raises:
        ExportError: The model has no such component.
    """
    component = component_of_weights(view)
    if unknown := sorted(bits.keys() - set(component.values())):
        raise ExportError(
            f"bits are given for {', '.join(unknown)}, which no linear of the model belongs to; name "
            f"components like {next(iter(component.values()), '0.ff')}"
        )
    return {name: bits[unit] for name, unit in component.items() if unit in bits}


def _round(name: str, parameter: nn.Parameter, moments: Moments, group_size: int) -> _Rounded | None:
    weight = parameter.detach().float().cpu().numpy().T
    group = choose_group_size(len(weight), group_size)
    if group < _SMALLEST_GROUP:
        return None
    importance = moments.importance(name)
    four, eight = (
        quantize_matrix(weight, bits=bits, group_size=group, importance=importance) for bits in (4, 8)
    )
    errors = np.square(dequantize(four.values, four.scales) - weight)
    return _Rounded(
        squares=torch.from_numpy(np.ascontiguousarray(errors.T)).to(parameter.device),
        ratio=eight.error / four.error if four.error else 0.0,
        bytes={
            4: -(-weight.size // 2) + four.scales.nbytes,
            8: weight.size + eight.scales.nbytes,
            16: 2 * weight.size,
        },
    )
