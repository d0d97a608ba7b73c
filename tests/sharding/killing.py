"""Ends a process with SIGKILL in the middle of a write, at a byte that the caller chooses."""

import builtins
import contextlib
import io
import os
import signal
from unittest import mock

import torch


class Fuse:
    """Counts the bytes that this process writes below a folder, and kills the process after so many.

    What it sees: files that Python opens for writing, and torch.save to a path. safetensors writes on its own.

    Args:
        folder: Only what is written below it counts.
        budget: How many bytes are still written; None: all.
    """

    def __init__(self, folder, budget=None):
        self.folder = os.path.join(os.path.abspath(folder), "")
        self.budget = budget
        self.written = 0

    @contextlib.contextmanager
    def lit(self):
        """In its body files are written through the fuse."""
        with (
            mock.patch.object(builtins, "open", self._opening(builtins.open)),
            mock.patch.object(io, "open", self._opening(io.open)),
            mock.patch.object(torch, "save", self._saving(torch.save)),
        ):
            yield self

    def watches(self, file):
        return isinstance(file, (str, os.PathLike)) and os.path.abspath(file).startswith(self.folder)

    def _opening(self, original):
        def fused_open(file, mode="r", *args, **options):
            if "w" not in mode or not self.watches(file):
                return original(file, mode, *args, **options)
            binary = io.BufferedWriter(_FusedFile(self, file))
            return binary if "b" in mode else io.TextIOWrapper(binary, encoding=options.get("encoding"))

        return fused_open

    def _saving(self, original):
        def fused_save(content, file, *args, **options):
            if not self.watches(file):
                return original(content, file, *args, **options)
            with open(file, "wb") as stream:
                return original(content, stream, *args, **options)

        return fused_save


class _FusedFile(io.FileIO):
    def __init__(self, fuse, path):
        super().__init__(path, "w")
        self.fuse = fuse

    def write(self, content):
        content = memoryview(content).cast("B")
        left = None if self.fuse.budget is None else self.fuse.budget - self.fuse.written
        if left is not None and left <= len(content):
            super().write(content[:left])
            os.kill(os.getpid(), signal.SIGKILL)
        self.fuse.written += len(content)
        return super().write(content)
