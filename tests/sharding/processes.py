"""Starts a world of gloo processes once and runs many cases in it; every wait is bounded and every child is reaped."""

import datetime
import multiprocessing
import os
import queue
import time
import traceback

TIMEOUT_S = 240
PRELOADED = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "hf_tam.optim",
    "peft",
    "pytest",
    "deepspeed",
]
"""Imported once, by the server that all processes are forked from: importing them takes seconds, forking does not."""


class World:
    """`size` processes that run functions together, one after the other.

    Args:
        size: How many.
        folder: Where they meet; an empty one for each world.
        timeout_s: How long a collective waits.
    """

    def __init__(self, size, folder, *, timeout_s=60):
        os.environ["OMP_NUM_THREADS"] = "1"  # of the children; read when they import torch
        os.environ["DS_ACCELERATOR"] = "cpu"  # and when they import DeepSpeed
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.tasks = [context.Queue() for _ in range(size)]
        self.results = context.Queue()
        store = os.path.join(folder, "store")
        self.processes = [
            context.Process(
                target=_serve, args=(rank, size, store, timeout_s, self.tasks[rank], self.results), daemon=True
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, *args):
        """Call `function(*args)` on every rank and return the results in the order of the ranks.

        Raises:
            AssertionError: A rank raised; the message has its traceback. Or no answer came in time.
        """
        answers = self.answers(function, *args)
        errors = [f"rank {rank}:\n{error}" for rank, (_, error) in sorted(answers.items()) if error]
        errors += [f"rank {rank} gave no answer" for rank in range(len(self.processes)) if rank not in answers]
        assert not errors, "\n".join(errors)
        return [answers[rank][0] for rank in sorted(answers)]

    def answers(self, function, *args, at_most=None):
        """Call `function(*args)` on every rank: what each returned and the traceback of what it raised, by rank.

        A rank that dies instead of answering, or does not answer in time, is left out; with `at_most` so many answers
        are waited for.
        """
        for tasks in self.tasks:
            tasks.put((function, args))
        answers = {}
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline and len(answers) < (at_most or len(self.processes)):
            awaited = [rank for rank in range(len(self.processes)) if rank not in answers]
            alive = any(self.processes[rank].is_alive() for rank in awaited)
            try:
                rank, result, error = self.results.get(timeout=1)
            except queue.Empty:
                if not alive:
                    break
                continue
            answers[rank] = (result, error)
        return answers

    def close(self):
        """End and reap every process."""
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()

    def kill(self):
        """End and reap every process without asking, where some are dead and the others may wait for them."""
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank, size, store, timeout_s, tasks, results):
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}  # DeepSpeed asks for them
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            results.put((rank, function(*args), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
    torch.distributed.destroy_process_group()
