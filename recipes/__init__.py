"""Fine-tuning recipes: one script a task, run as `python recipes/sft.py` or `python -m recipes.sft`."""
