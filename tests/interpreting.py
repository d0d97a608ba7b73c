"""Triton's interpreter as the tests need it: the kernels run on the CPU, on tensors that lie there.

Two things of triton 3.9 are mended here, in the test process only. It patches the language anew at every call of a
helper, which takes 7 ms each; and it cuts fp32 off to bf16 where the compiled code rounds to nearest.
"""

import types

import torch


def prepare():
    """Mend the interpreter; no effect where the kernels are compiled."""
    import triton.language as tl
    from triton import knobs
    from triton.runtime import interpreter

    if not knobs.runtime.interpret or isinstance(interpreter._patch_lang, _PatchOnce):
        return
    interpreter._patch_lang = _PatchOnce(interpreter._patch_lang, (tl, tl.core))
    cut = interpreter.InterpreterBuilder.cast_impl

    def rounded(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            bits = torch.from_numpy(source.data.copy()).to(torch.bfloat16).view(torch.uint16)
            return interpreter.TensorHandle(bits.numpy(), target.scalar)
        return cut(self, source, target)

    interpreter.InterpreterBuilder.cast_impl = rounded


class _PatchOnce:
    """Patches each set of language modules at its first use, and leaves it patched."""

    def __init__(self, patch, modules):
        self.patch, self.modules, self.done = patch, modules, set()

    def __call__(self, function):
        used = tuple(
            module for module in self.modules if any(value is module for value in function.__globals__.values())
        )
        if used not in self.done:
            self.patch(function)
            self.done.add(used)
        return types.SimpleNamespace(restore=lambda: None)
