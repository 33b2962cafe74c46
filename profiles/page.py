"""The profiles that come along and the fields they have, as Markdown."""

from __future__ import annotations

from profiles.schema import Profile, available_profiles, load_profile
from profiles.typed import field_docs

__all__ = ["targets_markdown"]

_HEADINGS = ("target", "device", "GiB", "GB/s", "TFLOPS", "runtimes, best first", "compute capability")


def targets_markdown() -> str:
    """Return a table of the profiles that come along, and what each field of a profile means."""
    profiles = [load_profile(name) for name in available_profiles()]
    rows = [_HEADINGS, ("---",) * len(_HEADINGS), *map(_cells, profiles)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    fields = "\n".join(f"- `{name}`: {doc}" for name, doc in field_docs(Profile).items())
    return f"{table}\n\n{fields}\n"


def _cells(profile: Profile) -> tuple[str, ...]:
    numbers = (profile.memory_gib, profile.bandwidth_gb_s, profile.peak_tflops)
    return (
        f"`{profile.name}`",
        profile.description,
        *(f"{number:g}" for number in numbers),
        ", ".join(profile.runtimes),
        profile.compute_capability or "-",
    )
