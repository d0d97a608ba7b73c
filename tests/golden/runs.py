"""The runs that the golden checkpoints are of: what `make.py` saved halfway, and what the tests go on with."""

import json
from pathlib import Path

import torch
from torch import nn

import hf_tam

FOLDER = Path(__file__).parent
NUM_BEFORE, NUM_AFTER = 5, 3
# Twice the rounding of fp32 sums in another order, over three steps of lr 1e-2; other CPUs differ in the last bits.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}

# What is kept differs by these: the scope, decay, a frozen torque, the paper's form, bf16, groups, one element.
RUNS = {
    "adatamw": ("AdaTAMW", {"lr": 1e-2}),
    "adatamw-model": ("AdaTAMW", {"lr": 1e-2, "scope": "model", "max_grad_norm": 1.0}),
    "adatam": ("AdaTAM", {"lr": 1e-2, "weight_decay": 0.1, "torque_steps": 3}),
    "adatam-paper": ("AdaTAM", {"lr": 1e-3, "step_size": "paper"}),
    "tam": ("TAM", {"lr": 1e-2, "weight_decay": 0.1}),
    "tam-paper": ("TAM", {"lr": 1e-3, "step_size": "paper", "gamma": 0.5}),
}
SHAPES = ((4, 3), (5,), (), (1,), (2, 2, 2))


def start(run):
    """The parameters and the optimizer at the start of a run."""
    name, options = RUNS[run]
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    params.append(nn.Parameter(torch.randn(6, generator=generator).bfloat16()))
    groups = [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.05}]
    return params, getattr(hf_tam, name)(groups, **options)


def step(params, optimizer, number):
    """Step `number` of a run; the third parameter has no gradient in the first two."""
    generator = torch.Generator().manual_seed(100 + number)
    for index, param in enumerate(params):
        gradient = torch.randn(param.shape, generator=generator) + 0.5
        param.grad = None if index == 2 and number < 2 else gradient.to(param.dtype)
    optimizer.step()


class Small(nn.Module):
    """A model for a Trainer: a layer, a bias and a number."""

    def __init__(self):
        """Draw the weights, the same in every process."""
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.inner = nn.Linear(4, 3)
        self.outer = nn.Linear(3, 1)
        self.scale = nn.Parameter(torch.ones(()))
        for param in self.inner.weight, self.outer.weight:
            param.data.copy_(torch.randn(param.shape, generator=generator))

    def forward(self, inputs, labels):
        """The loss that a Trainer takes."""
        outputs = self.scale * self.outer(torch.tanh(self.inner(inputs))).squeeze(-1)
        return {"loss": (outputs - labels).square().mean()}


def records():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(32, 4, generator=generator)
    return [{"inputs": row, "labels": row.sum()} for row in inputs]


def trainer(output_dir, *, num_steps=NUM_BEFORE + NUM_AFTER):
    """A Trainer over `Small`, that saves after `NUM_BEFORE` steps."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(output_dir), optim="adatamw", optim_args="gamma=0.8", learning_rate=1e-2, weight_decay=0.1,
        max_steps=num_steps, per_device_train_batch_size=4, save_steps=NUM_BEFORE, logging_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, seed=5,
    )  # fmt: skip
    return Trainer(model=Small(), args=arguments, train_dataset=records())


def provenance():
    """Which versions wrote the files."""
    return json.loads((FOLDER / "provenance.json").read_text())
