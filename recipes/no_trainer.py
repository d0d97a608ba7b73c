"""Fine-tune a causal language model in a loop of your own, with accelerate: one file, to be copied and changed.

    python recipes/no_trainer.py --model_name_or_path FOLDER_OR_NAME --train_file train.jsonl --use_peft
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/no_trainer.py --model_name_or_path ...

A step's loss is the mean over all its target tokens, whichever batch and process they are in: 16 records make the same
step as 4 times 4, or as 8 on each of 2 processes. A resumed run ends with the bits of one that was never stopped.
"""

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers.hf_argparser import HfArg, HfArgumentParser

from hf_tam import AdaTAMW
from hf_tam.integrations.accelerate.checkpoint import last_complete_state
from hf_tam.integrations.peft import find_wrapped_adapters
from hf_tam.torque_log import TorqueFile, read_torque

IGNORED = -100  # the label of a token that is not learnt
MAY_CHANGE = {"output_dir", "resume_from_checkpoint", "logging_steps", "save_steps"}  # of a run that is resumed


@dataclass
class Arguments:
    """Names and meanings are those of TRL and transformers."""

    model_name_or_path: str = HfArg(help="Folder, or name on the hub.")
    train_file: str = HfArg(help="Records of messages, prompt and completion, or text: .jsonl, .json or .parquet.")
    validation_file: str | None = HfArg(default=None, help="Records to evaluate on; by default a tenth is held out.")
    max_length: int = HfArg(default=1024, help="Longest record in tokens; what is over is cut.")
    assistant_only_loss: bool = HfArg(default=False, help="Of a chat, learn what its template marks as generation.")
    dtype: str = HfArg(default="float32", help="Of the weights as they are loaded; an adapter's are float32.")
    use_peft: bool = HfArg(default=False, help="Train a LoRA adapter, not the whole model.")
    lora_r: int = HfArg(default=16, help="Rank of the adapter.")
    lora_alpha: int = HfArg(default=32, help="Scale of the adapter, times its rank.")
    lora_dropout: float = HfArg(default=0.0, help="Dropout in front of the adapter.")
    lora_target_modules: list[str] | None = HfArg(default=None, help="Default: all linear layers.")  # noqa: RUF009
    learning_rate: float = HfArg(default=2e-4, help="Peak learning rate; AdamW's carries over.")
    weight_decay: float = HfArg(default=0.0, help="Decoupled weight decay.")
    lr_scheduler_type: str = HfArg(default="linear", help="linear, cosine, constant_with_warmup, ...")
    warmup_steps: float = HfArg(default=0.05, help="Steps in which the rate rises; below 1: the share of all steps.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are clipped to this norm; 0: they are not.")
    num_train_epochs: float = HfArg(default=3.0, help="Passes over the records.")
    max_steps: int = HfArg(default=-1, help="Stop after this many steps, whatever num_train_epochs.")
    per_device_train_batch_size: int = HfArg(default=8, help="Records a process and pass through the model.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Passes through the model a step.")
    logging_steps: int = HfArg(default=10, help="Log every N steps.")
    save_steps: int | None = HfArg(default=None, help="Save the state every N steps, not every epoch; 0: never.")
    resume_from_checkpoint: str | None = HfArg(default=None, help="A checkpoint; auto: the newest, if there is one.")
    seed: int = HfArg(default=42, help="Of the adapter, the order of the records and dropout.")
    output_dir: str = HfArg(default="outputs/no_trainer", help="Where everything is written.")


