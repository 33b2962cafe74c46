"""Everything that runs on a device: bundle reader, sessions, sampler, pipeline. No torch in here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy.bundle import open_bundle
    from deploy.pipeline import EdgePipeline

__all__ = ["EdgePipeline", "open_bundle"]


def __getattr__(name: str) -> Any:
    # Reading a bundle needs the standard library only, so the runtimes come in with the name that uses them.
    if name == "EdgePipeline":
        from deploy.pipeline import EdgePipeline

        return EdgePipeline
    if name == "open_bundle":
        from deploy.bundle import open_bundle

        return open_bundle
    raise AttributeError(f"module 'deploy' has no attribute {name!r}")
