"""How far a gradient travels from `optimizer.step()` to its parameter: functions, files, and never back up."""

import sys
from pathlib import Path

import pytest
import torch

import hf_tam
from hf_tam.backends import native

PACKAGE = str(Path(hf_tam.__file__).parent)
COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<lambda>")
WAYS = [  # most functions, most files
    pytest.param({}, 30, 8, id="default", marks=pytest.mark.skipif(not native.is_available(), reason="no compiler")),
    pytest.param({"foreach": False, "fused": False}, 45, 9, id="single"),
    pytest.param({"foreach": True, "fused": False}, 45, 9, id="foreach"),
]


def walk(**options):
    """The functions of the package that a warm step enters, and the modules that it enters again from below."""
    parameters = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(3)]
    optimizer = hf_tam.AdaTAMW(parameters, lr=1e-3, **options)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(8, 8)
        optimizer.step()
    functions, stack, again = set(), [], set()

    def see(frame, event, argument):
        file = frame.f_code.co_filename
        if event not in ("call", "return") or not file.startswith(PACKAGE):
            return
        if event == "return":
            if stack:
                stack.pop()
            return
        if frame.f_code.co_name not in COMPREHENSIONS:
            functions.add((file, frame.f_code.co_firstlineno, frame.f_code.co_name))
            if stack and stack[-1] != file and file in stack:
                again.add((stack[-1], file))
        stack.append(file)

    sys.setprofile(see)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return functions, again


@pytest.mark.parametrize(("options", "most_functions", "most_files"), WAYS)
def test_a_step_is_short(options, most_functions, most_files):
    functions, _ = walk(**options)
    assert len(functions) <= most_functions, sorted(functions)
    assert len({file for file, _, _ in functions}) <= most_files


@pytest.mark.parametrize(
    "options", [*(way.values[0] for way in WAYS), {"max_grad_norm": 1.0}, {"scope": "model"}], ids=str
)
def test_a_step_does_not_go_back_up(options):
    functions, again = walk(**options)
    assert functions
    assert not again
