"""What files call the tensors of a text encoder, which is not always what its module calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["stored_names", "superfluous"]

# transformers dropped this prefix from the bare CLIP text model; published files have it.
_FORMER_PREFIXES = ("text_model.",)


def stored_names(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """By the module's name of a tensor, the names that files may have for it.

    A tied tensor is stored once, under any of its names.
    """
    tied: dict[str, Any] = getattr(module, "all_tied_weights_keys", None) or {}
    same: dict[str, list[str]] = {}
    for name, source in tied.items():
        same.setdefault(name, []).append(source)
        same.setdefault(source, []).append(name)
    found = {}
    for name in module.state_dict():
        alike = [name, *same.get(name, ())]
        found[name] = (*alike, *(prefix + other for prefix in _FORMER_PREFIXES for other in alike))
    return found


def superfluous(name: str) -> bool:
    """Whether a file may hold a tensor of this name that no module has a place for: a table of 0, 1, 2..."""
    return name.endswith("embeddings.position_ids")
