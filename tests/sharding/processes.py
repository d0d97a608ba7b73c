"""Starts a world of gloo processes once and runs many cases in it; every wait is bounded and every child is reaped."""

import datetime
import multiprocessing
import os
import queue
import traceback

TIMEOUT_S = 240


class World:
    """`size` processes that run functions together, one after the other."""

    def __init__(self, size, folder):
        context = multiprocessing.get_context("spawn")
        self.tasks = [context.Queue() for _ in range(size)]
        self.results = context.Queue()
        store = os.path.join(folder, "store")
        self.processes = [
            context.Process(target=_serve, args=(rank, size, store, self.tasks[rank], self.results), daemon=True)
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, *args):
        """Call `function(*args)` on every rank and return the results in the order of the ranks.

        Raises:
            AssertionError: A rank raised; the message has its traceback. Or no answer came in time.
        """
        for tasks in self.tasks:
            tasks.put((function, args))
        answers = {}
        while len(answers) < len(self.processes):
            try:
                rank, result, error = self.results.get(timeout=TIMEOUT_S)
            except queue.Empty:
                raise AssertionError(
                    f"ranks {set(range(len(self.processes))) - set(answers)} gave no answer"
                ) from None
            answers[rank] = (result, error)
        errors = [f"rank {rank}:\n{error}" for rank, (_, error) in sorted(answers.items()) if error]
        assert not errors, "\n".join(errors)
        return [answers[rank][0] for rank in sorted(answers)]

    def close(self):
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(rank, size, store, tasks, results):
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}  # DeepSpeed asks for them
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            results.put((rank, function(*args), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
    torch.distributed.destroy_process_group()
