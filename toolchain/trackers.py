"""Where the numbers and pictures of a run go besides: TensorBoard, or whatever else accelerate knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain.errors import ToolchainError


class Tracker:
    """One of accelerate's trackers, begun when there is something to say.

    Args:
        name: As accelerate calls it.
        run: What the run is called there.
        directory: For those that write files.

    Raises:
        ToolchainError: There is no such tracker, or its package is not installed.
    """

    def __init__(self, name: str, run: str, directory: Path) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        here = sorted(map(str, get_available_trackers()))
        if name not in here:
            known = name in LOGGER_TYPE_TO_CLASS
            raise ToolchainError(
                f"the tracker {name!r} is "
                + ("not installed here" if known else "none that accelerate knows")
                + f"; there are {', '.join(here) or 'none'}"
                + (f" (pip install {name})" if known else "")
            )
        self._kind = LOGGER_TYPE_TO_CLASS[name]
        self._run, self._directory = run, directory
        self._begun: Any = None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers, by name, after so many steps."""
        self._at(step).log(values, step=step)

    def show(self, step: int, pictures: npt.NDArray[np.uint8]) -> None:
        """Pictures [N, height, width, 3], if the tracker takes any."""
        tracker = self._at(step)
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"pictures": pictures}, step=step, **layout)

    def finish(self) -> None:
        """Let it write what it still holds."""
        if self._begun is not None:
            self._begun.finish()

    def _at(self, step: int) -> Any:
        if self._begun is None:
            options: dict[str, Any] = {}
            if self._kind.requires_logging_directory:
                options["logging_dir"] = self._directory
            if self._kind.name == "tensorboard":
                # What a run that was killed said of steps that are now taken again does not count.
                options["purge_step"] = step
            self._begun = self._kind(self._run, **options)
            self._begun.start()
        return self._begun
