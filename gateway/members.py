"""Which workers the gateway is to have: what the configuration, names in DNS and the operator say, added up. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import msgspec

from protos.core.errors import ConfigError, InvalidRequest

NAME_PREFIX = "dns://"
CONFIGURATION = "configuration"
OPERATOR = "operator"
ABSENCES = 2
"""An address is gone when so many answers in a row are without it: resolvers give partial ones."""
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?):([0-9]{1,5})")


class WorkerList(msgspec.Struct, frozen=True):
    """`gateway.workers`, read."""

    addresses: tuple[str, ...]
    names: tuple[str, ...]
    """HOST:PORT of each dns:// entry."""


def read_workers(entries: Iterable[str]) -> WorkerList:
    """Raises ConfigError that names the entry at fault."""
    addresses: list[str] = []
    names: list[str] = []
    for entry in entries:
        address = entry.removeprefix(NAME_PREFIX)
        if not is_address(address):
            raise ConfigError(f"gateway.workers: '{entry}' is neither HOST:PORT nor {NAME_PREFIX}NAME:PORT")
        (addresses if address == entry else names).append(address)
    return WorkerList(tuple(dict.fromkeys(addresses)), tuple(dict.fromkeys(names)))


def check_address(address: str) -> InvalidRequest | None:
    """What is wrong with a worker's address that came by the admin API."""
    return None if is_address(address) else InvalidRequest("address: must be HOST:PORT", param="address")


def is_address(text: str) -> bool:
    match = _ADDRESS.fullmatch(text)
    return match is not None and 0 < int(match[1]) < 65_536


class Members:
    """Who names which workers. The operator's word stands until the operator takes it back."""

    def __init__(self) -> None:
        self._named: dict[str, tuple[str, ...]] = {}
        self._removed: set[str] = set()
        self._drained: set[str] = set()

    @property
    def wanted(self) -> list[str]:
        """Each address once, in the order in which they were named."""
        every = dict.fromkeys(address for addresses in self._named.values() for address in addresses)
        return [address for address in every if address not in self._removed]

    def sources(self, address: str) -> list[str]:
        return [source for source, addresses in self._named.items() if address in addresses]

    def is_drained(self, address: str) -> bool:
        return address in self._drained

    def name(self, source: str, addresses: Collection[str]) -> bool:
        """All that the source names now; returns whether that is news."""
        before = self._named.get(source, ())
        self._named[source] = tuple(addresses)
        return self._named[source] != before

    def silence(self, source: str) -> None:
        """The source is gone, and what only it named."""
        self._named.pop(source, None)

    def add(self, address: str) -> None:
        """The operator wants it, whatever was said before."""
        self._removed.discard(address)
        self._drained.discard(address)
        if not self.sources(address):
            self._named[OPERATOR] = (*self._named.get(OPERATOR, ()), address)

    def drain(self, address: str) -> None:
        """It stays connected and gets no requests."""
        self._drained.add(address)

    def remove(self, address: str) -> None:
        """It leaves, also where the configuration names it."""
        self._drained.discard(address)
        self._named[OPERATOR] = tuple(item for item in self._named.get(OPERATOR, ()) if item != address)
        if self.sources(address):
            self._removed.add(address)


class Sightings:
    """The addresses behind one name, from the resolver's answers."""

    def __init__(self) -> None:
        self._absences: dict[str, int] = {}

    def answered(self, addresses: Collection[str]) -> list[str]:
        """The addresses to use after this answer."""
        for address in addresses:
            self._absences.setdefault(address, 0)
        for address in list(self._absences):
            self._absences[address] = 0 if address in addresses else self._absences[address] + 1
            if self._absences[address] >= ABSENCES:
                del self._absences[address]
        return list(self._absences)
