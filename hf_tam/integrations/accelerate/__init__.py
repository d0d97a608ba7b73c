"""accelerate: `Accelerator.prepare`, and its checkpoints."""
