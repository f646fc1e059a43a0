"""A page of the documentation site for each module: what it opens with, then every public name.

Signatures and tables are read by smalldocs.
"""
import os
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import ModuleType

from smalldocs import api

API = "reference/api"  # the folder of the module pages, in the site


def short(module: str) -> str:
    "The name of a module's page: its last part, which no two modules share."
    return module.rpartition(".")[2]


def opening(module: ModuleType) -> str:
    "The comment that opens a module, as paragraphs."
    text = Path(module.__file__).read_text(encoding="utf-8").partition("__all__")[2]
    found = re.search(r"^# %% .*\n((?:#.*\n)+)", text, re.M)
    return "\n".join(line.removeprefix("#").strip() for line in found[1].splitlines()) if found else ""


def slim(table: str) -> str:
    "A Markdown table without columns that say nothing; nothing at all where it would only repeat the signature."
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.strip().splitlines()]
    head, body = rows[0], rows[2:]
    said = [any(r[i].strip() not in ("", "required") for r in body) for i in range(len(head))]
    names = [h.strip() for h in head]
    if "Description" in names and not said[names.index("Description")]: return ""
    kept = [i for i, yes in enumerate(said) if yes]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("|" + "|".join(f" {r[i].strip()} " for i in kept) + "|" for r in lines) + "\n"


def plain_starts(text: str) -> str:
    "Text in which no line begins like the definition of a link, as `[tokens, columns]: a copy` does."
    return re.sub(r"^(\[[^\]\n]*)\]:", r"\1\\]:", text, flags=re.M)


def properties(cls: type, module: ModuleType) -> str:
    "A table of a class's properties."
    rows = [[f"`{n}`", api.type_text(p.fget.__annotations__.get("return", ""), module), api.summary(p)]
            for n, p in vars(cls).items() if isinstance(p, property) and not n.startswith("_")]
    return api.table(rows, ["Property", "Type", "Description"]) if rows else ""


def with_properties(text: str, cls: type, table: str) -> str:
    "The page with a class's properties after what it says of the class itself."
    start = text.index(f"## class {cls.__name__} ")
    following = re.compile(r"^##", re.M).search(text, start + 3)
    end = following.start() if following else len(text)
    return f"{text[:end].rstrip()}\n\n{table}\n\n{text[end:]}"


def module_page(
    settings: api.Settings,
    module: ModuleType,            # imported
    symbols: list[api.Symbol],     # its inventory
    built_in: tuple[str, Path],    # title and path of its notebook
) -> str:
    "One module's page: where it is built, why it is as it is, its constants, its functions and classes."
    text = api.page(settings, module, symbols)
    name, own = module.__name__, {s.name for s in symbols}
    title, notebook = built_in
    intro = f"Built step by step in [{title}]({os.path.relpath(notebook, API)}).\n\n{opening(module)}"
    constants = [n for n in getattr(module, "__all__", []) if n not in own]
    if constants: intro += "\n\nConstants: " + ", ".join(f"`{n}`" for n in constants) + "."
    head = re.compile(r"^title: .*\ndescription: .*\n---\n", re.M)
    text = head.sub(lambda _: f'title: "{name}"\n---\n\n{intro.strip()}\n', text, count=1)
    for cls in (o for o in api.own(module) if isinstance(o, type)):
        if is_dataclass(cls) and all(f.default is not MISSING for f in fields(cls)):
            text = text.replace(repr(cls()), f"{cls.__name__}()")
        if table := properties(cls, module): text = with_properties(text, cls, table)
    text = re.sub(r"(?:^\|.*\n)+", lambda m: slim(m[0]), text, flags=re.M)
    return plain_starts(re.sub(r"\n{3,}", "\n\n", text)).rstrip() + "\n"
