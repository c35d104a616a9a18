"""Every verb in two processes of one training run: DDP, FSDP2 and accelerate."""

import socket
from pathlib import Path

import pytest
import torch.multiprocessing

pytest.importorskip("accelerate")
import stacks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each cell said on each rank; all cells share two processes, whose start takes most of the time."""
    folder = tmp_path_factory.mktemp("stacks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(stacks.run, (port, str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize("cell", stacks.CELLS)
def test_it_is_right_or_refused_with_a_sentence(cell, results: Path):
    for rank in range(2):
        said = (results / f"{cell}-{rank}").read_text()
        assert not said, f"rank {rank}: {said}"
