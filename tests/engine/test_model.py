"""The cache folder of models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from engine import model
from engine.settings import DEFAULT_MODEL
from protos.core.errors import ConfigError


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"TIDEGATE_HOME": str(tmp_path / "home")}


def silent(stage: str, done: int, total: int) -> None:
    """Nobody watches."""


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "weights").write_bytes(b"1234")
    model._write_sums(folder, silent)
    return folder


def test_pulled_model_is_found_by_name(environ: dict[str, str]) -> None:
    folder = make_model(model.cache_folder(environ) / "tiny")
    assert model.resolve("tiny", environ) == str(folder)
    assert [(item.name, item.size_bytes) for item in model.pulled_models(environ)] == [("tiny", 6)]


def test_hub_name_may_have_an_owner_in_the_cache(environ: dict[str, str]) -> None:
    make_model(model.cache_folder(environ) / "owner" / "tiny")
    assert [item.name for item in model.pulled_models(environ)] == ["owner/tiny"]


def test_folder_of_a_model_is_used_as_it_is(environ: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert model.resolve(str(folder), environ) == str(folder)


def test_hub_name_is_left_to_the_engine(environ: dict[str, str]) -> None:
    assert model.resolve("Qwen/Qwen3-14B", environ) == "Qwen/Qwen3-14B"


def test_missing_model_says_how_to_get_it(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"tidegate model pull {DEFAULT_MODEL}"):
        model.resolve(DEFAULT_MODEL, environ)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        model.resolve("/no/such/folder", environ)


def test_second_pull_only_checks(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(model.cache_folder(environ) / DEFAULT_MODEL)
    monkeypatch.setattr(model, "_make_default", lambda *_: pytest.fail("pulled again"))
    assert model.pull(DEFAULT_MODEL, silent, environ) == folder


def test_damaged_model_is_pulled_again_whole(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(model.cache_folder(environ) / DEFAULT_MODEL)
    (folder / "weights").write_bytes(b"123")
    monkeypatch.setattr(model, "_make_default", lambda _scratch, made, _advance: make_model(made))
    assert model.pull(DEFAULT_MODEL, silent, environ) == folder
    assert (folder / "weights").read_bytes() == b"1234"
    assert [path.name for path in folder.parent.iterdir()] == [DEFAULT_MODEL]


def test_two_pulls_at_once_make_one_model(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model.cache_folder(environ) / DEFAULT_MODEL
    remove = shutil.rmtree

    def remove_late(path: Path, **how: Any) -> None:
        """The other pull is done between our last look and our rename."""
        remove(path, **how)
        if path == folder:
            make_model(folder)

    monkeypatch.setattr(model, "_make_default", lambda _scratch, made, _advance: make_model(made))
    monkeypatch.setattr(shutil, "rmtree", remove_late)
    assert model.pull(DEFAULT_MODEL, silent, environ) == folder
    assert [path.name for path in folder.parent.iterdir()] == [DEFAULT_MODEL]
    assert model.verify(folder, silent)


def test_cache_that_cannot_be_written_is_named(environ: dict[str, str]) -> None:
    Path(environ["TIDEGATE_HOME"]).write_text("a file")
    with pytest.raises(ConfigError, match="TIDEGATE_HOME"):
        model.pull(DEFAULT_MODEL, silent, environ)


def test_failed_pull_leaves_nothing(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(scratch: Path, made: Path, advance: object) -> None:
        made.mkdir()
        raise ConfigError("cannot download")

    monkeypatch.setattr(model, "_make_default", fail)
    with pytest.raises(ConfigError):
        model.pull(DEFAULT_MODEL, silent, environ)
    assert model.pulled_models(environ) == []
    assert list(model.cache_folder(environ).iterdir()) == []


def test_name_that_no_hub_can_have_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="is no model that can be pulled"):
        model.pull("not a model!", silent, environ)
