"""Pages made from the code are up to date, and what the README names is there."""

import re
from pathlib import Path

import pytest

from benchmarks.tables import METHODS_PAGE, methods_page, with_tables
from docs.generate import pages

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["recipe.md", "cli.md", "methods.md", "scaling.md"])
def test_a_generated_page_is_what_the_code_says(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == pages()[name], "run `make docs`"


def test_the_figures_in_the_readme_are_those_of_the_results() -> None:
    assert with_tables(README) == README, "run `make bench-tables`"
    assert (METHODS_PAGE.read_text() if METHODS_PAGE.exists() else "") == methods_page(), "run `make bench-tables`"


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")]), ids=str)
def test_every_local_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), f"{page}: {target}"


def test_every_make_target_that_the_readme_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z][a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
