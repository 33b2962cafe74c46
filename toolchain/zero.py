"""A configuration of DeepSpeed, done by PyTorch: ZeRO 0 is what DDP does, and 1 to 3 are what FSDP2 does.

DeepSpeed itself takes no part and need not be installed. What the configuration says beside that, the run has
to agree with; what would make training another one is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.errors import ToolchainError

# By these names accelerate's launcher tells processes what to be.
_USED, _CONFIG = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"

_NUMBERS = {
    "gradient_accumulation_steps",
    "gradient_clipping",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
}
"""What a configuration says of the training, which has to be so."""
_OURS = {
    "optimizer": "it is AdamW, at --learning-rate",
    "scheduler": "--steps and --learning-rate say it",
    "fp16": "products are bfloat16, which need no scale of the loss",
    "activation_checkpointing": "--checkpointing does it",
    **dict.fromkeys(("tensorboard", "wandb", "comet", "csv_monitor"), "--tracker does it"),
}
"""What has its like here."""
_PASSED_OVER = {
    "dump_state",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}
"""How DeepSpeed goes about it, which leaves nothing different behind: in general, in ZeRO, and offloading."""
_BUFFERS = {
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "ignore_unused_parameters",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
}
_OFFLOADING = {"nvme_path", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu"}
_OFFLOADS = ("offload_optimizer", "offload_param")


@dataclass(frozen=True, kw_only=True)
class Zero:
    """What a configuration of DeepSpeed asks for."""

    stage: int
    offload: bool
    """Whether shares, their gradients and their optimizer's states are to lie in the machine's memory."""
    numbers: Mapping[str, object]
    """By DeepSpeed's names, what it says of the training; what is `auto` is left out."""

    def __str__(self) -> str:
        way = {
            0: "DDP: every process holds everything",
            3: "FSDP2: everything is sharded, and a block whole only while it runs",
        }.get(self.stage, "FSDP2: everything is sharded, and a block whole until its backward pass is done")
        where = "; shares lie in the machine's memory" if self.offload else ""
        return f"ZeRO {self.stage} is done by PyTorch's {way}{where}"

    @property
    def variables(self) -> dict[str, str]:
        """The same, as accelerate's launcher tells processes to use FSDP2."""
        return {
            "ACCELERATE_USE_FSDP": str(self.stage > 0).lower(),
            "FSDP_VERSION": "2",
            "FSDP_RESHARD_AFTER_FORWARD": str(self.stage == 3).lower(),
            "FSDP_OFFLOAD_PARAMS": str(self.offload).lower(),
        }

    def check(self, **own: float) -> None:
        """Compare what the configuration says of the training with what the training is.

        Raises:
            ToolchainError: They differ.
        """
        for name, said in self.numbers.items():
            if said != own[name]:
                raise ToolchainError(
                    f"DeepSpeed's configuration says {name} {said}, and this run has {own[name]:g}; "
                    'make them the same, or have the configuration say "auto"'
                )


def zero_from_config(config: Mapping[str, Any]) -> Zero:
    """Read a configuration as DeepSpeed takes it.

    Raises:
        ToolchainError: It asks for what there is not.
    """
    zero = _section(config, "zero_optimization")
    stage = zero.get("stage", 0)
    if stage not in range(4):
        raise ToolchainError(f"DeepSpeed's configuration asks for ZeRO {stage!r}; there are 0, 1, 2 and 3")
    places = [_place(_section(zero, name), name) for name in _OFFLOADS]
    _refuse(set(zero) - {"stage", *_OFFLOADS} - _BUFFERS, "zero_optimization.")
    if "cpu" in places and not stage:
        raise ToolchainError(
            "DeepSpeed's configuration offloads what ZeRO 0 does not shard; ask for ZeRO 2 or 3"
        )
    asked = {name for name, value in config.items() if not _is_off(value)}
    _refuse(asked - {"zero_optimization", "bf16"} - _NUMBERS - _PASSED_OVER)
    _refuse(set(_section(config, "bf16")) - {"enabled"}, "bf16.")
    numbers = {name: config[name] for name in sorted(asked & _NUMBERS) if config[name] != "auto"}
    return Zero(stage=stage, offload="cpu" in places, numbers=numbers)


def zero_variables(fields: Mapping[str, Any], *, num_machines: int) -> dict[str, str]:
    """What accelerate's launcher would tell processes, if DeepSpeed were installed.

    Args:
        fields: `deepspeed_config` of accelerate's configuration.
        num_machines: Of the run.

    Raises:
        ToolchainError: They ask for what there is not.
        ValueError, TypeError: accelerate does not know them.
    """
    from accelerate import DeepSpeedPlugin

    given = dict(fields)
    file, starter = (
        given.pop("deepspeed_config_file", None),
        given.pop("deepspeed_multinode_launcher", "pdsh"),
    )
    given.pop("zero3_init_flag", None)  # of how a model is made, which is not DeepSpeed's here
    if num_machines > 1 and starter != "standard":
        raise ToolchainError(
            f"its deepspeed_multinode_launcher is {starter}; write standard, and give the same command "
            "on every machine"
        )
    if file is not None and given:
        raise ToolchainError(
            f"beside a deepspeed_config_file it has {', '.join(sorted(given))}; say that in the file"
        )
    config = DeepSpeedPlugin(hf_ds_config=file, **given).deepspeed_config
    zero_from_config(config)
    return {_USED: "true", _CONFIG: json.dumps(config)}


def take_zero() -> Zero | None:
    """What accelerate's launcher asks of this process; from then on it has asked for FSDP2 or DDP.

    Raises:
        ToolchainError: It asks for what there is not.
    """
    if os.environ.get(_USED) != "true":
        return None
    from accelerate import DeepSpeedPlugin

    try:
        config = DeepSpeedPlugin().deepspeed_config
    except (ValueError, TypeError) as error:
        raise ToolchainError(f"accelerate cannot read DeepSpeed's configuration: {error}") from error
    zero = zero_from_config(config)
    if zero.offload and os.environ.get("WORLD_SIZE") == "1":
        raise ToolchainError(
            "DeepSpeed's configuration offloads what a single process does not shard; leave that out (--turn "
            "and --cache-prefix take less memory)"
        )
    del os.environ[_USED]
    os.environ |= zero.variables
    return zero


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, Mapping):
        raise ToolchainError(f"{name} of DeepSpeed's configuration is {section!r}, and not a section")
    return section


def _place(section: Mapping[str, Any], name: str) -> str:
    """Where something is offloaded to."""
    place = section.get("device", "none")
    if place not in ("none", "cpu"):
        raise ToolchainError(f"{name} of DeepSpeed's configuration is to {place}; there are none and cpu")
    _refuse(set(section) - {"device"} - _OFFLOADING, f"zero_optimization.{name}.")
    return str(place)


def _is_off(value: object) -> bool:
    """Whether a section says nothing; what is `auto` follows `mixed_precision`."""
    return value is None or (isinstance(value, Mapping) and value.get("enabled") in (False, "auto"))


def _refuse(names: set[str], prefix: str = "") -> None:
    for name in sorted(names):
        instead = f" ({_OURS[name]})" if name in _OURS else ""
        raise ToolchainError(
            f"{prefix}{name} of DeepSpeed's configuration is not for this training; leave it out{instead}"
        )
