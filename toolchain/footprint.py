"""What distillation takes on the device, computed before anything is loaded. Pure; no torch.

Weights, gradients and moments follow from the plan, exactly but for the head, which a geometry does not
tell from the embedders. Activations are an estimate; not counted are what kernels use inside, and what the
allocator loses.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from toolchain.errors import ToolchainError
from toolchain.geometry import kept_parts
from toolchain.plan import EMBEDDERS, HEAD, CompressionPlan

Mode = Literal["whole", "shared", "cached", "in-turn"]
"""Two models that share nothing; one prefix for both; a prefix that left its outputs on disk; teacher and
student by turns."""

_STREAM_BYTES = 2
_SAVED_BYTES = 64
"""What one block keeps for its gradient, by token and unit of width, in bfloat16 with LayerNorms in float32;
measured: 62 in a joint block of SD3, 58 in one of FLUX, 52 in a single one."""
_PIXELS_PER_TOKEN = 16 * 16


@dataclass(frozen=True, kw_only=True)
class DistillMemory:
    """Bytes on the device while the student learns; what the teacher needs by itself is less."""

    prefix: int
    """Frozen weights both models begin with, embedders included; twice where nothing is shared."""
    teacher_tail: int
    student_frozen: int
    """Weights behind the prefix that do not learn."""
    student_tail: int
    """Weights that learn, in 32 bits."""
    casts: int
    """Their copies in 16 bits, which autocast makes for every step."""
    gradients: int
    moments: int
    activations: int
    teacher_features: int
    """What the teacher made of the batch, held until the student's is compared with it."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def memory_arithmetic(
    plan: CompressionPlan,
    *,
    mode: Mode,
    inner_width: int,
    batch_size: int = 1,
    features: bool = True,
    frozen_bytes: int = 2,
    moment_bytes: int = 8,
    checkpointing: bool = True,
) -> DistillMemory:
    """What distilling by a plan takes, at the picture size and text length of its geometry.

    Args:
        plan: It holds the geometry, and says what learns.
        mode: What shares memory, and what leaves it.
        inner_width: Of the transformer; a geometry does not know it.
        batch_size: Samples on the device at once.
        features: Whether the teacher's features count.
        frozen_bytes: Of a weight that does not learn: 2 if the teacher was cast to 16 bits.
        moment_bytes: Of the optimiser's state of one weight: 8 for two moments in 32 bits, as `optimize_`
            keeps them; 2 would be an optimiser of 8 bits, which it is not.
        checkpointing: Whether activations are computed again for the gradient.
    """
    if mode not in ("whole", "shared", "cached", "in-turn"):
        raise ToolchainError(f"unknown mode {mode!r}; there are whole, shared, cached, in-turn")
    geometry, shared = plan.geometry, plan.shared_prefix
    blocks = [block.parameters for block in geometry.blocks]
    # The final AdaLN makes a scale and a shift; the projection behind it is small.
    head = min(geometry.other_parameters, 2 * inner_width * (inner_width + 1))
    embedders = geometry.other_parameters - head
    prefix = sum(blocks[:shared]) + (embedders if shared else 0)
    teacher_tail = sum(blocks) + geometry.other_parameters - prefix

    weights = [(plan.strength_of(HEAD) > 0, head)]
    if not shared:
        weights.append((plan.strength_of(EMBEDDERS) > 0, embedders))
    for index in plan.kept_blocks:
        if index >= shared:
            weights += _block_weights(plan, index)
    learning = sum(parameters for learns, parameters in weights if learns)
    frozen = sum(parameters for learns, parameters in weights if not learns)

    tokens = geometry.height * geometry.width // _PIXELS_PER_TOKEN + geometry.text_tokens
    tail_blocks = sum(index >= shared for index in plan.kept_blocks)
    stream = batch_size * tokens * inner_width * _STREAM_BYTES
    saved = batch_size * tokens * inner_width * _SAVED_BYTES
    teacher_there = mode in ("whole", "shared") or (mode == "cached" and features)
    return DistillMemory(
        prefix={"whole": 2, "shared": 1, "cached": 0, "in-turn": 0}[mode] * prefix * frozen_bytes,
        teacher_tail=teacher_tail * frozen_bytes * teacher_there,
        student_frozen=frozen * frozen_bytes,
        student_tail=learning * 4,
        casts=learning * 2,
        gradients=learning * 4,
        moments=learning * moment_bytes,
        activations=tail_blocks * stream + saved if checkpointing else tail_blocks * saved,
        teacher_features=tail_blocks * stream * features,
    )


def _block_weights(plan: CompressionPlan, index: int) -> list[tuple[bool, int]]:
    """Whether each part of a kept block learns, and its parameters."""
    block, gone = plan.geometry.blocks[index], plan.removed_components.get(index, frozenset())
    learns = {name: plan.strength_of(f"{index}.{name}") > 0 for name in block.components if name not in gone}
    # The constant a removed norm leaves learns if anything in its block does.
    return [
        (learns.get(part.name.partition(".")[0], any(learns.values())), part.parameters)
        for part in kept_parts(block, gone, plan.semantics)
    ]
