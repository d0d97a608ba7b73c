"""Makes `--optim adatamw`, `adatam` and `tam` known to transformers, and gives its Trainer what these optimizers need.

transformers has no public hook for optimizer names. What is relied on: the enum `OptimizerNames`, the private table
`_OPTIMIZER_HANDLERS`, and the methods of TrainingArguments and Trainer that are named below; each is checked first.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from hf_tam.integrations.accelerate.checkpoint import exactly_loading
from hf_tam.integrations.accelerate.patches import refuse_flat_settings, refuse_strategy
from hf_tam.integrations.checkpoint_files import Strategy, invalidate
from hf_tam.integrations.deepspeed.config import prevent_optimizer_swap
from hf_tam.integrations.peft import find_wrapped_adapters
from hf_tam.integrations.switches import ANNOUNCE_VARIABLE
from hf_tam.integrations.transformers.asked_for import refuse_to_be_left_aside, warn_of_another_optimizer
from hf_tam.integrations.transformers.checkpoint import (
    CHECKSUM_FILE,
    refuse_other_optimizer,
    refuse_our_state,
    require_resumable,
    write_checksums,
)
from hf_tam.integrations.transformers.clipping import prepare_clipping, take_over_clipping
from hf_tam.integrations.transformers.loss_count import warn_of_dropped_count
from hf_tam.integrations.transformers.optim_args import format_optim_args, parse_optim_args
from hf_tam.integrations.transformers.optimizer_names import OPTIMIZERS, add_member, constructor_kwargs, unusable
from hf_tam.integrations.transformers.tensor_parallel import refuse_plain_shards
from hf_tam.integrations.wrapped import find_ours

ACCEPTED_RANGE = ">=5.2,<6"

logger = logging.getLogger("hf_tam")

# What happened in this process: the names that are ours here, and what was patched, for `hf-tam status`.
registered_names: list[str] = []
patched: list[str] = []


def register(module: ModuleType) -> None:
    """Patch one freshly imported module of transformers.

    Args:
        module: `transformers.training_args`, `transformers.trainer_optimizer` or `transformers.trainer`.

    Raises:
        ImportError: If it lacks a name that is relied on; says which, and the range of versions that was tested.
    """
    _STEPS[module.__name__](module)


def optimizer_class_and_kwargs(args: Any) -> tuple[type, dict[str, Any]]:
    """Translate training arguments into one of our classes and what its constructor takes, as a Trainer needs them.

    Args:
        args: TrainingArguments whose `optim` is one of ours. `optim_args` win over `adam_beta1`, `adam_beta2` and
            `adam_epsilon`; TAM takes its `momentum` from `optim_args` only, as transformers' own "sgd" does.

    Raises:
        ValueError: If `optim_args` is malformed.
    """
    from hf_tam import optim

    return getattr(optim, OPTIMIZERS[args.optim]), constructor_kwargs(args)


def check_arguments(args: Any) -> None:
    """Check everything that can be checked about one of our optimizers before a model is loaded; pass over the others.

    Changes `args.optim` to a plain string, so that a pickle of the arguments loads where hf_tam is not installed, and
    writes `args.optim_args` as transformers' own parser accepts them.

    Raises:
        ValueError: If `optim_args`, or a value that the optimizer takes from the arguments, is not acceptable, or if
            DeepSpeed would replace the optimizer, or FSDP1 flatten the parameters.
    """
    if args.optim not in registered_names:
        return
    args.optim = str.__str__(args.optim)
    args.optim_args = format_optim_args(parse_optim_args(args.optim, args.optim_args))
    _try_constructor(args)
    prevent_optimizer_swap(args.deepspeed_plugin, _asked_for(args))
    refuse_flat_settings(args.fsdp_plugin_args)


def _asked_for(args: Any) -> dict[str, Any]:
    """What the training arguments say of an optimizer, as the "optimizer" block of a DeepSpeed file names it."""
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }


def _try_constructor(args: Any) -> None:
    import torch

    optimizer_class, kwargs = optimizer_class_and_kwargs(args)
    for depends_on_device in ("foreach", "fused", "capturable"):
        kwargs.pop(depends_on_device, None)  # the parameter below is on the CPU
    try:
        optimizer_class([torch.nn.Parameter(torch.zeros(1))], **kwargs)
    except (TypeError, ValueError) as error:
        raise unusable(args, error) from error


def _extend_training_arguments(module: ModuleType) -> None:
    _require(module, "OptimizerNames", "TrainingArguments")
    _require(module.TrainingArguments, "__post_init__", "set_optimizer")
    if importlib.util.find_spec("transformers.trainer_optimizer") is None:
        raise _unsupported("transformers.trainer_optimizer")
    taken = {member.value for member in module.OptimizerNames}
    for name in OPTIMIZERS:
        if name in taken:
            _defer(name)
        else:
            add_member(module.OptimizerNames, name)
            registered_names.append(name)
    patched.append("OptimizerNames")
    # Both make an enum member of `optim`, which training_args.bin would hold (5.23, training_args.py).
    for method in ("__post_init__", "set_optimizer"):
        _wrap(module.TrainingArguments, method, after=lambda args, /, *_, **__: check_arguments(args))


def _add_handlers(module: ModuleType) -> None:
    _require(module, "_OPTIMIZER_HANDLERS")
    for name in list(registered_names):
        if name in module._OPTIMIZER_HANDLERS:
            registered_names.remove(name)
            _defer(name)
        else:
            module._OPTIMIZER_HANDLERS[name] = _handle
    patched.append("_OPTIMIZER_HANDLERS")


def _handle(context: Any) -> tuple[type, dict[str, Any]]:
    return optimizer_class_and_kwargs(context.args)


def _patch_trainer(module: ModuleType) -> None:
    trainer = module.Trainer
    _require(trainer, "create_optimizer", "get_optimizer_cls_and_kwargs", "train", "_get_output_dir")
    _require(trainer, "_save_checkpoint", "_save_optimizer_and_scheduler", "_save_rng_state")
    _require(trainer, "_load_optimizer_and_scheduler")
    _require(module, "load_fsdp_optimizer", "deepspeed_init", "CallbackHandler")
    select = trainer.get_optimizer_cls_and_kwargs

    @functools.wraps(select)
    def select_checked(args: Any, model: Any = None) -> Any:  # LLaMA-Factory asks without a model
        # Arguments may have been changed since they were checked, by a hyperparameter search for one.
        check_arguments(args)
        return select(args, model)

    trainer.get_optimizer_cls_and_kwargs = staticmethod(select_checked)
    patched.append("Trainer.get_optimizer_cls_and_kwargs")
    # Under FSDP1 and ZeRO only the module knows how its parameters are cut, and the optimizer must know the module.
    _wrap(trainer, "create_optimizer", after=_attach)
    _wrap(trainer, "train", before=_check_before_training)
    _wrap(trainer, "_save_checkpoint", before=_invalidate_checkpoint)
    _wrap(trainer, "_save_optimizer_and_scheduler", after=_save_checksums)
    _wrap(trainer, "_save_rng_state", after=_wait_for_everyone)
    _wrap(trainer, "_load_optimizer_and_scheduler", after=_refuse_misreading)
    _wrap(module.CallbackHandler, "on_train_begin", before=_compare_with_arguments)
    # transformers.trainer has imported it by name: what is patched in accelerate.accelerator does not reach it.
    module.load_fsdp_optimizer = exactly_loading(module.load_fsdp_optimizer)  # type: ignore[attr-defined]
    module.deepspeed_init = _keeping_ours(module.deepspeed_init)  # type: ignore[attr-defined]
    patched.extend(["load_fsdp_optimizer", "deepspeed_init"])
    patched.extend(take_over_clipping(trainer))
    _announce()


def uses_ours(trainer: Any) -> bool:
    """Whether a Trainer trains, or will train, with an optimizer of ours."""
    from hf_tam.torque_aware import TorqueAware

    if trainer.optimizer is not None:
        return find_ours(trainer.optimizer) is not None
    if trainer.optimizer_cls_and_kwargs is not None:
        optimizer_class = trainer.optimizer_cls_and_kwargs[0]
        return isinstance(optimizer_class, type) and issubclass(optimizer_class, TorqueAware)
    return trainer.args.optim in registered_names


def _attach(trainer: Any, model: Any = None) -> None:
    optimizer = find_ours(trainer.optimizer)
    if optimizer is not None:
        optimizer.attach(trainer.model if model is None else model)


def _prepare(trainer: Any) -> None:
    """Do what the keys of `optim_args` say that are for the Trainer."""
    from hf_tam.integrations.transformers.torque_callback import arrange_callbacks

    args = trainer.args
    given = parse_optim_args(args.optim, args.optim_args) if args.optim in registered_names else {}
    wanted = given.get("log_torque")
    arrange_callbacks(trainer.callback_handler.callbacks, wanted=None if wanted is None else bool(wanted))
    prepare_clipping(trainer, wanted=bool(given.get("fused_clip")))


def _check_before_training(trainer: Any, resume_from_checkpoint: Any = None, *_: Any, **__: Any) -> None:
    ours = uses_ours(trainer)
    _prepare(trainer)
    if ours:
        if trainer.is_deepspeed_enabled:
            refuse_to_be_left_aside(trainer.optimizer, optim=str.__str__(trainer.args.optim))
        prevent_optimizer_swap(getattr(trainer.accelerator.state, "deepspeed_plugin", None), _asked_for(trainer.args))
        refuse_strategy(trainer.accelerator)
        if trainer.model is not None:  # a search makes it later, and prepare looks again
            refuse_plain_shards(trainer.model)
        if trainer.is_fsdp_enabled and "peft" in sys.modules:
            find_wrapped_adapters()
        warn_of_dropped_count(trainer)
    if not resume_from_checkpoint:
        return
    from transformers.trainer_utils import get_last_checkpoint

    args = trainer.args
    checkpoint = get_last_checkpoint(args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
    if checkpoint is None:  # the Trainer says that there is none
        return
    if ours:
        require_resumable(
            checkpoint,
            strategy=_strategy(trainer),
            weights_only_wanted=args.save_only_model,
            world_size=args.world_size,
            deepspeed_config=trainer.accelerator.state.deepspeed_plugin.deepspeed_config
            if trainer.is_deepspeed_enabled
            else None,
        )
    else:
        refuse_other_optimizer(checkpoint, str.__str__(args.optim), _strategy(trainer))


def _keeping_ours(deepspeed_init: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what decides between --optim and an "optimizer" block: each trial of a search reads the file anew."""

    @functools.wraps(deepspeed_init)
    def wrapped(trainer: Any, num_training_steps: int, inference: bool = False) -> Any:
        if not inference and uses_ours(trainer):
            prevent_optimizer_swap(trainer.accelerator.state.deepspeed_plugin, _asked_for(trainer.args))
        return deepspeed_init(trainer, num_training_steps, inference=inference)

    return wrapped


