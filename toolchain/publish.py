"""A student as others find it on the hub: its files, and a model card made from what it says of itself."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from toolchain.artifacts import read_json
from toolchain.card import licence_files, read_card
from toolchain.compress import REPORT_FILE
from toolchain.errors import ToolchainError
from toolchain.families.view import FILES, Model, open_model
from toolchain.picture import draw_plan
from toolchain.plan import PLAN_FILE, CompressionPlan, plan_from_json

__all__ = ["student_files"]

_CARD, _PICTURE = "README.md", "plan.png"


def student_files(directory: Path, repository: str) -> dict[str, Path | bytes]:
    """What of a student is published, by name: what opens it, its card, and the plan as a picture.

    Text that stands in its card already is kept in place of ours.

    Args:
        directory: The student's.
        repository: Where it is to be, as owner/name.

    Raises:
        ToolchainError: It is no student that opens.
    """
    if missing := [name for name in (PLAN_FILE, REPORT_FILE, _CARD) if not (directory / name).is_file()]:
        raise ToolchainError(
            f"{directory} is no student that `hptool compress` wrote: it lacks {', '.join(missing)}"
        )
    model = open_model(str(directory), precision="none")
    plan = plan_from_json(read_json(directory / PLAN_FILE))
    files: dict[str, Path | bytes] = {
        path.relative_to(directory).as_posix(): path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and any(fnmatch(path.relative_to(directory).as_posix(), name) for name in FILES)
    }
    with tempfile.TemporaryDirectory() as scratch:
        drawn = Path(scratch) / _PICTURE
        draw_plan(plan, drawn)
        files[_PICTURE] = drawn.read_bytes()
    card = ModelCard.load(directory / _CARD, ignore_metadata_errors=False)
    if not card.text.strip():
        report = read_json(directory / REPORT_FILE)
        card.text = _text(model, plan, report, card.data.to_dict(), repository)
    files[_CARD] = str(card).encode()
    return files


def _text(
    model: Model, plan: CompressionPlan, report: dict[str, Any], metadata: dict[str, Any], repository: str
) -> str:
    try:
        stages, recipe, adapters = report["stages"], report["recipe"], report["adapters"]
        rows = "\n".join(map(_row, stages))
        taught = (
            f"Taught for {recipe['steps']:,} steps of {recipe['batch_size']} states, at a learning rate of "
            f"up to {recipe['learning_rate']:g}."
            if recipe["steps"]
            else "Not taught after parts were removed."
        )
    except (KeyError, TypeError) as error:
        raise ToolchainError(
            f"{model.path / REPORT_FILE} does not say {error}; it was written by another version of hptool"
        ) from error
    base = metadata.get("base_model")
    # A directory of this machine says nothing to others but its name.
    named = f"[{base}](https://huggingface.co/{base})" if base else Path(plan.model).name
    name = repository.partition("/")[2]
    licence = ", ".join(f"[{path.name}]({path.name})" for path in licence_files(model.path))
    terms = read_card(model.path).license
    baked = f" with the adapters {', '.join(adapters)} baked in" if adapters else ""
    return f"""
# {name}

{named}{baked}, made smaller: {plan.ratio_reached:.1%} of the transformer's parameters and
{plan.flops_ratio_reached:.1%} of its FLOPs are gone. {taught}

![What was removed of each block, and how strongly the rest was trained]({_PICTURE})

| | parameters | transformer, MB | velocity error | ShapesEval |
|---|---|---|---|---|
{rows}

Velocity error: mean relative squared error against the original, on states neither planned nor trained on.
Removed, by the rule `{plan.rule}`: `{report["removed"]}`. [{PLAN_FILE}]({PLAN_FILE}) is the decision,
[{REPORT_FILE}]({REPORT_FILE}) holds all settings.

## How to use it

{_usage(model, plan, repository)}
## Terms

{terms or "None are stated."}{f", see {licence}" if licence else ""}
"""


def _row(stage: dict[str, Any]) -> str:
    score = stage["score"]
    cells = (
        stage["name"],
        f"{stage['num_parameters']:,}",
        f"{stage['transformer_bytes'] / 1e6:,.0f}",
        f"{stage['velocity_error']:.4f}",
        "-" if score is None else f"{score['mean']:.3f} ± {score['standard_error']:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def _usage(model: Model, plan: CompressionPlan, repository: str) -> str:
    if plan.removed_components:
        opened = "from toolchain.families import open_model  # pip install hptool[compress]\n\n"
        opened += f'pipeline = open_model("{repository}").pipeline'
        note = "Blocks lost components, which diffusers cannot leave out: hptool opens it."
    else:
        kind = type(model.pipeline).__name__
        opened = f'from diffusers import {kind}\n\npipeline = {kind}.from_pretrained("{repository}")'
        note = "Only whole blocks are gone: it is a plain diffusers pipeline."
    settings = "".join(f"    {name}={value!r},\n" for name, value in asdict(model.defaults).items())
    return f"""{note}

```python
{opened}
pipeline(
    "what to paint",
{settings}).images[0].save("out.png")
```

On a device, in 4 bits and without PyTorch:

    hptool export {repository} --target rtx4090
"""
