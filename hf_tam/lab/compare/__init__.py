"""Optimizers compared fairly: the same learning rates and seeds for each, chosen on validation and told on test data.

`plan` reads the YAML file, `running` does the runs and keeps a row for each, `choosing` and `printing` make the table.
"""