(args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
size, accumulated, max_length = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.max_length
accelerator = Accelerator(gradient_accumulation_steps=accumulated, step_scheduler_with_optimizer=False)
is_main, is_deepspeed = accelerator.is_main_process, accelerator.distributed_type == "DEEPSPEED"
# Under tensor parallelism the processes work on the same records, else each on its share of them.
tp_size = accelerator.parallelism_config.tp_size if accelerator.parallelism_config else 1
num_shares, share = accelerator.num_processes // tp_size, accelerator.process_index // tp_size
transformers.set_seed(args.seed)
tokenizer = transformers.AutoTokenizer.from_pretrained(args.model_name_or_path, padding_side="right")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
collate, assistant_only = transformers.DataCollatorForSeq2Seq(tokenizer), args.assistant_only_loss


def encode(record: dict) -> dict[str, list[int]]:
    """Return the tokens of a record and their labels: of a pair the completion is learnt, of others everything."""
    if "messages" in record:
        turns = [{key: value for key, value in turn.items() if value is not None} for turn in record["messages"]]
        options = {"tools": record.get("tools"), "return_assistant_tokens_mask": assistant_only}
        chat = tokenizer.apply_chat_template(turns, return_dict=True, **options)
        ids, is_target = chat["input_ids"], chat.get("assistant_masks", [1] * len(chat["input_ids"]))
    else:
        prompt = tokenizer(record["prompt"])["input_ids"] if "prompt" in record else []
        text = record["completion" if "prompt" in record else "text"].removesuffix(tokenizer.eos_token)
        ids = [*prompt, *tokenizer(text, add_special_tokens=not prompt)["input_ids"], tokenizer.eos_token_id]
        is_target = [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    labels = [token if wanted else IGNORED for token, wanted in zip(ids, is_target, strict=True)]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


with accelerator.main_process_first():  # the others find its work in the cache
    files = {"train": args.train_file, "test": args.validation_file or args.train_file}
    splits = load_dataset(Path(args.train_file).suffix[1:].replace("jsonl", "json"), data_files=files)
    splits = splits if args.validation_file else splits["train"].train_test_split(0.1, seed=args.seed)
    encoded = splits.map(encode).select_columns(["input_ids", "labels"])
    kept = encoded.filter(lambda labels: max(labels[1:], default=IGNORED) != IGNORED, input_columns="labels")
accelerator.print(f"records: {encoded.num_rows}, with a target within {max_length} tokens: {kept.num_rows}")
records_a_step = size * accumulated * num_shares
steps_an_epoch = math.ceil(len(kept["train"]) / records_a_step)
num_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_an_epoch)
warmup_steps = math.ceil(args.warmup_steps * (num_steps if args.warmup_steps < 1 else 1))
if not num_steps or not all(kept.num_rows.values()):
    raise SystemExit(f"Nothing to learn, or to evaluate on: {num_steps} steps, {kept.num_rows} records.")

cut = {"distributed_config": transformers.DistributedConfig(tp_size=tp_size)} if tp_size > 1 else {}
model = transformers.AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype, **cut)
if args.use_peft:
    find_wrapped_adapters()
    options = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    targets = args.lora_target_modules or "all-linear"
    model = get_peft_model(model, LoraConfig(**options, target_modules=targets, task_type="CAUSAL_LM"))
trained = [param for param in model.parameters() if param.requires_grad]
frozen = [name for name, param in model.named_parameters(remove_duplicate=False) if not param.requires_grad]
optimizer = AdaTAMW(trained, lr=args.learning_rate, weight_decay=args.weight_decay)
scheduler = transformers.get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, num_steps)
if is_deepspeed:  # its engine clips, and is made before it sees a batch
    engine = {"gradient_clipping": args.max_grad_norm, "train_micro_batch_size_per_gpu": size}
    accelerator.state.deepspeed_plugin.deepspeed_config |= engine
model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
accelerator.register_save_state_pre_hook(  # leaves the frozen weights out; FSDP and DeepSpeed save by themselves
    lambda models, weights, folder: [state.pop(name) for state in weights for name in frozen]
)


