from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.core.errors import ConfigError
from protos.core.settings import load


class Capture(msgspec.Struct, frozen=True, kw_only=True):
    level: Literal["full", "hashed", "off"] = "hashed"
    limit: int | None = None


class Example(msgspec.Struct, frozen=True, kw_only=True):
    port: int = 8000
    host: str = "127.0.0.1"
    workers: tuple[str, ...] = ()
    is_quiet: bool = False
    capture: Capture = Capture()
    named: dict[str, Capture] = {}
    listed: tuple[Capture, ...] = ()


def load_example(
    tmp_path: Path, toml: str | None = None, environ: dict[str, str] | None = None, **flags: object
) -> Example:
    file = None
    if toml is not None:
        file = tmp_path / "tidegate.toml"
        file.write_text(toml)
    return load(Example, "gateway", file=file, environ=environ or {}, flags=flags)


def test_nothing_given_is_the_defaults(tmp_path: Path) -> None:
    assert load_example(tmp_path) == Example()


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    toml = '[gateway]\nport = 1\nhost = "file"\nis_quiet = true\n'
    environ = {"TIDEGATE__GATEWAY__PORT": "2", "TIDEGATE__GATEWAY__HOST": "env", "TIDEGATE__ENGINE__PORT": "9"}
    found = load_example(tmp_path, toml, environ, port=3, host=None)
    assert (found.port, found.host, found.is_quiet) == (3, "env", True)


def test_nested_key_has_one_name_in_all_sources(tmp_path: Path) -> None:
    assert load_example(tmp_path, '[gateway.capture]\nlevel = "off"\n').capture.level == "off"
    assert load_example(tmp_path, environ={"TIDEGATE__GATEWAY__CAPTURE__LEVEL": "full"}).capture.level == "full"
    assert load_example(tmp_path, **{"capture.level": "full"}).capture.level == "full"


def test_array_of_the_environment_is_written_as_in_the_file(tmp_path: Path) -> None:
    environ = {"TIDEGATE__GATEWAY__WORKERS": '["one:1", "[::1]:2"]', "TIDEGATE__GATEWAY__HOST": "[::1]"}
    found = load_example(tmp_path, '[gateway]\nworkers = ["three:3"]\n', environ)
    assert (found.workers, found.host) == (("one:1", "[::1]:2"), "[::1]")


def test_error_names_a_flag_as_it_is_written() -> None:
    flags, spelled = {"port": "x", "capture.level": "none"}, {"capture.level": "--level"}
    with pytest.raises(ConfigError, match=r"^flag --port: gateway\.port: expected int"):
        load(Example, "gateway", file=None, environ={}, flags={"port": "x"}, spelled=spelled)
    with pytest.raises(ConfigError, match=r"^flag --level: gateway\.capture\.level: invalid enum"):
        load(Example, "gateway", file=None, environ={}, flags=flags | {"port": 1}, spelled=spelled)


def test_profile_loses_against_the_file(tmp_path: Path) -> None:
    profile, file = tmp_path / "profile.toml", tmp_path / "file.toml"
    profile.write_text('[gateway]\nport = 1\nhost = "profile"\n')
    file.write_text("[gateway]\nport = 2\n")
    found = load(Example, "gateway", file=file, environ={}, flags={}, profile=profile)
    assert (found.port, found.host) == (2, "profile")


