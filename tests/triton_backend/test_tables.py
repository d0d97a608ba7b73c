"""The tables of pointers and chunks, and when this backend is the choice."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl

import hf_tam
from hf_tam import backends
from hf_tam.backends import select_backend
from hf_tam.backends.triton import chunks, launch, table
from tests.handed import handed_again
from tests.test_equivalence import Dispatched
from tests.triton_backend.support import DEVICE, OVERFLOWS_ARE_SAID, backend, coefficients, make_tensors, moved

pytestmark = OVERFLOWS_ARE_SAID


@given(numel=st.one_of(st.integers(0, 10**6), st.integers(2**31 - 10, 2**36)))
@settings(max_examples=200)
def test_chunks_cover_a_tensor_once(numel):
    length, count = table.chunk_length(numel), table.num_chunks(numel)
    assert length % chunks.SPAN == 0
    assert 1 <= count <= chunks.MAX_CHUNKS
    assert (count - 1) * length < max(numel, 1) <= count * length


@triton.jit
def _where(tensors, chunk_places, found, first: tl.int64):
    _, _, start, length = chunks.locate(tensors, chunk_places, first + tl.program_id(0))
    tl.store(found, start)
    tl.store(found + 1, length)


def test_offsets_are_64_bits_wide():
    """The last chunk of a tensor of 3 * 2^31 elements; in 32 bits it would begin before the tensor."""
    numel = 3 * 2**31 + 5
    length, count = table.chunk_length(numel), table.num_chunks(numel)
    rows = torch.tensor([[0, 0, 0, numel, length, 0, count, 0]], dtype=torch.int64, device=DEVICE)
    chunk_places = torch.zeros(count, dtype=torch.int32, device=DEVICE)
    found = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    _where[(1,)](rows, chunk_places, found, count - 1)
    assert found.tolist() == [(count - 1) * length, numel - (count - 1) * length]
    assert found[0] > 2**31


def test_update_beyond_32_bits(monkeypatch):
    """The last chunk of a tensor of 2^32 elements of which only that chunk exists: addresses are moved back."""
    tail = 700
    numel = 2**32 + tail
    tensors = make_tensors([torch.randn(tail)])
    bound = backend.bind(tensors)
    whole, count = table.chunk_length(numel), table.num_chunks(numel)
    start = (count - 1) * whole
    shift = 4 * start
    held = (tensors.params[0], tensors.firsts[0], tensors.seconds[0])
    addresses = [tensor.data_ptr() - shift for tensor in held]
    row = torch.tensor([[*addresses, start + tail, whole, 0, count, 0]], dtype=torch.int64, device=DEVICE)
    chunk_places = torch.zeros(count, dtype=torch.int32, device=DEVICE)
    grads = torch.tensor([tensors.grads[0].data_ptr() - shift], dtype=torch.int64, device=DEVICE)
    expected = make_tensors([tensors.params[0].clone().cpu()])
    backend.update(expected, coefficients(1))
    kind = next(iter(bound.table.parts))
    constants = launch.compiled_for(kind, block=chunks.UPDATE_BLOCK)
    backend.update_kernel[(1,)](
        row, grads, chunk_places, bound.table.numbers, torch.stack(list(coefficients(1))), None, None, count - 1, 1,
        ADAM=True, **constants,
    )  # fmt: skip
    assert start > 2**31
    assert torch.equal(tensors.params[0], expected.params[0])


def test_tables_are_kept_until_something_moves():
    tensors = make_tensors([torch.randn(40), torch.randn(7)])
    kept = backend.bind(tensors).table
    column = kept.grads
    assert backend.bind(handed_again(tensors)).table is kept
    assert kept.grads is column
    tensors.grads[0] = tensors.grads[0].clone()
    assert backend.bind(handed_again(tensors)).table is kept
    assert kept.grads.tolist() == [grad.data_ptr() for grad in tensors.grads]
    assert column.tolist() != kept.grads.tolist()  # the old column is left as a graph may know it
    column, before = kept.grads, kept.numbers.tolist()
    assert backend.bind(handed_again(tensors, numbers=[tensors.numbers[0]._replace(lr=0.5)])).table is kept
    assert column is not kept.grads
    assert [left == right for left, right in zip(before, kept.numbers.tolist(), strict=True)].count(False) == 1
    changes = [
        (lambda held: held.firsts.__setitem__(0, held.firsts[0].clone()), {}),
        (lambda held: held.grads.__setitem__(0, held.grads[0].double()), {}),
        (lambda held: held.grads.__setitem__(0, torch.empty(41, device=DEVICE)[1:].copy_(held.grads[0])), {}),
        (lambda held: None, {"numbers": [tensors.numbers[0]._replace(coupled_decay=0.1)]}),
        (lambda held: None, {"maximize": True}),
    ]
    for change, options in changes:
        again = handed_again(tensors)
        before = backend.bind(again).table
        change(again)
        assert backend.bind(handed_again(again, **options)).table is not before


def test_nothing_is_read_by_the_host(only_triton):
    """The host dispatches no read; where the interpreter runs, that is all that can be seen."""
    parameters = [torch.nn.Parameter(moved(torch.randn(9)))]
    optimizer = hf_tam.AdaTAMW(parameters, capturable=True)
    for step in range(2):
        parameters[0].grad = torch.full_like(parameters[0], math.nan if step else 1.0)
        with Dispatched() as dispatched:
            optimizer.step()
        assert dispatched.count("aten._local_scalar_dense") == 0
    assert float(optimizer.state[parameters[0]]["step"]) == 1.0


def test_it_is_the_choice_on_accelerators():
    cuda = torch.device("cuda")
    assert select_backend(cuda, foreach=None, fused=None, on_host=False) is backend
    assert select_backend(cuda, foreach=None, fused=True, on_host=False) is backend
    assert select_backend(cuda, foreach=True, fused=None, on_host=False) is not backend
    assert select_backend(cuda, foreach=False, fused=False, on_host=False) is not backend
    assert select_backend(torch.device("cpu"), foreach=None, fused=None, on_host=False) is not backend


def test_without_triton_foreach_is_used(monkeypatch):
    from hf_tam.backends import foreach

    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    backends._warn_of_missing_triton.cache_clear()
    assert select_backend(torch.device("cuda"), foreach=True, fused=None, on_host=False) is foreach  # says nothing
    with pytest.warns(RuntimeWarning, match="triton is not installed: on cuda"):
        assert select_backend(torch.device("cuda"), foreach=None, fused=None, on_host=False) is foreach
    assert select_backend(torch.device("cuda"), foreach=None, fused=None, on_host=False) is foreach  # once is enough
    with pytest.raises(RuntimeError, match="pip install triton"):
        select_backend(torch.device("cuda"), foreach=None, fused=True, on_host=False)
