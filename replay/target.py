"""Where a replay goes: the address of a server, and what it serves."""

from __future__ import annotations

import ssl
import urllib.parse

import msgspec

from protos.core.errors import ConfigError

API_KEY_VARIABLE = "TIDEGATE__REPLAY__API_KEY"


class Target(msgspec.Struct, frozen=True):
    url: str
    host: str
    port: int
    is_tls: bool
    path: str
    """Prefix of every path, without the `/v1` that many servers' base URLs end in."""

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"

    def tls(self) -> ssl.SSLContext | None:
        return ssl.create_default_context() if self.is_tls else None


def parse_target(url: str) -> Target:
    """Raises ConfigError for what is not an HTTP address."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urllib.parse.SplitResult("", "", "", "", ""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or not _is_plain(url, parts.hostname):
        raise ConfigError(f"--target {url!r} is not an address like http://127.0.0.1:8000")
    is_tls = parts.scheme == "https"
    path = parts.path.rstrip("/").removesuffix("/v1")
    return Target(url, parts.hostname, port or (443 if is_tls else 80), is_tls, path)


def _is_plain(url: str, host: str) -> bool:
    """Fit for a request line: no credentials, query, spaces or anything outside printable ASCII.

    And for a resolver, which raises UnicodeError for a host with an empty label or one over 63 characters.
    """
    has_labels = all(0 < len(label) < 64 for label in host.removesuffix(".").split("."))
    return has_labels and url.isascii() and url.isprintable() and not any(mark in url for mark in " ?#@")


class Extra(msgspec.Struct, frozen=True):
    """What a Tidegate gateway adds to an entry of /v1/models."""

    backend: str = ""
    simulated: bool = False
    context_tokens: int = 0
    workers: int = 0


class ServedModel(msgspec.Struct, frozen=True):
    id: str
    tidegate: Extra | None = None


class ModelList(msgspec.Struct, frozen=True):
    data: tuple[ServedModel, ...]


_models_decoder = msgspec.json.Decoder(ModelList)


def parse_models(target: Target, status: int, body: bytes) -> tuple[ServedModel, ...]:
    """The answer to GET /v1/models; raises ConfigError when it is none, or empty."""
    try:
        if status in (401, 403):
            raise ConfigError(f"{target.url} asks for an API key, or refuses this one: set {API_KEY_VARIABLE}")
        if status != 200:
            raise ConfigError(
                f"{target.url} answers GET /v1/models with status {status}: not an OpenAI-compatible server"
            )
        models = _models_decoder.decode(body).data
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise ConfigError(f"{target.url} answers GET /v1/models with no list of models") from None
    if not models:
        raise ConfigError(f"{target.url} serves no model yet: wait until its /ready answers 200")
    return models
