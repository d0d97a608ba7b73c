"""Two launch agents that meet over TCP, as on two machines: the same numbers as in one world."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sharding.test_equivalence import PARAMETERS, TORQUE

pytestmark = pytest.mark.distributed
TIMEOUT_S = 500
STRATEGIES = ["ddp-2", "fsdp1-full_shard-2", "fsdp2-reshard-True-2", "tp-2"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_machines_of_one_process(tmp_path):
    strategies = STRATEGIES + (["zero2-2", "zero3-2"] if _has_deepspeed() else [])
    rendezvous = [f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_backend=c10d", "--rdzv_id=test",
                  "--nnodes=2", "--nproc_per_node=1", "--local_addr=127.0.0.1"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, str(Path(__file__).with_name("agent.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen(
            [*command, str(tmp_path), *strategies],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        outputs = [agent.communicate(timeout=TIMEOUT_S)[0] for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(output[-2000:] for output in outputs)
    for rank in range(2):
        results = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert list(results) == strategies
        for name, result in results.items():
            assert result["torque"] <= TORQUE, name
            assert result["parameters"] <= PARAMETERS, name
            assert all(len(calls) == result["reduces"] for calls in result["calls"]), name
            assert result["reduces"] == 0 or result["cut"]["torque"] > 100 * TORQUE, name


def _has_deepspeed():
    from importlib.util import find_spec

    return find_spec("deepspeed") is not None
