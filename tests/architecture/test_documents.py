"""The documents say what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from profiles.page import targets_markdown
from recipes.page import recipes_markdown

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]


def anchors(document: Path) -> set[str]:
    """The anchors a renderer gives a document's headings."""
    headings = re.findall(r"^#+\s+(.+?)\s*$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name) if name else document
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_make_targets_that_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        target
        for document in DOCUMENTS
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert named <= targets


def test_the_page_of_recipes_is_what_the_command_prints() -> None:
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    assert page.endswith(f"\n\n{recipes_markdown()}"), "hptool recipes --markdown prints its end anew"


def test_the_page_of_targets_is_what_the_command_prints() -> None:
    page = (ROOT / "docs/targets.md").read_text(encoding="utf-8")
    assert page.endswith(f"\n\n{targets_markdown()}"), "hptool targets --markdown prints its end anew"
