"""What nobody needs to train: benchmarks, comparisons of optimizers, and pages about runs."""
