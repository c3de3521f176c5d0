"""Documentation and Makefile say what is true of the code: functions, messages, links."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.slow_cases import SLOW_CASES

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "train.py"] + [
    file
    for folder in ("titan_shampoo", "parallel", "checkpoint")
    for file in sorted((ROOT / folder).rglob("*.py"))
]
REFERENCE = re.compile(r"`([\w/]+\.py): ([\w., ]+)`")
README = (ROOT / "README.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def references():
    return REFERENCE.findall((ROOT / "docs" / "algorithms.md").read_text())


def names_in(file):
    """Functions, classes and methods, as ``name`` and ``Class.name``."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            parts = (part for part in node.body if isinstance(part, ast.FunctionDef))
            names |= {f"{node.name}.{part.name}" for part in parts}
    return names


@pytest.mark.parametrize(("path", "functions"), sorted(set(references())))
def test_a_function_beside_an_equation_exists(path, functions):
    assert set(functions.split(", ")) <= names_in(ROOT / "titan_shampoo" / path)


def test_every_module_of_mathematics_has_its_equations():
    named = {path for path, _ in references()}
    # Storage and threads, no equation.
    without = {f"functional/{name}.py" for name in ("__init__", "symmetric", "side_by_side")}
    modules = {f"functional/{file.name}" for file in (ROOT / "titan_shampoo/functional").iterdir()}
    assert {path for path in modules if path.endswith(".py")} - without <= named


def texts():
    """Every piece of text in the sources, between the values that are filled in."""
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def quoted():
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    return [(row, part) for row in rows for part in row.split("...")]


def test_every_quoted_message_is_one_of_ours():
    said = "\n".join(texts())
    missing = [(row, part) for row, part in quoted() if part.strip() not in said]
    assert len(quoted()) > 20
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_mistake_that_the_readme_shows_is_that_of_its_line():
    (shown,) = re.findall(r"^(configs/\S+):(\d+): (\S+): unknown key", README, re.MULTILINE)
    file, line, _ = shown
    key = (ROOT / file).read_text().splitlines()[int(line) - 1]
    assert key.startswith("block_size = "), key


def headings(page):
    """What the headings of a page are called in links."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    names = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in names}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_to_headings_lead_to_one(page):
    for target, heading in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        assert heading in headings(page.parent / target if target else page), (target, heading)


def test_what_make_quick_runs_exists():
    listed = re.search(r"^QUICK = \\\n((?:.*\\\n)*.*\n)", (ROOT / "Makefile").read_text(), re.M)
    assert listed
    targets = listed[1].replace("\\", " ").split()
    assert targets
    for target in targets:
        file, _, test = target.partition("::")
        assert not test or test in names_in(ROOT / file), target
        assert (ROOT / file).is_file(), target


@pytest.mark.parametrize("pattern", SLOW_CASES)
def test_slow_cases_are_of_tests_that_exist(pattern: str) -> None:
    file, _, rest = pattern.replace(r"\.py", ".py").partition("::")
    beginning = re.split(r"\.\*|\\\[", rest)[0]
    names = re.findall(r"def (test_\w+)", (ROOT / "tests" / file).read_text())
    assert any(re.match(beginning, name) for name in names)
