"""What a run of sft.py and one of dpo.py do alike, before there is a trainer and after."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, set_seed

from recipes.support import (
    adapter_start,
    adapters,
    causal_demo,
    causal_model,
    chat,
    dry_run,
    early_stopping,
    generation,
    hub,
    init_options,
    merging,
    models,
    outcome,
    parallel,
    sft_report,
    training,
)
from recipes.support.arguments import DEMO
from recipes.support.checkpoints import wants_resume
from recipes.support.config import parse_recipe_arguments
from recipes.support.output import check_disk_space, naming_a_full_disk
from recipes.support.parsers import DEMO_CONFIGS
from recipes.support.reporting import warn

# TRL (1.16) sets both by the names that transformers (5.23) has replaced; nobody who runs a recipe can change that.
warnings.filterwarnings("ignore", message=r"`(is_)?gradient_checkpointing", category=FutureWarning)

Groups = tuple[Any, Any, Any, Any]


def parse(parser: Any, recipe: str, argv: list[str]) -> Groups:
    """Return the arguments: run, model, data and training. Where nothing was named they are the demo's."""
    is_merge = merging.names_finished_run(argv)
    groups = parse_recipe_arguments(parser, argv, demo_config=None if is_merge else DEMO_CONFIGS[recipe])
    init_options.take_over(groups[1], groups[3])
    return groups


def instead_of_training(groups: Groups) -> int | None:
    """Do what was asked for instead of training, if anything was; returns the exit status then."""
    run, of_model, _, arguments = groups
    if run.dry_run:
        return dry_run.report(groups)
    if merging.is_all_to_do(run, of_model, arguments):
        return merging.merge(Path(arguments.output_dir))
    return None


def prepare(groups: Groups) -> Path | None:
    """Check what can be checked before data and weights are read; return the checkpoint to resume from.

    Communication: barriers, with several processes.

    Raises:
        RecipeError: the run cannot start, and why.
    """
    run, of_model, _, arguments = groups
    adapter_start.check(of_model)
    early_stopping.check_early_stopping(run, arguments)
    resume_from = training.check_run(*groups)
    # The evaluation before the first step is in the log of the run that is continued.
    arguments.eval_on_start = arguments.eval_on_start and resume_from is None
    return resume_from


def load_tokenizer(groups: Groups) -> Any:
    """Load the tokenizer of the model, with the chat template and the end of text that were asked for.

    Raises:
        RecipeError: no model was named, it cannot be loaded, or has no such token.
    """
    _, of_model, _, arguments = groups
    if of_model.model_name_or_path == DEMO:
        of_model.model_name_or_path = prepare_demo_model(arguments)
    if of_model.model_name_or_path or of_model.adapter_name_or_path:
        causal_model.resolve(of_model, arguments)
    tokenizer = causal_model.load_tokenizer(of_model)
    chat.adjust(tokenizer, eos_token=getattr(arguments, "eos_token", None), template=_chat_template(arguments))
    return tokenizer


def load_model(groups: Groups) -> Any:
    """Load the model, without a new adapter."""
    _, of_model, _, arguments = groups
    set_seed(arguments.seed)
    saves_state = arguments.save_strategy != "no" and not arguments.save_only_model
    with init_options.naming_them(arguments) as options:
        return causal_model.load(of_model, saves_state=saves_state, options=options)


def load_base(groups: Groups) -> Any:
    """Load the model once more as it was before it was trained or got an adapter."""
    _, of_model, _, arguments = groups
    with init_options.naming_them(arguments) as options:
        return models.load_model(AutoModelForCausalLM, of_model, quantize=of_model.has_adapter, **options)


def add_adapter(model: Any, groups: Groups) -> tuple[Any, tuple[int, int]]:
    """Return the model with its adapter, and how many parameters are trained and how many there are.

    Raises:
        RecipeError: the model has no layer of the names given, or its checkpoints do not fit on the disk.
    """
    _, of_model, _, arguments = groups
    model = causal_model.add_adapter(model, of_model)
    check_disk_space(Path(arguments.output_dir), model, full=not isinstance(model, PeftModel))
    return model, models.count_parameters(model)


def make_trainer(kind: Callable[..., Trainer], model: Any, groups: Groups, **options: Any) -> Any:
    """Return a trainer of TRL's, which stops early and scales the learning rates of an adapter if asked to."""
    run, of_model, _, arguments = groups
    _leave_routers_alone(model, arguments)
    # TRL would take them for a model that it is to load itself.
    of_loading, arguments.model_init_kwargs = arguments.model_init_kwargs, None
    with hub.naming_the_hub(arguments, remedy="log in by `hf auth login`, or drop push_to_hub"):
        trainer = kind(model=model, args=arguments, **options)
    arguments.model_init_kwargs = of_loading
    parallel.keep_all_copies(trainer.accelerator)
    trainer.gather_function = trainer.accelerator.gather_for_metrics
    if parallel.is_tensor_parallel(trainer.accelerator):
        # A signal still writes a checkpoint; the Trainer cannot put the optimizer into it.
        trainer.args.save_only_model = True
    adapters.use_loraplus(trainer, of_model)
    early_stopping.use_early_stopping(trainer, run)
    return trainer


