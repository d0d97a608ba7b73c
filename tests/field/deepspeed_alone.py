"""DeepSpeed in the process of the test, over a group of one."""

import contextlib
import os
from unittest import mock

import torch

from tests.sharding.zero_engine import import_deepspeed


@contextlib.contextmanager
def deepspeed_alone():
    """Gives the module `deepspeed`; its groups, which it remembers, end with the body."""
    with mock.patch.dict(os.environ, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        deepspeed = import_deepspeed()
        deepspeed.init_distributed("gloo")
        try:
            yield deepspeed
        finally:
            deepspeed.comm.destroy_process_group()
