"""The errors of the deploy stage. Each says what was wrong, what was there, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DeployError(ValueError):
    """A bundle, a device or a request that cannot be run as asked."""


class BundleError(DeployError):
    """A bundle directory that is not what its manifest says, or a manifest that is not one of ours."""


class Cancelled(DeployError):
    """The caller wanted the picture no longer."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import what an optional extra of the distribution installs.

    Raises:
        DeployError: A module is not there; the message says how to install the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise DeployError(
            f"This needs {error.name}, which is not installed. Install it with: pip install 'hptool[{name}]'"
        ) from error
