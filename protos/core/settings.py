"""Settings: one frozen Struct per process, from TOML, environment and flags in that order; the last one wins.

`[gateway] port` of the file, `TIDEGATE__GATEWAY__PORT` of the environment and `--port` of the command line are one key.
(Two underscores: Kubernetes itself sets TIDEGATE_GATEWAY_PORT for a service called tidegate-gateway.) Arrays are
written in the environment as in the file.
"""

from __future__ import annotations

import builtins
import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import msgspec

from protos.core.errors import ConfigError

PREFIX = "TIDEGATE__"
SECTIONS = ("gateway", "engine", "replay", "up")

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
"""0 takes a free one."""
Positive = Annotated[int, msgspec.Meta(ge=1)]
OtlpEndpoint = Annotated[str, msgspec.Meta(pattern=r"^(https?://[^/\s]+:[0-9]+/?)?$")]
"""Such as http://127.0.0.1:4317."""

T = TypeVar("T", bound=msgspec.Struct)
Section = tuple[tuple[str, ...], type[msgspec.Struct], dict[str, Any]]
"""(name, type, keys)"""


def load(
    kind: type[T],
    section: str,
    *,
    file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, Any],
    spelled: Mapping[str, str] | None = None,
    profile: Path | None = None,
) -> T:
    """Parse the settings of one process.

    `profile` is a file of ready-made values that `file` may override. `flags` holds what the command line gave, with
    dots for nested keys ("capture.level"); None means "not given". `spelled` has those flags that are not called as
    their key. Raises ConfigError with the origin, the key and the allowed values.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source in (profile, file):
        if source is not None:
            _merge(values, _read_section(source, section), origins, str(source))
    for path, text in _from_environment(kind, section, environ).items():
        _assign(values, path, _array(text))
        origins[path] = f"environment variable {_variable(section, path)}"
    for path, value in flags.items():
        if value is not None:
            _assign(values, path, value)
            written = (spelled or {}).get(path, "--" + re.sub("[._]", "-", path))
            origins[path] = f"flag {written}"
    _check_keys(kind, values, (), origins, section)
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), section, origins)) from None


def read_file(file: Path) -> dict[str, Any]:
    """All sections of a settings file; raises ConfigError."""
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; pass an existing one with --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # not TOMLDecodeError alone: a number of 5,000 digits is another
        raise ConfigError(f"{file}: not valid TOML: {error}") from None
    for name in data:
        if name not in SECTIONS:
            raise ConfigError(f"{file}: unknown section [{name}]{_nearest(name, SECTIONS)}")
    return data


def _read_section(file: Path, section: str) -> dict[str, Any]:
    values = read_file(file).get(section, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: {section} must be a section, written [{section}]")
    return values


def _from_environment(kind: type[msgspec.Struct], section: str, environ: Mapping[str, str]) -> dict[str, str]:
    prefix = f"{PREFIX}{section.upper()}__"
    return {
        name[len(prefix) :].lower().replace("__", "."): text
        for name, text in environ.items()
        if name.startswith(prefix)
    }


def _array(text: str) -> Any:
    """What the text is in TOML if that is an array; else the text, which need not be TOML: "[::1]" is an address."""
    if not text.startswith("["):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _variable(section: str, path: str) -> str:
    return f"{PREFIX}{section.upper()}__{path.upper().replace('.', '__')}"


def _merge(
    values: dict[str, Any], given: Mapping[str, Any], origins: dict[str, str], origin: str, at: str = ""
) -> None:
    for key, value in given.items():
        origins[f"{at}{key}"] = origin
        if isinstance(value, dict):
            _merge(_nested(values, key), value, origins, origin, f"{at}{key}.")
        else:
            values[key] = value


def _assign(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, key = path.split(".")
    for parent in parents:
        values = _nested(values, parent)
    values[key] = value


def _nested(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The section under `key`; a plain value that an earlier source put there gives way to it."""
    if not isinstance(values.get(key), dict):
        values[key] = {}
    nested: dict[str, Any] = values[key]
    return nested


def _check_keys(
    kind: type[msgspec.Struct], values: Mapping[str, Any], at: tuple[str, ...], origins: Mapping[str, str], section: str
) -> None:
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for key, value in values.items():
        path = ".".join((*at, key))
        if key not in fields:
            header = ".".join((section, *at))
            origin = origins.get(_plain(path), "settings")
            raise ConfigError(f"{origin}: unknown key '{key}' in [{header}]{_nearest(key, fields)}")
        for name, nested, inner in _sections(fields[key].type, key, value):
            _check_keys(nested, inner, (*at, *name), origins, section)
            if len(name) > 1:  # msgspec does not say which entry of a table is wrong
                _check_values(nested, inner, (*at, *name), origins, section)


def _sections(kind: Any, key: str, value: Any) -> Iterator[Section]:
    """The sections that a value is or holds."""
    found: list[tuple[tuple[str, ...], Any, Any]] = []
    match get_origin(kind), get_args(kind):
        case None, ():
            found = [((key,), kind, value)]
        case builtins.dict, (_, entry) if isinstance(value, dict):
            found = [((key, name), entry, inner) for name, inner in value.items()]
        case builtins.tuple, (entry, _) if isinstance(value, list):
            found = [((f"{key}[{index}]",), entry, inner) for index, inner in enumerate(value)]
    for name, nested, inner in found:
        if isinstance(nested, type) and issubclass(nested, msgspec.Struct) and isinstance(inner, dict):
            yield name, nested, inner


def _check_values(
    kind: type[msgspec.Struct], values: Any, at: tuple[str, ...], origins: Mapping[str, str], section: str
) -> None:
    try:
        msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), section, origins, at)) from None


def _nearest(key: str, known: Any) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(names)}"


def _explain(message: str, section: str, origins: Mapping[str, str], at: tuple[str, ...] = ()) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.port`" with the key's own name and where it was set."""
    match = re.match(r"(?P<what>.*?)(?: - at `(?:key` in `)?\$\.?(?P<path>[^`]*)`)?$", message, re.DOTALL)
    assert match is not None
    path = ".".join((*at, *filter(None, [match["path"]])))
    what = match["what"].replace("`", "")
    if what == "Expected array, got str":
        what += '; write ["one", "two"]'
    return f"{origins.get(_plain(path), 'settings')}: {section}.{path or '?'}: {what[0].lower()}{what[1:]}"


def _plain(path: str) -> str:
    """The key that was set: arrays are set as a whole."""
    return re.sub(r"\[.*", "", path)