def _refuse_misreading(trainer: Any, checkpoint: Any) -> None:
    """Also where a subclass makes another optimizer than its arguments name."""
    if checkpoint is not None:
        refuse_our_state(trainer.optimizer, checkpoint)


def _compare_with_arguments(handler: Any, args: Any, state: Any, *_: Any) -> None:
    """The callbacks are told which optimizer trains when all of it has been made, wrapped and loaded."""
    if args.optim not in registered_names or handler.optimizer is None or not state.is_world_process_zero:
        return
    expected, kwargs = optimizer_class_and_kwargs(args)
    given = {_CONSTRUCTORS_NAMES.get(key, key) for key in parse_optim_args(args.optim, args.optim_args)}
    warn_of_another_optimizer(
        handler.optimizer,
        optim=args.optim,
        expected=expected,
        given={key: value for key, value in kwargs.items() if key in given},
    )


_CONSTRUCTORS_NAMES = {"beta1": "betas", "beta2": "betas", "fused_clip": "max_grad_norm"}


def _strategy(trainer: Any) -> Strategy:
    if trainer.is_deepspeed_enabled:
        return "deepspeed"
    if not trainer.is_fsdp_enabled:
        return "whole"
    full = trainer.accelerator.state.fsdp_plugin.state_dict_type.name == "FULL_STATE_DICT"
    return "fsdp_full" if full else "fsdp_sharded"


