"""The optimizers: AdaTAMW, AdaTAM and TAM (Torque-Aware Momentum, arXiv 2412.18790)."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_tam.family import Family
from hf_tam.hyperparameters import ADAPTIVE_STEP_SIZES, MOMENTUM_STEP_SIZES
from hf_tam.torque_aware import TorqueAware
from hf_tam.update import adam_numbers, sgd_numbers

__all__ = ["TAM", "AdaTAM", "AdaTAMW"]

Scope = Literal["tensor", "model"]
Nonfinite = Literal["skip", "raise", "propagate"]


class _Adaptive(TorqueAware):
    """The Adam forms. State: `step`, `exp_avg`, `exp_avg_scale`, `exp_avg_sq`, `torque`.

    The first moment is kept normalised: AdamW's exp_avg (with step_size="paper" the paper's m) is
    `exp_avg * exp_avg_scale`. `exp_avg` and `exp_avg_sq` have the parameter's layout and, without `state_bits`, its
    dtype; `param_correction` is 16 bits, called bfloat16, of that layout too; the others are 0-d fp32.
    """

    step_sizes = ADAPTIVE_STEP_SIZES


def _adaptive(name: str, *, coupled: bool) -> Family:
    numbers = partial(adam_numbers, coupled=coupled)
    return Family(name, ("exp_avg", "exp_avg_sq"), ("step", "exp_avg_scale", "torque"), coupled, numbers)


class AdaTAMW(_Adaptive):
    r"""AdamW whose first moment is damped by the angle between the new gradient and the momentum.

        s_t = <m_{t-1}, g_t> / (|m_{t-1}| |g_t|),   S_t = gamma S_{t-1} + (1 - gamma) s_t,   d_t = (1 + S_t) / 2
        c_t = damping_eps + d_t
        m_t = beta1 m_{t-1} + (1 - beta1) 2 c_t g_t        (step_size="adamw")
        m_t = beta1 m_{t-1} + c_t g_t                      (step_size="paper")
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2

    and AdamW's decoupled decay and update; bias correction with "adamw", none with "paper". With the torque held at 0
    (gamma=1) and damping_eps=0, step_size="adamw" is torch.optim.AdamW, so learning rates tuned for AdamW carry over.

    Args:
        params: Parameters, named parameters or param groups. A group may override every hyperparameter.
        lr: Learning rate; a float or a 1-element tensor.
        betas: Decay of the first and of the second moment, each in [0, 1).
        eps: Term added to the denominator, > 0.
        weight_decay: Decoupled weight decay, >= 0.
        gamma: Smoothing of the torque, in [0, 1]. Source: section 3 of the paper, which uses 0.9.
        damping_eps: Least factor on a gradient that opposes the momentum. Source: the paper's epsilon, 1e-8.
        scope: "tensor": one angle for each parameter tensor. "model": one over the parameters of *this* optimizer
            (the paper read literally). Refused where another rank's optimizer has other parameters; several optimizers
            in one process have an angle each.
        step_size: "adamw": AdamW's learning rates carry over. "paper": the literal recurrence, which moves 5 to 33
            times as far at the same lr.
        torque_steps: The torque acts in the first N steps of a tensor and is neutral afterwards (the paper's TAM as
            warm-up); None: always.
        nonfinite: What a NaN or Inf in a gradient does. "skip": that tensor (scope "model": the whole step) is left
            untouched, counted and warned of once; a gradient whose squares float64 cannot add up counts as one.
            "raise": FloatingPointError before anything is changed; reads a number every step, so it waits for an
            accelerator. "propagate": as torch.optim; the torque stays finite all the same.
        max_grad_norm: Clip the gradients to this global norm inside the step, as torch.nn.utils.clip_grad_norm_ before
            it would, at next to no cost (the norm comes with the angles, also over shards); the same for all param
            groups. The norm is taken over the parameters of *this* optimizer, and refused as scope "model" is. Tensors
            that `nonfinite="skip"` leaves out do not count. The gradients may be left clipped or not. With coupled
            weight decay the norm is taken first, in a walk and a reduction of its own. None: no clipping.
        param_correction: "bits16": of a bfloat16 parameter, keep what it leaves out of the fp32 weight in 16 bits of
            state, so that the two together are that weight, to the bit (`hf_tam.precision`). Without it most steps of
            a fine-tuning's size round to nothing in bfloat16. Parameters of other dtypes have none. None: no
            correction.
        state_bits: 32: keep the moments in fp32, whatever the parameter's dtype. None: in the parameter's.
        maximize: Ascend instead of descend.
        foreach: Use the multi-tensor backend. None: on accelerators without Triton kernels.
        fused: Use the fused backend. None: on the CPU, and on accelerators that Triton compiles for.
        capturable: Never read a number on the host, on any device.

    Raises:
        ValueError: A hyperparameter is out of range.
        RuntimeError: `fused` and `foreach` are both True.

    References:
        Torque-Aware Momentum, https://arxiv.org/abs/2412.18790
    """

    family: ClassVar[Family] = _adaptive("AdaTAMW", coupled=False)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        gamma: float = 0.9,
        damping_eps: float = 1e-8,
        scope: Scope = "tensor",
        step_size: Literal["adamw", "paper"] = "adamw",
        torque_steps: int | None = None,
        nonfinite: Nonfinite = "skip",
        max_grad_norm: float | None = None,
        param_correction: Literal["bits16"] | None = None,
        state_bits: Literal[32] | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        """See the class."""
        arguments = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, {**arguments, "decoupled_weight_decay": True})


class AdaTAM(_Adaptive):
    """AdaTAMW with Adam's coupled weight decay: g_t + weight_decay * param is the gradient of angle and moments.

    The arguments are `AdaTAMW`'s; `weight_decay` defaults to 0. The reported `grad_norm` is of the raw gradient.

    References:
        Torque-Aware Momentum, https://arxiv.org/abs/2412.18790
    """

    family: ClassVar[Family] = _adaptive("AdaTAM", coupled=True)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma: float = 0.9,
        damping_eps: float = 1e-8,
        scope: Scope = "tensor",
        step_size: Literal["adamw", "paper"] = "adamw",
        torque_steps: int | None = None,
        nonfinite: Nonfinite = "skip",
        max_grad_norm: float | None = None,
        param_correction: Literal["bits16"] | None = None,
        state_bits: Literal[32] | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        """See `AdaTAMW`."""
        arguments = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, {**arguments, "decoupled_weight_decay": False})


class TAM(TorqueAware):
    """SGD with momentum whose momentum is damped by the angle. State: `step`, `momentum_buffer`, `torque`.

        m_t = momentum m_{t-1} + c_t g_t,   param -= lr m_t          (step_size="paper")

    step_size="sgd" keeps and applies 2 m_t: with the torque held at 0 (gamma=1) and damping_eps=0 it is
    torch.optim.SGD(momentum=momentum), so that its learning rates carry over. Weight decay is coupled, as in SGD.

    Args:
        params: Parameters, named parameters or param groups. A group may override every hyperparameter.
        lr: Learning rate; a float or a 1-element tensor.
        momentum: Decay of the momentum, in [0, 1).
        weight_decay: Coupled weight decay, >= 0.
        gamma: As in `AdaTAMW`, like all that follow.
        damping_eps: See `AdaTAMW`.
        scope: See `AdaTAMW`.
        step_size: "sgd" or "paper".
        torque_steps: See `AdaTAMW`.
        nonfinite: See `AdaTAMW`.
        max_grad_norm: See `AdaTAMW`.
        param_correction: See `AdaTAMW`.
        state_bits: See `AdaTAMW`.
        maximize: Ascend instead of descend.
        foreach: Use the multi-tensor backend. None: on accelerators without Triton kernels; the CPU uses torch's
            fused SGD kernel.

    Raises:
        ValueError: A hyperparameter is out of range.

    References:
        Torque-Aware Momentum, https://arxiv.org/abs/2412.18790
    """

    step_sizes = MOMENTUM_STEP_SIZES
    family: ClassVar[Family] = Family("TAM", ("momentum_buffer",), ("step", "torque"), True, sgd_numbers)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        gamma: float = 0.9,
        damping_eps: float = 1e-8,
        scope: Scope = "tensor",
        step_size: Literal["sgd", "paper"] = "sgd",
        torque_steps: int | None = None,
        nonfinite: Nonfinite = "skip",
        max_grad_norm: float | None = None,
        param_correction: Literal["bits16"] | None = None,
        state_bits: Literal[32] | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        """See the class."""
        arguments = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, {**arguments, "fused": None, "capturable": False})
