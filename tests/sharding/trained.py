"""A small model, and the training step that it takes unsharded and under each wrapper."""

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

import hf_tam

STEPS = 20
LEARNING_RATE = 0.02
CLIP = 0.5


class Model(nn.Module):
    """Dimensions that no world size divides, parameters smaller than the world, one that is used now and then."""

    def __init__(self, lora):
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.Linear(5, 12)
        # In the middle, so that flat buffers of two and of four ranks cut it, and some ranks hold none of it.
        self.adapter = nn.ParameterList([nn.Parameter(torch.randn(6, 5) / 2), nn.Parameter(torch.zeros(12, 6))])
        self.middle = nn.Linear(12, 12)
        self.down = nn.Linear(12, 3)
        self.gain = nn.Parameter(torch.ones(1))
        self.sometimes = nn.Parameter(torch.full((3, 7), 0.3))
        self.never = nn.Parameter(torch.ones(2, 2))
        if lora:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name.startswith("adapter"))

    def forward(self, inputs, step):
        hidden = torch.relu(self.up(inputs))
        hidden = self.middle(hidden) + inputs @ self.adapter[0].T @ self.adapter[1].T
        outputs = self.down(torch.tanh(hidden)) * self.gain
        return outputs + inputs[:, :3] * self.sometimes.sum() if step % 3 == 1 else outputs


def loss_of(outputs, batch):
    return (outputs - batch[:, :3].sin()).square().mean()


def make_optimizer(name, module, options, *, num_groups=1):
    """An optimizer of hf_tam for what is trained of `module`; with two groups the vectors get another decay."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if num_groups == 2:
        trained = [
            {"params": [parameter for parameter in trained if parameter.ndim > 1]},
            {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.01},
        ]
    optimizer = getattr(hf_tam, name)(trained, lr=LEARNING_RATE, **options)
    optimizer.attach(module)
    return optimizer


class Trained:
    """A module and its optimizer, and how they take a step together.

    Args:
        module: The model, wrapped or not.
        optimizer: Its optimizer.
        flat: Whether a missing gradient becomes zeros, as in a flat buffer.
        clip: Whether gradients are clipped.
        dtype: What forward and backward are computed in; by the wrapper, which is given inputs of it.

    Attributes:
        norm: The norm before clipping in the last step, where it was taken without a wrapper's help.
    """

    norm = None

    def __init__(self, module, optimizer, *, flat=False, clip=True, dtype=torch.float32):
        self.module, self.optimizer = module, optimizer
        self.flat, self.clip, self.dtype = flat, clip, dtype

    def step(self, batches, step, *, use, gradients=None):
        """One optimizer step over several batches (gradient accumulation), with a schedule and clipping.

        Args:
            batches: What to learn from.
            step: Counts the steps, for the schedule.
            use: Decides which parameters are used.
            gradients: Taken by name instead of those of `batches`.

        Returns:
            The gradients by name, whole, as the optimizer got them; None in fp32, where the twin has its own.
        """
        schedule(self.optimizer, step)
        self.optimizer.zero_grad()
        for name, parameter in self.module.named_parameters() if gradients is not None else ():
            parameter.grad = None if gradients[name] is None else gradients[name].to(parameter.dtype)
        for batch in batches.to(self.dtype) if gradients is None else ():
            (loss_of(self.module(batch, use), batch) / len(batches)).backward()
        for parameter in self.module.parameters():
            if self.flat and parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.clip and isinstance(self.module, FullyShardedDataParallel):
            self.module.clip_grad_norm_(CLIP)
        elif self.clip:
            self.norm = nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        whole = None if self.dtype == torch.float32 else self.whole_gradients()
        self.optimizer.step()
        return whole

    def whole_gradients(self):
        """Every gradient by name, None where there is none."""
        if isinstance(self.module, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(self.module, writeback=False, with_grads=True):
                return {name: copy_of(value.grad) for name, value in self.module.module.named_parameters()}
        return {
            name: copy_of(value.grad.full_tensor() if isinstance(value.grad, DTensor) else value.grad)
            for name, value in self.module.named_parameters()
        }

    def whole_parameters(self):
        """Every parameter by name, as the model defines it."""
        if isinstance(self.module, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(self.module, writeback=False):
                return {name: whole(value).detach().clone() for name, value in self.module.module.named_parameters()}
        return {name.removeprefix("module."): whole(value).detach() for name, value in self.module.named_parameters()}


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def copy_of(gradient):
    return None if gradient is None else gradient.detach().clone()


def schedule(optimizer, step):
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * (1 - step / STEPS)


def batches_of_steps():
    """The same batches in every run: two of six rows a step."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 6, 5, generator=generator) for _ in range(STEPS)]