def train(
    trainer: Any,
    groups: Groups,
    *,
    recipe: str,
    resume_from: Path | None,
    prompts: list[list[int]],
    evaluate: Callable[[], dict[str, float]],
    sizes: tuple[int, int],
    num_records: int,
    source: str,
    started: float,
) -> int:
    """Train, evaluate, save, and say what came of it.

    Args:
        trainer: before training.
        groups: the arguments.
        recipe: name of the script.
        resume_from: checkpoint, if any.
        prompts: token ids that the model completes before and after training.
        evaluate: measures the result, and returns what was measured before and after.
        sizes: numbers of parameters, trained and all.
        num_records: that were trained on.
        source: of the records.
        started: when the script was.

    Returns:
        The exit status.
    """
    run, of_model, _, arguments = groups
    output_dir, tokenizer = Path(arguments.output_dir), trainer.processing_class
    samples = {"prompts": [tokenizer.decode(prompt) for prompt in prompts]}
    adapter_start.begin(trainer, of_model, resumes=resume_from is not None)
    samples["before"] = generation.complete(trainer.model, tokenizer, prompts)
    metrics = training.train(trainer, run, resume_from=resume_from)
    outcome.require_learning(trainer)
    metrics |= evaluate()
    outcome.require_numbers(metrics)
    samples["after"] = generation.complete(trainer.model, tokenizer, prompts)
    seconds = time.perf_counter() - started
    facts = training.describe_run(trainer, sizes, seconds=seconds, num_records=num_records)
    with naming_a_full_disk(output_dir):
        _save(trainer, facts, metrics, groups, source=source)
        if trainer.is_world_process_zero():
            sft_report.report(recipe, output_dir, facts, metrics, samples, groups)
    is_main = trainer.is_world_process_zero()
    parallel.leave_group(trainer.accelerator)
    return merging.merge(output_dir) if run.merge and is_main else 0


def _leave_routers_alone(model: Any, arguments: Any) -> None:
    """Keep TRL (1.16) from a loss of routers that it cannot compute: of `num_experts`, which Granite does not have."""
    config = model.config.get_text_config()
    if not hasattr(config, "output_router_logits") or hasattr(config, "num_experts"):
        return
    if arguments.router_aux_loss_coef is None:
        arguments.router_aux_loss_coef = 0.0
        if getattr(config, "num_local_experts", 0):
            warn(f"{type(model).__name__}: TRL cannot compute the loss that balances its experts: it is left out")


def _chat_template(arguments: Any) -> str | None:
    """Take `chat_template_path` away from TRL, which would resize a model that has its adapter by then."""
    name = getattr(arguments, "chat_template_path", None)
    if name is not None:
        arguments.chat_template_path = None
    return name


def prepare_demo_model(arguments: Any) -> str:
    """Pretrain the demo model into output_dir/base, on one process of each machine; a resumed run keeps the one there.

    Communication: a barrier, with several processes.
    """
    base, state = Path(arguments.output_dir) / causal_model.BASE_NAME, PartialState()
    keep = wants_resume(arguments.resume_from_checkpoint)
    with state.local_main_process_first():
        if state.is_local_main_process and not (keep and base.is_dir()):
            causal_demo.build_base(base, show_progress=not arguments.disable_tqdm)
    return str(base)


def _save(trainer: Any, facts: dict[str, Any], metrics: dict[str, float], groups: Groups, *, source: str) -> None:
    """Save the result with its model card, and push it if asked to.

    Communication: under FSDP and ZeRO-3 every process takes part, to bring the pieces together.

    Raises:
        RecipeError: the adapter that was saved is empty, or the hub does not take it.
    """
    output_dir = Path(trainer.args.output_dir)
    causal_model.drop_reference(trainer.accelerator.unwrap_model(trainer.model))

    def write_card() -> None:
        hub.write_model_card(output_dir, facts, metrics, groups, source=source)

    hub.use_model_card(trainer, write_card)
    with hub.naming_the_hub(trainer.args, remedy=f"the result is in {output_dir}; `hf upload` takes a folder"):
        training.save_model(trainer)
    if trainer.is_world_process_zero():
        _save_for_the_base(trainer, groups)
        # peft leaves out where generation ends, which may have been added to.
        trainer.accelerator.unwrap_model(trainer.model).generation_config.save_pretrained(output_dir)
        write_card()  # peft has written one beside the adapter


def _save_for_the_base(trainer: Any, groups: Groups) -> None:
    """Save an adapter for the base as it was; where that, or a merge, makes another of it, compare what it says.

    On one process, which holds every weight or compares nothing.

    Raises:
        RecipeError: what was saved does not say what was trained.
    """
    run, of_model, _, arguments = groups
    is_cut = not parallel.is_whole(trainer.accelerator) or parallel.is_tensor_parallel(trainer.accelerator)
    if is_cut or not (adapter_start.is_converted(of_model) or run.merge):
        return
    # Below the wrapper that rounds as training does.
    trained = merging.logits(trainer.accelerator.unwrap_model(trainer.model).base_model, trainer.processing_class)
    adapter_start.save_for_the_base_alone(trainer, of_model)
    merging.require_saved(load_base(groups), Path(arguments.output_dir), trainer.processing_class, trained)
