"""A training script that has never heard of hf_tam, as users have them: started by the tests as a program of its own.

Trains a tiny Llama for a few steps and writes what the optimizer looked like, as JSON, to the output directory.
"""

import json
import os
from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


@dataclass
class ScriptArguments:
    rows: int = field(default=32)


class TokenRows(torch.utils.data.Dataset):
    def __init__(self, rows):
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randint(0, 64, (rows, 12), generator=generator)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Witness(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self.kind = f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__name__}"
        self.group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        self.steps.append([float(entry.get("torque", 0.0)) for entry in optimizer.state.values()])


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def main():
    script_args, args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    witness = Witness()
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=TokenRows(script_args.rows), callbacks=[witness])
    trainer.train()
    report = {
        "optimizer": witness.kind,
        "torques": witness.steps,
        "group": {key: value for key, value in witness.group.items() if not isinstance(value, torch.Tensor)},
        "world_size": args.world_size,
        "rank": args.process_index,
    }
    with open(os.path.join(args.output_dir, f"report-{args.process_index}.json"), "w") as file:
        json.dump(report, file)
    # Without this gloo's threads may outlive the interpreter, which then aborts: "terminate called without ...".
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
