"""The generated pages are those of the code, and their links lead somewhere."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.catalog.methods import METHODS, SEARCHES

ROOT = Path(__file__).resolve().parents[2]
TEACHING = {
    "diffusion",
    "controlnet",
    "edm",
    "autoencoder",
    "text_encoder",
}  # of train-teacher, and the rival of nct
PAGES = ("configs", "distill/methods", "distill/data", "distill/reports", "pipelines")
OFFLINE = ("emoji/lcd", "sd15/lcd_lora", "fashion/ict")


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pages", ROOT / "scripts" / "pages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_fresh(pages: ModuleType) -> None:
    stale = [str(path) for path, text in pages.pages().items() if path.read_text() != text]
    assert not stale, "run python scripts/pages.py"


def test_every_recipe_of_a_run_has_its_memory(pages: ModuleType) -> None:
    known = pages.memory_of_page(pages.RECIPES.read_text())
    assert known.keys() == pages.recipes().keys()
    runs = {r for r, tree in pages.recipes().items() if "method" in tree and not pages.is_search(tree)}
    assert {r for r, text in known.items() if text} == runs


@pytest.mark.slow
def test_the_memory_is_what_a_dry_run_prints(pages: ModuleType) -> None:
    known = pages.memory_of_page(pages.RECIPES.read_text())
    found = {recipe: pages.memory_of(load_config(pages.recipes()[recipe])) for recipe in OFFLINE}
    assert found == {recipe: known[recipe] for recipe in OFFLINE}


def test_a_page_without_its_comments_is_refused(pages: ModuleType) -> None:
    assert (
        pages.filled("a\n<!-- x -->\nold\n<!-- end -->\nb", "x", "new")
        == "a\n<!-- x -->\nnew\n<!-- end -->\nb"
    )
    with pytest.raises(ValueError, match="no comments <!-- y -->"):
        pages.filled("a\n<!-- x -->\nold\n<!-- end -->\nb", "y", "new")


def test_every_method_is_described_and_has_a_section(pages: ModuleType) -> None:
    assert set(pages.DESCRIBED) == (METHODS.keys() | SEARCHES.keys()) - TEACHING
    text = pages.METHOD_PAGE.read_text()
    for name in pages.DESCRIBED:
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        heads = ("Idea", "Needs", "Switches", "Differences from the paper", "Results")
        assert [h for h in heads if f"**{h}" not in section] == [], name


@pytest.mark.parametrize("folder", PAGES)
def test_links_lead_to_files_and_headings(folder: str) -> None:
    page = ROOT / folder / "README.md"
    for target in re.findall(r"\]\((?!http)([^)]*)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in headings(file), target


def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_page_of_exports_names_every_file_that_travels() -> None:
    text = (ROOT / "pipelines" / "README.md").read_text()
    travelling = {p.name for p in (ROOT / "pipelines").glob("*.py")} - {"__init__.py"}
    assert {name for name in travelling if f"`{name}`" not in text} == set()
