"""What the recipes share: arguments, data, models, checkpoints and reporting, one concern a module."""
