"""HOST:PORT."""

from __future__ import annotations


def join(host: str, port: int) -> str:
    """
    >>> join("127.0.0.1", 8000), join("::1", 8000)
    ('127.0.0.1:8000', '[::1]:8000')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
