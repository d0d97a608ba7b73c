"""The state of flat buffers with many logical tensors in them (DeepSpeed ZeRO).

`step`, `torque` and `exp_avg_scale` of a buffer are vectors, with one entry a logical tensor in the order of its
spans; every rank has them whole. In a state_dict they stand in every param group, as one table over all logical
tensors of the optimizer: DeepSpeed's universal checkpoint, which is how a run goes on with another number of ranks,
keeps of an optimizer only the moments, one number `step` and the param groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_tam.sharding import Span

TABLE = "logical_tensors"
"""Key of the table in a saved param group: for each scalar state a vector over all logical tensors, NaN where a
tensor has no state."""


def save_table(
    packed: dict[str, Any],
    buffers: Iterable[tuple[dict[str, Any], Sequence[int]]],
    *,
    count: int,
    scalar_states: Sequence[str],
) -> None:
    """Move the vectors of a state_dict into the table of its param groups. Waits for an accelerator.

    What was loaded and has not been stepped since stays as it was loaded, with a table or, from torch.optim, without.

    Args:
        packed: What torch.optim.Optimizer.state_dict returned; changed in place, its tensors are not.
        buffers: The state of each buffer that has been stepped, and the positions of its logical tensors.
        count: How many logical tensors there are.
        scalar_states: Names of the scalar states.
    """
    stepped = list(buffers)
    loaded: dict[str, Tensor] = next((group[TABLE] for group in packed["param_groups"] if TABLE in group), {})
    if not stepped and not loaded:
        return
    table = {
        key: loaded[key].clone()
        if key in loaded
        else torch.full((count,), torch.nan, dtype=torch.float32, device="cpu")
        for key in scalar_states
    }
    for state, indices in stepped:
        for key in scalar_states:
            table[key][list(indices)] = state[key].to("cpu", torch.float32)
    # In every group: DeepSpeed steps with one of them at a time, and ZeRO-3 gives all of them what the first one had
    # in a universal checkpoint (0.19.8, zero/stage3.py, load_hp_checkpoint_state_from_checkpoint_dir_stage3).
    for group in packed["param_groups"]:
        group[TABLE] = table
    for key, state in packed["state"].items():
        if not isinstance(state, dict) or "step" not in state:  # what a hook put there
            continue
        kept = {name: value for name, value in state.items() if name not in scalar_states}
        # The same function takes one number, that of the first buffer, for the steps of all; what is exact is in the
        # table.
        packed["state"][key] = {**kept, "step": state["step"].max()}


def load_vectors(
    state: dict[str, Any],
    group: dict[str, Any],
    spans: Sequence[Span],
    *,
    defaults: dict[str, float],
    device: torch.device,
) -> None:
    """Make the scalar states of a buffer vectors where a checkpoint has left something else. Usually does nothing.

    Args:
        state: The buffer's state, changed in place.
        group: Its param group, with or without the table.
        spans: The buffer's logical tensors.
        defaults: The scalar states of a moment that torch.optim has left, by name.
        device: Where the vectors go.

    Raises:
        RuntimeError: The state was saved for other logical tensors.
    """
    positions = [span.position for span in spans]
    for key, default in defaults.items():
        held = state.get(key)
        if isinstance(held, Tensor) and held.ndim == 1:
            _require_length(len(held), len(spans), "")
        elif TABLE in group:
            table = group[TABLE][key]
            _require_length(len(table), max(positions) + 1, "at least ")
            state[key] = table[positions].nan_to_num(0.0).to(device)
        else:
            # A checkpoint of torch's AdamW has one step for the whole buffer, and no torque.
            number = torch.as_tensor(default if held is None else held, dtype=torch.float32, device=device)
            state[key] = number.expand(len(spans)).clone()


def _require_length(saved: int, here: int, words: str) -> None:
    if saved < here or (not words and saved != here):
        raise RuntimeError(
            f"the loaded optimizer state is of {saved} parameter tensors, and {words}{here} are trained here: another "
            "model, or one with other trainable parameters, saved it; load a checkpoint of this one, or start afresh"
        )
