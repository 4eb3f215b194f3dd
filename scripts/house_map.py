"""Write the maps of the house from the docstrings of its folders and modules.

The table of folders goes into CONTRIBUTING.md, the one of all modules into docs/map.md.

python scripts/house_map.py          # write them
python scripts/house_map.py --check  # fail if they are not what this would write
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("offload", "specexec", "cli")
CONTRIBUTING, MAP = ROOT / "CONTRIBUTING.md", ROOT / "docs" / "map.md"
BEGIN, END = "<!-- map: scripts/house_map.py -->\n", "<!-- end of map -->\n"
OPENING = """# Every module of the house

Made by `python scripts/house_map.py` from the first lines of docstrings; a test keeps it true. The folders alone, and
which of them may import which, are in [CONTRIBUTING](../CONTRIBUTING.md).
"""


def folders(package: str) -> list[Path]:
    """The folders of a package that hold modules, the package first."""
    return sorted({file.parent for file in (ROOT / package).rglob("*.py")})


def modules(folder: Path) -> list[Path]:
    """The modules directly in a folder, without its __init__.py."""
    return sorted(set(folder.glob("*.py")) - {folder / "__init__.py"})


def promise(file: Path) -> str:
    """What a module's docstring says first, without its dimension letters, as one cell of a table."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].partition("   ")[0].split()).replace("|", "\\|")


def folder_table() -> str:
    """A row for each folder: its name, what it is, how many modules it holds."""
    rows = [
        f"| {'**' if folder.name in PACKAGES else ''}[`{folder.relative_to(ROOT)}`]({_anchor(folder)})"
        f"{'**' if folder.name in PACKAGES else ''} | {promise(folder / '__init__.py')} | {len(modules(folder))} |\n"
        for package in PACKAGES
        for folder in folders(package)
    ]
    return "| folder | what it is, and what it does not know | modules |\n|---|---|---:|\n" + "".join(rows)


def _anchor(folder: Path) -> str:
    return "docs/map.md#" + str(folder.relative_to(ROOT)).replace("/", "")


def map_page() -> str:
    """docs/map.md."""
    return OPENING + "".join(_sections())


def _sections() -> Iterator[str]:
    for package in PACKAGES:
        for folder in folders(package):
            name = folder.relative_to(ROOT)
            yield f"\n## {name}\n\n{promise(folder / '__init__.py')}\n\n| module | what it is |\n|---|---|\n"
            for file in modules(folder):
                yield f"| [`{file.name}`](../{file.relative_to(ROOT)}) | {promise(file)} |\n"


def contributing() -> str:
    """CONTRIBUTING.md with the table of folders as it is now."""
    before, _, rest = CONTRIBUTING.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}{folder_table()}{END}{rest.partition(END)[2]}"


def main(arguments: list[str]) -> None:
    for page, text in ((CONTRIBUTING, contributing()), (MAP, map_page())):
        if "--check" not in arguments:
            page.write_text(text, encoding="utf-8")
        elif not page.exists() or page.read_text(encoding="utf-8") != text:
            sys.exit(f"{page.relative_to(ROOT)} is out of date: python scripts/house_map.py")


if __name__ == "__main__":
    main(sys.argv[1:])
