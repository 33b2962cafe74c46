"""What `hptool compress --recipe` does, read strictly from `recipes/<name>.toml`."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from profiles.typed import from_data
from toolchain.errors import ToolchainError
from toolchain.gate import parse_gate
from toolchain.geometry import Semantics
from toolchain.plan import RuleName, StrengthMode

__all__ = ["Recipe", "available_recipes", "load_recipe"]

_ABOUT = ("name", "description", "assumes", "sources")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Options of `hptool compress` for one model, by their names; the command's own hold for the rest."""

    name: str
    """Name of the file without `.toml`."""
    description: str
    """Whose settings these are, in a few words."""
    model: str
    """A hub id, or a directory of a diffusers pipeline."""
    rule: RuleName
    """How to choose what goes, where `remove` does not say it."""
    ratio: float | None = None
    """Share of the transformer's parameters to remove; this or `remove`."""
    remove: str | None = None
    """What goes, as in 25-28,31-34,13.ff."""
    assumes: str | None = None
    """With `ratio`, what memory and time are computed for: what will go is not known before the analysis.
    Written as `remove` is."""
    semantics: Semantics
    """What a removed part leaves: nothing, or its input passed on."""
    strengths: StrengthMode
    """How strongly the parts that stay are trained."""
    num_prompts: int = 16
    """Prompts to measure harm on."""
    steps: int
    """Of distillation."""
    batch_size: int
    """States in a step, over all processes."""
    learning_rate: float
    """At its peak."""
    features: float
    """Weight of the blocks' outputs in the loss; the velocity's is 1."""
    checkpointing: bool
    """Whether activations are computed again for the gradient, to hold fewer of them."""
    precision: Literal["float32", "stored"]
    """What the model is held in; weights that learn are float32 in any case."""
    cache_prefix: bool = False
    """Whether the outputs of the frozen beginning are kept on disk."""
    turn: int | None = None
    """Steps after which teacher and student take turns in memory; left out, both stay."""
    ema: float | None = None
    """Decay of the averaged weights the student is made of; left out, it is made of the last ones."""
    gate: str | None = None
    """What the student has to be worth, as in velocity<=0.02."""
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    """Where a setting is from, or why it is so, by the name of its field."""

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.remove is None):
            raise ToolchainError("give one of ratio and remove")
        if (self.ratio is None) != (self.assumes is None):
            raise ToolchainError(
                "assumes goes with ratio and with nothing else: it says what memory and time are computed for"
            )
        for field in ("num_prompts", "steps", "batch_size", "learning_rate", "turn"):
            value = getattr(self, field)
            # Infinity and NaN are numbers in TOML.
            if value is not None and not 0 < value < float("inf"):
                raise ToolchainError(f"{field} must be a number above zero, not {value}")
        if not 0 <= self.features < float("inf"):
            raise ToolchainError(f"features must be a number from zero up, not {self.features}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ToolchainError(f"ema must be a number between zero and one, not {self.ema}")
        if self.gate is not None:
            parse_gate(self.gate)
        if unknown := sorted(self.sources.keys() - {field.name for field in dataclasses.fields(self)}):
            raise ToolchainError(f"sources names {', '.join(unknown)}, which a recipe does not have")

    @property
    def options(self) -> dict[str, Any]:
        """What `hptool compress` is told, by the names of its options."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name not in _ABOUT and value is not None}


def available_recipes() -> list[str]:
    """The names of the recipes that come with the package, sorted."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files(__package__).iterdir()
        if entry.name.endswith(".toml")
    )


def load_recipe(name_or_path: str) -> Recipe:
    """Read a recipe that comes with the package, or any file whose name ends in `.toml`.

    Raises:
        ToolchainError: There is no such recipe, or it does not say what a recipe has to say.
    """
    file: Traversable = Path(name_or_path)
    if not name_or_path.endswith(".toml"):
        if name_or_path not in available_recipes():
            raise ToolchainError(
                f"there is no recipe {name_or_path!r}; there are {', '.join(available_recipes())}, and any "
                ".toml file of your own"
            )
        file = resources.files(__package__).joinpath(f"{name_or_path}.toml")
    try:
        recipe = from_data(Recipe, tomllib.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise ToolchainError(f"the recipe {name_or_path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of the text, of TOML, of its types, or of what a recipe has to be
        raise ToolchainError(f"the recipe {name_or_path} cannot be used: {error}") from error
    if f"{recipe.name}.toml" != file.name:
        raise ToolchainError(
            f"the recipe {name_or_path} is named {recipe.name!r} inside; make the two names the same"
        )
    return recipe
