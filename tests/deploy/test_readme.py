"""The README promises only what is there."""

from __future__ import annotations

import re
from pathlib import Path

from tests.deploy.settings_reference import updated

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_settings_reference_is_the_codes() -> None:
    assert updated(README) == README, "run: python -m tests.deploy.settings_reference"


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^)make (\w+)", README, re.MULTILINE)) - {"picks"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_that_it_names_exist() -> None:
    for path in set(re.findall(r"\b(?:deploy|engine)/[\w./-]*\w", README)):
        assert (Path(__file__).parents[2] / path).exists(), path