def _invalidate_checkpoint(trainer: Any, model: Any = None, trial: Any = None) -> None:
    """A folder that is written a second time holds old and new files until the end."""
    if trainer.args.should_save:
        folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
        (folder / CHECKSUM_FILE).unlink(missing_ok=True)  # also where another optimizer's files come to lie there
        if uses_ours(trainer):
            invalidate(folder)


def _wait_for_everyone(trainer: Any, output_dir: str) -> None:
    """The state, by which a checkpoint is known to be complete, is written next, and by the first process alone."""
    if uses_ours(trainer):
        trainer.accelerator.wait_for_everyone()


def _save_checksums(trainer: Any, output_dir: str) -> None:
    if trainer.args.should_save and uses_ours(trainer):
        write_checksums(output_dir, _strategy(trainer))


def _wrap(
    owner: type, method: str, *, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None
) -> None:
    original = getattr(owner, method)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(self, *args, **kwargs)
        result = original(self, *args, **kwargs)
        if after is not None:
            after(self, *args, **kwargs)
        return result

    setattr(owner, method, wrapped)
    patched.append(f"{owner.__name__}.{method}")


def _require(owner: Any, *names: str) -> None:
    for name in names:
        if not hasattr(owner, name):
            raise _unsupported(f"{owner.__name__}.{name}")