def test_service_links_of_kubernetes_are_ignored(tmp_path: Path) -> None:
    assert load_example(tmp_path, environ={"TIDEGATE_GATEWAY_PORT": "tcp://10.0.0.1:80"}) == Example()


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[gateway]\nprot = 1\n", "tidegate.toml: unknown key 'prot' in [gateway]; did you mean 'port'?"),
        ("[gateway.capture]\nlvel = 1\n", "unknown key 'lvel' in [gateway.capture]; did you mean 'level'?"),
        ("[gateway]\nxyzzy = 1\n", "known: capture, host, is_quiet, listed, named, port, workers"),
        ("[gateway.named.a]\nlvel = 1\n", "toml: unknown key 'lvel' in [gateway.named.a]; did you mean 'level'?"),
        ("[[gateway.listed]]\nlvel = 1\n", "toml: unknown key 'lvel' in [gateway.listed[0]]; did you mean 'level'?"),
        ("[gateway.named.a]\n[gateway.named.b]\nlimit = 'x'\n", "toml: gateway.named.b.limit: expected int | null"),
        ("[[gateway.listed]]\nlimit = 'x'\n", "toml: gateway.listed[0].limit: expected int | null"),
        ("[gateway.named]\na = 1\n", "toml: gateway.named[...]: expected object, got int"),
        ("[gateway]\nworkers = 'a'\n", """gateway.workers: expected array, got str; write ["one", "two"]"""),
        ("[gatewya]\n", "unknown section [gatewya]; did you mean 'gateway'?"),
        ('[gateway]\nport = "many"\n', "tidegate.toml: gateway.port: expected int, got str"),
        ('[gateway.capture]\nlevel = "all"\n', "tidegate.toml: gateway.capture.level: invalid enum value 'all'"),
        ("gateway = 1\n", "gateway must be a section, written [gateway]"),
        ("[gateway\n", "not valid TOML"),
        pytest.param(f"port = {'9' * 5000}\n", "not valid TOML", id="number without end"),
        pytest.param(f"port = {'[' * 5000}\n", "not valid TOML", id="array without end"),
    ],
)
def test_mistake_in_the_file_names_file_and_key(toml: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_example(tmp_path, toml)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistake_names_where_the_value_came_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"environment variable TIDEGATE__GATEWAY__PORT: gateway\.port: expected"):
        load_example(tmp_path, environ={"TIDEGATE__GATEWAY__PORT": "many"})
    with pytest.raises(ConfigError, match=r"flag --capture-level: gateway\.capture\.level"):
        load_example(tmp_path, **{"capture.level": "all"})
    with pytest.raises(ConfigError, match="environment variable TIDEGATE__GATEWAY__PROT: unknown key 'prot'"):
        load_example(tmp_path, environ={"TIDEGATE__GATEWAY__PROT": "1"})


def test_missing_and_unreadable_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; pass an existing one with --config"):
        load(Example, "gateway", file=tmp_path / "missing.toml", environ={}, flags={})
    with pytest.raises(ConfigError, match="cannot be read"):
        load(Example, "gateway", file=tmp_path, environ={}, flags={})
    (tmp_path / "latin.toml").write_bytes(b'[gateway]\nhost = "\xfc"\n')
    with pytest.raises(ConfigError, match="cannot be read"):
        load(Example, "gateway", file=tmp_path / "latin.toml", environ={}, flags={})


@pytest.mark.parametrize(
    "environ",
    [
        {"TIDEGATE__GATEWAY__PORT": "1", "TIDEGATE__GATEWAY__PORT__A": "2"},
        {"TIDEGATE__GATEWAY__PORT____": "1"},
        {"TIDEGATE__GATEWAY__": "1"},
        {"TIDEGATE__GATEWAY__CAPTURE": "full"},
        {"TIDEGATE__GATEWAY__WORKERS": "a,b"},
    ],
)
def test_environment_that_fits_no_key_is_a_config_error(environ: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_example(tmp_path, environ=environ)


def test_section_wins_over_a_plain_value_of_an_earlier_source(tmp_path: Path) -> None:
    found = load_example(tmp_path, "[gateway]\ncapture = 1\n", **{"capture.level": "off"})
    assert found.capture.level == "off"


@given(port=st.integers(0, 2**31), host=st.text(max_size=20), quiet=st.booleans(), limit=st.none() | st.integers())
def test_flags_arrive_unchanged(port: int, host: str, quiet: bool, limit: int | None) -> None:
    flags = {"port": port, "host": host, "is_quiet": quiet, "capture.limit": limit}
    found = load(Example, "gateway", file=None, environ={}, flags=flags)
    assert found == Example(port=port, host=host, is_quiet=quiet, capture=Capture(limit=limit))
