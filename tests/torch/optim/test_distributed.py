"""Ours under DDP and FSDP2, on two processes: the same training as torch's, and states that checkpoints know."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("distributed_worker.py")


def trained_on_two_processes(kind, backend):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "TRITON_INTERPRET": "1",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), kind, backend],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    return json.loads(outputs[0][0].strip().splitlines()[-1])


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_with_torch(kind, backend):
    report = trained_on_two_processes(kind, backend)
    # 4 steps of lr 0.05, each within a few eps of torch's: eps(float32) is 1.2e-7.
    assert max(report[name] for name in ("plain", "sums", "sharded", "whole")) < 2e-6, report
    assert report["state"] == ("DTensor" if kind == "fsdp2" else "Tensor")
    assert ("max_grad_norm" in report) == (kind == "fsdp2")
