"""How published models are compressed, and what it takes: recipes."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from profiles.typed import field_docs
from toolchain.cli.shell import Json, app, emit, print_
from toolchain.errors import ToolchainError

if TYPE_CHECKING:
    from recipes.estimate import Estimate
    from recipes.schema import Recipe

recipes_app = typer.Typer(no_args_is_help=False, rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes")


@recipes_app.callback(invoke_without_command=True)
def recipes(
    context: typer.Context,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print them as docs/recipes.md has them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the recipes for published models, with the memory and the time they take."""
    from recipes.estimate import estimate
    from recipes.page import HEADINGS, cells, recipes_markdown
    from recipes.schema import available_recipes, load_recipe

    if context.invoked_subcommand is not None:
        if as_markdown or as_json:
            raise ToolchainError(
                "options of `hptool recipes show` come after its name, as in show NAME --json"
            )
        return
    if as_markdown and as_json:
        raise ToolchainError("--json and --markdown are two forms of one list; choose one")
    if as_markdown:
        sys.stdout.write(recipes_markdown())
        return
    found = [(recipe, estimate(recipe)) for recipe in map(load_recipe, available_recipes())]
    data = {"recipes": [asdict(recipe) | {"takes": item.as_data} for recipe, item in found]}

    def show() -> None:
        numbers = (Column(text, justify="right") for text in HEADINGS[2:])
        table = Table(*HEADINGS[:2], *numbers, title="hptool compress --recipe RECIPE", box=None)
        for recipe, item in found:
            table.add_row(*cells(recipe, item))
        print_(table)

    emit(data, as_json, show)


@recipes_app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="Name of a recipe, or path of a .toml file of your own.")],
    as_json: Json = False,
) -> None:
    """Show what a recipe says and why, and what following it takes."""
    from recipes.estimate import estimate
    from recipes.schema import load_recipe

    recipe = load_recipe(name)
    found = estimate(recipe)
    data = asdict(recipe) | {"takes": found.as_data}
    emit(data, as_json, lambda: _show(recipe, found))


def _show(recipe: Recipe, found: Estimate) -> None:
    from recipes.estimate import SHARDS, UTILISATION

    said = Table.grid(padding=(0, 2))
    for field in field_docs(type(recipe)):
        value = getattr(recipe, field)
        if field == "sources" or value is None:
            continue
        source = f"\nFrom: {recipe.sources[field]}" if field in recipe.sources else ""
        # As text, so that brackets in a recipe are no markup.
        said.add_row(
            field, Text.assemble(f"{value:g}" if isinstance(value, float) else str(value), (source, "dim"))
        )
    print_(said)
    sizes, plan = found.plan.sizes, found.plan
    print_(
        f"\n{sizes['before']['parameters']:,} parameters become {sizes['after']['parameters']:,}: "
        f"{plan.ratio_reached:.1%} go, and {plan.flops_ratio_reached:.1%} of the FLOPs. The first "
        f"{plan.shared_prefix} blocks are the teacher's for good.\n"
    )
    parts = list(asdict(found.memory["shared"]))
    table = Table(
        "GiB on the device, one state",
        *(Column(mode, justify="right") for mode in found.memory),
    )
    for part in (*parts, "total"):
        values = (getattr(item, part) / 2**30 for item in found.memory.values())
        table.add_row(part.replace("_", " "), *(f"{value:.1f}" for value in values))
    print_(table)
    print_(
        f"Each further state adds {decimal(found.state_bytes)}. Sharded over {SHARDS} devices, each holds "
        f"{decimal(found.sharded_bytes)}.\n"
    )
    for what, flops in (
        ("analysis", found.analysis_flops),
        ("teaching", found.teaching_flops),
        ("teaching, were the two models apart", found.two_model_flops),
    ):
        hours = ", ".join(f"{value:,.0f} of {gpu.upper()}" for gpu, value in found.hours(flops).items())
        print_(f"GPU-hours, {what}: {hours}")
    print_(f"Estimated from FLOPs at {UTILISATION:.0%} of the GPU's peak; measured on none.")
