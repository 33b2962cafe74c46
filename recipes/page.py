"""The recipes that come along, what they take, and the fields they have, as Markdown."""

from __future__ import annotations

from profiles.typed import field_docs
from recipes.estimate import GPUS, Estimate, estimate
from recipes.schema import Recipe, available_recipes, load_recipe

__all__ = ["HEADINGS", "cells", "recipes_markdown"]

HEADINGS = (
    *("recipe", "settings", "removes", "parameters, 10^9", "GiB", "sharded", "a state more"),
    *(f"{gpu.upper()}-hours" for gpu in GPUS),
)


def recipes_markdown() -> str:
    """Return a table of the recipes that come along, and what each field of a recipe means."""
    names = available_recipes()
    rows = [HEADINGS, ("---",) * len(HEADINGS)]
    for recipe in map(load_recipe, names):
        name, *rest = cells(recipe, estimate(recipe))
        rows.append((f"`{name}`", *rest))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    fields = "\n".join(f"- `{name}`: {doc}" for name, doc in field_docs(Recipe).items())
    return f"{table}\n\n{fields}\n"


def cells(recipe: Recipe, found: Estimate) -> tuple[str, ...]:
    """A recipe's row under `HEADINGS`."""
    size = found.plan.reached.parameters
    memory = (found.memory["shared"].total, found.sharded_bytes, found.state_bytes)
    hours = found.hours(found.analysis_flops + found.teaching_flops)
    return (
        recipe.name,
        recipe.description,
        f"{'about ' if recipe.remove is None else ''}{found.plan.ratio_reached:.1%}",
        f"{size / 1e9:.2f}",
        *(f"{held / 2**30:.1f}" for held in memory),
        *(f"{hours[gpu]:,.0f}" for gpu in GPUS),
    )
