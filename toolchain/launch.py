"""The command line in several processes, started by accelerate; when one ends too soon, one error.

A process that ends by itself says what there is to say to the launcher and not to the user: all would say it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from toolchain.errors import ToolchainError
from toolchain.interrupts import Stopped
from toolchain.zero import zero_variables

LOST_OTHERS = 76
"""What a process exits with when others are gone: never the cause."""
_WAYS = ("NO", "MULTI_GPU", "FSDP", "DEEPSPEED")
"""Whatever they are called, the latter run on processors, too, where there is no GPU."""
_LAUNCHED, _LAST_WORDS = "HPTOOL_LAUNCHED", "TORCHELASTIC_ERROR_FILE"


def launch(config: Path, arguments: Sequence[str], kept: Callable[[], str]) -> tuple[str, int] | None:
    """Run `hptool ARGUMENTS` in the processes that a configuration of accelerate asks for, to their end.

    Args:
        config: As `accelerate config` writes it.
        arguments: Of the command line.
        kept: Says what is left of a run that was cut short, and what to do.

    Returns:
        What a process that ended by itself has to say, and its exit code; None if all is done.

    Raises:
        ToolchainError: The configuration cannot be used, or a process ended before its work.
        Stopped: By a signal.
    """
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not config.is_file():
        raise ToolchainError(f"there is no accelerate configuration {config}; `accelerate config` writes one")
    # The launcher's own accounts of what happened are for who debugs it.
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Time for a checkpoint between a signal and the end.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    os.environ[_LAUNCHED] = "1"
    given = ["--config_file", str(config), "--module", "toolchain", *arguments]
    try:
        asked = load_config_from_file(str(config))
        if asked.distributed_type not in _WAYS:
            raise ValueError(
                f"its distributed_type is {asked.distributed_type}, and hptool knows {', '.join(_WAYS)}"
            )
        if asked.distributed_type == "DEEPSPEED":
            os.environ |= zero_variables(asked.deepspeed_config, num_machines=asked.num_machines)
            given.insert(0, "--multi_gpu")  # accelerate's own way there is through DeepSpeed
        launch_command(launch_command_parser().parse_args(given))
    except ChildFailedError as error:
        ended = {
            rank: (failure.exitcode, str(failure.message) if Path(failure.error_file).is_file() else None)
            for rank, failure in error.failures.items()
        }
    except subprocess.CalledProcessError as error:  # of a configuration with a single process
        ended = {0: (error.returncode, None)}
    except SignalException as error:
        raise Stopped(error.sigval) from error
    except (ValueError, TypeError, KeyError, AssertionError, ImportError, OSError) as error:
        raise ToolchainError(f"accelerate cannot launch what {config} asks for: {error}") from error
    else:
        return None
    # Where one has ended, the launcher ends the others by SIGTERM, unless they have noticed.
    late = (-signal.SIGTERM, LOST_OTHERS)
    rank, (code, words) = min(ended.items(), key=lambda item: (item[1][0] in late, item[1][0] > 0, item[0]))
    if words is not None:
        return words, code
    raise ToolchainError(f"process {rank} {_manner(code)}, and with it the run. {kept()}")


def leave_last_words(message: str) -> bool:
    """Have the launcher say it, if it is this module that launched this process."""
    file = os.environ.get(_LAST_WORDS)
    if not file or _LAUNCHED not in os.environ:
        return False
    Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")
    return True


def _manner(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"was ended by {name}" + (
            ", as the system does for want of memory" if name == "SIGKILL" else ""
        )
    if code == LOST_OTHERS:
        return "lost others, which ended on another machine"
    return f"failed with exit code {code}"
