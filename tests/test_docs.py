"""Every Python example in the docs and the README runs, and prints what stands below it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from twinfer.oracle.check import ops_table

ROOT = Path(__file__).parent.parent
EXAMPLES = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<output>.*?)```)?", re.DOTALL)


def examples() -> list[tuple[str, str, str | None]]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [
        (f"{page.name}-{number}", match["code"], match["output"])
        for page in pages
        for number, match in enumerate(EXAMPLES.finditer(page.read_text()))
    ]


@pytest.mark.parametrize(("code", "output"), [pytest.param(*rest, id=name) for name, *rest in examples()])
def test_example_prints_what_the_page_says(code: str, output: str | None, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    if output is not None:
        assert done.stdout == output


def test_the_page_on_families_shows_the_declaration_and_counts_its_lines() -> None:
    page = (ROOT / "docs" / "adding-a-family.md").read_text()
    declaration = (ROOT / "checkpoint" / "families" / "starcoder2.py").read_text()
    _, code = declaration.split('"""\n\n', maxsplit=1)
    for here, there in (("from ..", "from twinfer.checkpoint."), ("_read", "read_starcoder2")):
        code = code.replace(here, there)
    assert f"```python\n{code}```" in page
    assert f"which took {len(declaration.splitlines())} lines" in page


def test_the_table_of_ops_is_the_table_of_ops() -> None:
    page = (ROOT / "docs" / "equal.md").read_text().splitlines()
    rows = [f"| {row.name} | {row.axes} | {row.guarantee} | {row.paper} |" for row in ops_table()]
    first = page.index("| op | axes | guarantee | paper |") + 2
    assert page[first:] == rows


def test_pages_that_are_linked_to_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^):#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