def _unsupported(missing: str) -> ImportError:
    return ImportError(
        f"hf_tam cannot register its optimizers: transformers {version('transformers')} has no {missing}. "
        f"It is made for transformers{ACCEPTED_RANGE}: install one of those, or switch hf_tam off "
        "(no `import hf_tam`; HF_TAM_AUTOLOAD=0 where `hf-tam activate` was run)."
    )


def _defer(name: str) -> None:
    logger.warning(
        "--optim %s is already known to transformers %s, or to another plugin: hf_tam leaves it alone. "
        "Pass optimizer_cls_and_kwargs=(hf_tam.%s, {...}) to the Trainer to use hf_tam's.",
        name,
        version("transformers"),
        OPTIMIZERS[name],
    )


def _announce() -> None:
    """Say on the first rank what was registered: at INFO, and below our launchers so that it is seen, once."""
    if os.environ.get("RANK", "0") != "0":
        return
    names = ", ".join(f"--optim {name} ({OPTIMIZERS[name]})" for name in registered_names)
    line = f"hf_tam {version('hf_tam')} registered with transformers {version('transformers')}: {names or 'nothing'}"
    launched = os.environ.get(ANNOUNCE_VARIABLE) == "1"
    if launched:
        os.environ[ANNOUNCE_VARIABLE] = "0"  # the children of this process need not repeat it
    if launched and not logger.isEnabledFor(logging.INFO):
        logging.StreamHandler().emit(logging.makeLogRecord({"msg": line}))
    else:
        logger.info(line)


_STEPS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.training_args": _extend_training_arguments,
    "transformers.trainer_optimizer": _add_handlers,
    "transformers.trainer": _patch_trainer,
}
