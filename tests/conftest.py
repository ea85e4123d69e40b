"""What every test runs under: one Hypothesis profile, one torch thread, no network."""

import os
import socket
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before a peer is imported
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and fork do not mix, and it warns about it
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from hypothesis import settings

settings.register_profile(
    "fourbit", deadline=None, max_examples=50, derandomize=True
)  # first calls into torch are slow
settings.load_profile("fourbit")
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """The package never opens a connection; a peer that tries is told no. Local (Unix) sockets stay usable."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def refuse(self: socket.socket, address: Any) -> Any:
        if self.family == socket.AF_UNIX:
            return connect(self, address)
        raise AssertionError(f"a test tried to connect to {address!r}; nothing here may use the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket.socket, "connect_ex", refuse)
        yield
    assert socket.socket.connect is connect and socket.socket.connect_ex is connect_ex
