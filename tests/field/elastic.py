"""Started by torchrun: trains, dies once in the middle, and goes on from its checkpoint after the restart."""

import datetime
import os
import signal
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def main(folder, name):
    sys.path.insert(0, str(ROOT))
    from tests.sharding import checkpoints

    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    rank = torch.distributed.get_rank()
    model, optimizer = checkpoints.build(name, "AdaTAMW", moved=attempt > 0)
    first = 0
    if attempt:
        checkpoints.load(folder, model, optimizer, "dcp")
        first = checkpoints.SAVED_AT
    for step in range(first, checkpoints.STOPPED_AT):
        if step == checkpoints.SAVED_AT and not attempt:
            checkpoints.save(folder, model, optimizer, "dcp")
        if step == checkpoints.SAVED_AT + 2 and not attempt and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.train(model, optimizer, step, step + 1)
    found = checkpoints.snapshot(model, optimizer)
    if rank == 0:
        torch.save({"attempt": attempt, "tensors": found}, Path(folder) / "found.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
