"""The embedded default data, written for this project and generated deterministically."""
