"""Started by torchrun on each "machine": compares sharded training with its twin, and writes the results."""

import datetime
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def main(folder, names):
    sys.path.insert(0, str(ROOT))
    from tests.sharding import comparing

    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=180))
    results = {name: comparing.compare(name, "AdaTAMW", {}, False) for name in names}
    for result in results.values():
        result["kinds"] = sorted(result["kinds"])
    rank = torch.distributed.get_rank()
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2:])
