"""Questions to parts that are just dying."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deploy.probe import fetch, fetch_json


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A server that answers one request with these bytes and hangs up. Yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/metrics"
        thread.join()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nhalf an ans",
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n",
    ],
)
def test_answer_that_breaks_off_is_no_answer(answer: bytes) -> None:
    with answering(answer) as url:
        assert fetch(url) is None


def test_what_is_no_json_is_no_answer() -> None:
    with answering(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n{{{{") as url:
        assert fetch_json(url) is None
