"""Random hyperparameters, groups, gaps and schedules against the reference; HYPOTHESIS_PROFILE=thorough for more."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import (
    Case,
    Group,
    Leaf,
    aligned,
    channels_last,
    coming_and_going,
    constant,
    contiguous,
    drifting,
    never,
    offset_by_one,
    one_cycle,
    second_leaf_in_two_steps,
    sometimes_zero,
    strided,
    transposed,
    uneven,
    warm_up_and_decay,
)
from tests.running import assert_same, run_case, run_reference_case
from tests.test_properties import EVERY_BACKEND

flat_layouts = st.sampled_from([contiguous, strided, offset_by_one])
deep_layouts = st.sampled_from([contiguous, strided, transposed, offset_by_one])
image_layouts = st.sampled_from([contiguous, channels_last, transposed])


@st.composite
def leaves(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.complex64]))
    shape, layouts = draw(
        st.sampled_from(
            [((), st.just(contiguous)), ((0,), st.just(contiguous)), ((1,), flat_layouts), ((19,), flat_layouts),
             ((5, 8), deep_layouts), ((130, 17), deep_layouts), ((2, 3, 4, 5), image_layouts)]
        )
    )  # fmt: skip
    return Leaf(shape, dtype, draw(layouts), draw(layouts))


@st.composite
def overrides(draw, name):
    # gamma = 0 and a tensor of one element: c_t is damping_eps or 1, and with 1e-8 nothing but the rounding of 1 - 1
    gamma, damping_eps = draw(
        st.one_of(
            st.tuples(st.just(0.0), st.just(0.1)),
            st.tuples(st.one_of(st.just(1.0), st.floats(0.05, 1.0)), st.sampled_from([0.0, 1e-8, 0.1])),
        )
    )
    options = {
        "lr": draw(st.floats(0.0, 1e-2)),
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.3])),
        "gamma": gamma,
        "damping_eps": damping_eps,
        "torque_steps": draw(st.sampled_from([None, None, 0, 1, 5])),
        "step_size": draw(st.sampled_from(["sgd" if name == "TAM" else "adamw", "paper"])),
        "maximize": draw(st.booleans()),
    }
    # below 0.3 what is left of an older gradient is small beside the rounding it has had when it was the whole
    decay = st.one_of(st.just(0.0), st.floats(0.3, 0.95))
    if name == "TAM":
        return {**options, "momentum": draw(decay)}
    betas = draw(st.tuples(decay, st.floats(0.5, 0.999)))
    # a denominator near 0 would turn the last bit of a small gradient into a large step
    return {**options, "betas": betas, "eps": draw(st.floats(1e-3, 0.1))}


@st.composite
def cases(draw, name):
    groups = tuple(
        Group(tuple(draw(st.lists(leaves(), min_size=1, max_size=3))), draw(overrides(name)))
        for _ in range(draw(st.integers(1, 3)))
    )
    if not any(leaf.shape not in ((), (1,), (0,)) for group in groups for leaf in group.leaves):
        groups += (Group((Leaf((19,)), Leaf((5, 8)))),)
    case = Case(
        "fuzz",
        name,
        {"scope": draw(st.sampled_from(["tensor", "model"]))},
        groups,
        pattern=draw(st.sampled_from([drifting, drifting, aligned, sometimes_zero, uneven])),
        missing=draw(st.sampled_from([never, coming_and_going])),
        schedule=draw(st.sampled_from([constant, warm_up_and_decay, one_cycle])),
        steps=draw(st.integers(1, 14)),
    )
    plain = len(case.leaves) > 1 and case.leaves[1].gradient_layout is contiguous and case.leaves[1].shape != (0,)
    broken = draw(st.sampled_from([never, second_leaf_in_two_steps])) if plain else never
    return dataclasses.replace(case, broken=broken)


@EVERY_BACKEND
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:.*nonfinite")
def test_random_case(name, backend, data):
    case = data.draw(cases(name))
    assert_same(case, run_case(case, backend), run_reference_case(case))
