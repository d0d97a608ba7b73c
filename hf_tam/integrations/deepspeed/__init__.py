"""DeepSpeed: its engine, its configuration and its checkpoints."""
