"""The README's tables of settings, made from the code: `python -m tests.deploy.settings_reference` rewrites them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from deploy.settings import UpSettings
from engine.settings import EngineSettings
from gateway.settings import GatewaySettings
from replay.settings import ReplaySettings

README = Path(__file__).parents[2] / "README.md"
START, END = "### [up]\n", "## Troubleshooting\n"
SECTIONS: tuple[tuple[str, type[msgspec.Struct], str], ...] = (
    ("up", UpSettings, "`tidegate up`."),
    ("gateway", GatewaySettings, "`tidegate gateway`."),
    ("engine", EngineSettings, "`tidegate engine`; `profile` chooses a ready-made set out of `engine/profiles`."),
    ("replay", ReplaySettings, "`tidegate replay run`."),
)


def reference() -> str:
    tables = (
        f"### [{name}]\n\n{text}\n\n| key | default | |\n|---|---|---|\n{table(kind)}" for name, kind, text in SECTIONS
    )
    return "\n".join(tables) + "\n"


def table(kind: type[msgspec.Struct]) -> str:
    return "".join(f"| `{key}` | {default} | {text} |\n" for key, default, text in rows(kind))


def rows(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    texts = field_docstrings(kind)
    for field in msgspec.structs.fields(kind):
        default = field.default_factory() if callable(field.default_factory) else field.default
        if isinstance(default, msgspec.Struct):
            yield from rows(type(default), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, as_toml(default), texts.get(field.name, "")


def field_docstrings(kind: type[msgspec.Struct]) -> dict[str, str]:
    """The strings that follow fields in a class's source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for before, node in zip(definition.body, definition.body[1:], strict=False):
        match before, node:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found


def as_toml(value: Any) -> str:
    return "" if value is None else f"`{msgspec.json.encode(value).decode()}`"


def updated(readme: str) -> str:
    head, _, rest = readme.partition(START)
    return f"{head}{reference()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
