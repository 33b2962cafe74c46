"""What a configuration of DeepSpeed asks for is done, or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from toolchain.errors import ToolchainError
from toolchain.zero import Zero, take_zero, zero_from_config, zero_variables

# As `accelerate config` writes it.
ASKED = {
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "offload_optimizer_device": "none",
    "offload_param_device": "none",
    "zero3_init_flag": True,
    "zero3_save_16bit_model": True,
    "zero_stage": 3,
}
# As many who train write it.
FILE: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False, "initial_scale_power": 16, "loss_scale": 0},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
    "zero_optimization": {
        "stage": 2,
        "allgather_bucket_size": 2e8,
        "contiguous_gradients": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
    },
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The variables of this process, which may be changed."""
    variables = {"WORLD_SIZE": "2"}
    monkeypatch.setattr("os.environ", variables)
    return variables


@pytest.mark.parametrize(
    ("stage", "sharded", "resharded"),
    [(0, "false", "false"), (1, "true", "false"), (2, "true", "false"), (3, "true", "true")],
)
def test_each_stage_is_what_fsdp2_or_ddp_does(
    told: dict[str, str], stage: int, sharded: str, resharded: str
) -> None:
    told |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    assert take_zero() == Zero(stage=stage, offload=False, numbers={})
    assert "ACCELERATE_USE_DEEPSPEED" not in told
    assert told.items() >= {
        ("ACCELERATE_USE_FSDP", sharded),
        ("FSDP_VERSION", "2"),
        ("FSDP_RESHARD_AFTER_FORWARD", resharded),
        ("FSDP_OFFLOAD_PARAMS", "false"),
    }
    assert take_zero() is None


def test_processes_are_told_what_a_configuration_of_accelerate_says(told: dict[str, str]) -> None:
    told |= zero_variables(ASKED, num_machines=1)
    assert take_zero() == Zero(
        stage=3, offload=False, numbers={"gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
    )


def test_processes_are_told_what_a_file_of_deepspeed_says(told: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(FILE), encoding="utf-8")
    asked = {"deepspeed_config_file": str(file), "deepspeed_multinode_launcher": "standard"}
    told |= zero_variables(asked, num_machines=2)
    zero = take_zero()
    assert zero == Zero(stage=2, offload=True, numbers={"train_batch_size": 64})
    assert told["FSDP_OFFLOAD_PARAMS"] == "true"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"optimizer": {"type": "Lion"}},
            r"^optimizer of .* leave it out \(it is AdamW, at --learning-rate\)",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "^scheduler of .*--steps and --learning-rate"),
        ({"fp16": {"enabled": True}}, "^fp16 of .*products are bfloat16"),
        ({"activation_checkpointing": {"profile": True}}, "^activation_checkpointing of .*--checkpointing"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, r"^bf16\.bf16_optimizer_states of"),
        (
            {"gradient_clippping": 1.0},
            "^gradient_clippping of DeepSpeed's configuration is not for this training",
        ),
        ({"zero_optimization": True}, "zero_optimization .* is True, and not a section"),
        ({"zero_optimization": {"stage": 4}}, "asks for ZeRO 4; there are 0, 1, 2 and 3"),
        (
            {"zero_optimization": {"zero_quantized_weights": True}},
            r"^zero_optimization\.zero_quantized_weights of",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param of DeepSpeed's configuration is to nvme; there are none and cpu",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}},
            r"^zero_optimization\.offload_optimizer\.ratio of",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "offloads what ZeRO 0 does not shard",
        ),
    ],
)
def test_what_would_be_another_training_is_refused_by_its_name(changed: dict[str, Any], said: str) -> None:
    zero_from_config(FILE)
    with pytest.raises(ToolchainError, match=said):
        zero_from_config(FILE | changed)


def test_a_configuration_has_to_agree_with_the_run() -> None:
    zero = Zero(stage=2, offload=False, numbers={"train_batch_size": 64, "gradient_clipping": 1.0})
    zero.check(train_batch_size=64, gradient_clipping=1.0)
    with pytest.raises(
        ToolchainError, match="says train_batch_size 64, and this run has 32; make them the same"
    ):
        zero.check(train_batch_size=32, gradient_clipping=1.0)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"zero_stage": 2}, "its deepspeed_multinode_launcher is pdsh; write standard"),
        (
            {
                "deepspeed_config_file": "zero.json",
                "deepspeed_multinode_launcher": "standard",
                "zero_stage": 2,
            },
            "beside a deepspeed_config_file it has zero_stage; say that in the file",
        ),
        (
            {"deepspeed_multinode_launcher": "standard", "zero_stage": 3, "offload_param_device": "nvme"},
            "to nvme",
        ),
    ],
)
def test_what_cannot_be_passed_on_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ToolchainError, match=said):
        zero_variables(asked, num_machines=2)


def test_one_process_does_not_offload(told: dict[str, str]) -> None:
    told |= zero_variables({"zero_stage": 2, "offload_optimizer_device": "cpu"}, num_machines=1)
    told["WORLD_SIZE"] = "1"
    with pytest.raises(ToolchainError, match="offloads what a single process does not shard"):
        take_zero()


def test_what_accelerate_cannot_read_is_refused(told: dict[str, str]) -> None:
    told |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "nothing.json"}
    with pytest.raises(ToolchainError, match=r"accelerate cannot read DeepSpeed's .*nothing\.json"):
        take_zero()
