"""Fine-tuning recipes: one script a task, run as `python recipes/sft.py` or `python -m recipes.sft`."""

import logging

# peft imports bitsandbytes (0.50) for everybody, which then says on a CPU what would make 4 bits faster.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
