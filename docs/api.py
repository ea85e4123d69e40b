"""The API reference as HTML, from the docstrings of what is public: `make docs` writes build/api and checks every link.

A page each for `fourbit` and its namespaces, with what their `__all__` names: a public name cannot lack its place.
Links: those inside the reference, and those of the repository's Markdown to files and headings.
"""

import dataclasses
import html.parser
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import get_type_hints
from urllib.parse import unquote

import pdoc.doc
import pdoc.render

import fourbit
from fourbit.settings import Checked, forms

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "api"
LINK = re.compile(r"\]\(((?!https?:)[^)\s]+)\)")


def main() -> int:
    """Write the pages and check all links; 1 where one leads nowhere."""
    namespaces = [fourbit, *(value for value in public(fourbit).values() if isinstance(value, ModuleType))]
    for value in public(fourbit).values():
        if isinstance(value, type) and issubclass(value, Checked):
            value.__doc__ = f"{value.__doc__}\n\n{options(value)}"
    pdoc.render.configure(docformat="markdown", show_source=False, search=False)
    pages = {space.__name__: pdoc.doc.Module(space) for space in namespaces}
    for name, page in pages.items():
        file = OUT / f"{name.replace('.', '/')}.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(without_guesses(pdoc.render.html_module(page, pages)))
    broken = [*broken_pages(OUT), *broken_markdown()]
    print("\n".join(broken) or f"{len(list(OUT.rglob('*.html')))} pages in {OUT}, all links lead somewhere")
    return bool(broken)


def public(space: ModuleType) -> dict[str, object]:
    """What a namespace lists, by name."""
    return {name: getattr(space, name) for name in space.__all__}


def options(settings: type[Checked]) -> str:
    """The fields of settings as a table: name, what may stand there, the default, the sentence of --help."""
    types = get_type_hints(settings)
    rows = ["| option | value | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(settings):
        made = field.default_factory() if callable(field.default_factory) else field.default
        default = "required" if made is dataclasses.MISSING else f"`{made!r}`"
        kinds = " or ".join(kind for kind in forms(types[field.name]) if kind != "null")
        help = field.metadata.get("help", "").replace("|", "\\|")
        rows.append(f"| `{field.name}` | {kinds} | {default} | {help} |")
    return "\n".join(rows)


def without_guesses(text: str) -> str:
    """A page less links that pdoc guessed from a word in backticks: an inherited attribute has no entry of its own."""
    ids = Page(text).ids
    return re.sub(r'<a href="#([\w.]+)">(.*?)</a>', lambda found: found[0 if found[1] in ids else 2], text)


class Page(html.parser.HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.ids = list[str](), set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id":
                self.ids.add(value or "")
            elif name == "href":
                self.links.append(unquote(value or ""))


def broken_pages(folder: Path) -> Iterator[str]:
    """Links of the reference that lead to no page or heading of it."""
    pages = {path.resolve(): Page(path.read_text()) for path in folder.rglob("*.html")}
    for path, page in pages.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if "://" in target or target.startswith("data:"):
                continue
            found = pages.get((path.parent / target).resolve() if target else path)
            if found is None or (anchor and anchor not in found.ids):
                yield f"{path.relative_to(ROOT)}: {link} leads nowhere"


def broken_markdown() -> Iterator[str]:
    """Links of our Markdown, as they hold in the repository: to a file, and to a heading in it."""
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for link in LINK.findall(path.read_text()):
            target, _, anchor = link.partition("#")
            file = (path.parent / target) if target else path
            if not file.exists() or (anchor and anchor not in headings(file)):
                yield f"{path.relative_to(ROOT)}: {link} leads nowhere"


def headings(file: Path) -> set[str]:
    """The anchors that a Markdown page gets from its headings."""
    found = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in found}


if __name__ == "__main__":
    sys.exit(main())