def load_batch(data: Dataset, records: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """Return this process's share of some records as a batch, and what is to follow each of its tokens."""
    mine = records[share * size :][:size].tolist()
    batch = collate([data[i] for i in mine or records[:1].tolist()]).to(accelerator.device)
    labels = batch.pop("labels")[:, 1:]
    return batch, labels if mine else torch.full_like(labels, IGNORED)  # which all processes need as many of


def sum_losses(batch: dict, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of the losses of all targets."""
    logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")


step, checkpoint, output_dir = 0, args.resume_from_checkpoint, Path(args.output_dir)
settings = {**vars(args), "num_processes": accelerator.num_processes, "strategy": accelerator.distributed_type}
transformers.set_seed(args.seed + share)  # other records, other dropout
if checkpoint := last_complete_state(output_dir) if checkpoint == "auto" else checkpoint:
    saved = json.loads(Path(checkpoint, "settings.json").read_text())
    if others := {key: saved.get(key) for key in settings.keys() - MAY_CHANGE if settings[key] != saved.get(key)}:
        raise SystemExit(f"{checkpoint} is of a run with {others}: resume with these, or begin in another output_dir.")
    accelerator.load_state(checkpoint, **({"load_module_strict": False} if is_deepspeed else {"strict": False}))
    step = int(Path(checkpoint).name.rpartition("-")[2])
logs = {name: TorqueFile(output_dir / f"{name}.jsonl") for name in ("metrics", "torque")}
for file in logs.values() if is_main else ():
    file.begin(step=step)  # drops what was logged after the checkpoint

while step < num_steps:
    epoch, place = divmod(step, steps_an_epoch)
    order = torch.randperm(len(kept["train"]), generator=torch.Generator().manual_seed(args.seed + epoch))
    window = [load_batch(kept["train"], part) for part in order.split(records_a_step)[place].split(size * num_shares)]
    num_targets = accelerator.reduce(sum((labels != IGNORED).sum() for _, labels in window), "sum") / tp_size
    loss, learning_rate = 0.0, scheduler.get_last_lr()[0]
    for left, (batch, labels) in zip(reversed(range(len(window))), window, strict=True):
        accelerator.sync_gradients = left == 0
        with accelerator.no_sync(model) if left else nullcontext():
            part = sum_losses(batch, labels) / num_targets
            accelerator.backward(part * num_shares * accumulated)  # which accelerate and the wrapper divide by
        loss += part.detach()
    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    step += 1
    is_last, ends_epoch, values = step == num_steps, step % steps_an_epoch == 0, {}
    if is_last or step % args.logging_steps == 0:
        values = {"loss": float(accelerator.reduce(loss, "sum") / tp_size), "learning_rate": learning_rate}
    if is_last or ends_epoch:
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        with torch.no_grad():
            for part in torch.arange(len(kept["test"])).split(size * num_shares):
                batch, labels = load_batch(kept["test"], part)
                sums += torch.stack([sum_losses(batch, labels), (labels != IGNORED).sum()])
        model.train()
        values["eval_loss"] = float(torch.div(*accelerator.reduce(sums, "sum")))
    if not all(map(math.isfinite, values.values())):
        raise SystemExit(f"step {step}: {values}: training has diverged. Give a lower --learning_rate.")
    if values and is_main:
        torque, when = read_torque(optimizer), {"step": step, "epoch": step / steps_an_epoch}
        logs["torque"].append(torque.rows(**when))
        logs["metrics"].append([{**when, **values, **torque.summary()}])
        print({**when, **values, "damping": torque.summary()["torque/damping_mean"]}, flush=True)
    if args.save_steps != 0 and (is_last or step % (args.save_steps or steps_an_epoch) == 0):
        folder = output_dir / f"checkpoint-{step}"
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "settings.json").write_text(json.dumps(settings))
        accelerator.save_state(folder, **({"exclude_frozen_parameters": True} if is_deepspeed else {}))

state = None if tp_size > 1 else accelerator.get_state_dict(model)  # transformers collects what it has cut itself
if is_main or tp_size > 1:
    accelerator.unwrap_model(model).save_pretrained(output_dir, state_dict=state, is_main_process=is_main)
    transformers.AutoTokenizer.from_pretrained(args.model_name_or_path).save_pretrained(output_dir)
accelerator.end_training()
