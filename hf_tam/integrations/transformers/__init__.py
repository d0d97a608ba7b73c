"""transformers: AdaTAMW as an `optim` of the Trainer, and what follows from it."""
