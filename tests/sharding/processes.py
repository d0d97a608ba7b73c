"""Starts a world of gloo processes once and runs many cases in it; every wait is bounded and every child is reaped.

A world in which anything went wrong is started anew for its next case: one crash costs one test.
"""

import contextlib
import datetime
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback

TIMEOUT_S = 400
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
OUTLIVING_S = 20
"""What the others get when a rank has died or raised: they notice at once, unless the machine is busy."""
ENDING_S = 20
MOST_CHARACTERS = 6000
"""Of what a lost rank wrote to stderr, in an error."""


class World:
    """`size` processes that run functions together, one after the other.

    Args:
        size: How many.
        folder: Where they meet and leave what they write to stderr; an empty one for each world.
        timeout_s: How long a collective waits.
        task_timeout_s: How long a case may take.

    Attributes:
        processes: Those that run now, in the order of the ranks.
        starts: How often they were started.
    """

    def __init__(self, size, folder, *, timeout_s=120, task_timeout_s=TIMEOUT_S):
        os.environ["OMP_NUM_THREADS"] = "1"  # of the children; read when they import torch
        os.environ["DS_ACCELERATOR"] = "cpu"  # and when they import DeepSpeed
        self.size, self.folder, self.timeout_s, self.task_timeout_s = size, folder, timeout_s, task_timeout_s
        self.starts = 0
        self._start()

    def _start(self):
        self.starts += 1
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        store = os.path.join(self.folder, f"store{self.starts}")
        self._logs = [os.path.join(self.folder, f"stderr{self.starts}-{rank}") for rank in range(self.size)]
        # A pipe for each rank, and no queue for all of them: who is killed while it writes to a queue keeps its lock.
        self._connections, theirs = zip(*(context.Pipe() for _ in range(self.size)), strict=True)
        self.processes = [
            context.Process(
                target=_serve,
                args=(rank, self.size, store, self.timeout_s, self._logs[rank], theirs[rank]),
                daemon=True,
            )
            for rank in range(self.size)
        ]
        for process, connection in zip(self.processes, theirs, strict=True):
            process.start()
            connection.close()  # so that the process has the only one, and its end is the end of the pipe
        self._is_sound = True

    def run(self, function, *args):
        """Call `function(*args)` on every rank and return the results in the order of the ranks.

        After an error the processes are other ones in the next call: the ranks that have gone on may still wait in a
        collective, and an answer that comes late would be taken for that of the next case.

        Raises:
            AssertionError: A rank raised; the message has its traceback. Or it died, or no answer came in time; the
                message says of which signal, and has what it wrote to stderr, its Python stack included.
        """
        if not self._is_sound:
            self.kill()
            self._start()
        self._is_sound = False
        written = [_size_of(log) for log in self._logs]
        answers = self._collect(function, args, outliving_s=OUTLIVING_S)
        raised = [f"rank {rank}:\n{answer[1]}" for rank, answer in sorted(answers.items()) if answer and answer[1]]
        hanging = [rank for rank in range(self.size) if rank not in answers]
        died = sorted(rank for rank, answer in answers.items() if answer is None)
        ends = self._ends_of(died, hanging) if died or hanging else {}
        lost = {rank: f"rank {rank} {end}:\n{_read(self._logs[rank], written[rank])}" for rank, end in ends.items()}
        # The likely cause first.
        errors = [*(lost[rank] for rank in died), *raised, *(lost[rank] for rank in hanging)]
        assert not errors, "\n".join(errors)
        self._is_sound = True
        return [answers[rank][0] for rank in range(self.size)]

    def answers(self, function, *args, at_most=None):
        """Call `function(*args)` on every rank: what each returned and the traceback of what it raised, by rank.

        A rank that dies instead of answering, or does not answer in time, is left out; with `at_most` so many answers
        are waited for.
        """
        answers = self._collect(function, args, at_most=at_most)
        return {rank: answer for rank, answer in answers.items() if answer is not None}

    def _collect(self, function, args, *, at_most=None, outliving_s=None):
        """The answers by rank, None for those that died; who hangs is left out.

        Once a rank has died or raised, the others are given `outliving_s` at the longest, if that is not None.
        """
        for connection in self._connections:
            with contextlib.suppress(OSError):  # of one that is dead, which is found below
                connection.send((function, args))
        answers, num_alive = {}, 0
        deadline = time.monotonic() + self.task_timeout_s
        while (awaited := [rank for rank in range(self.size) if rank not in answers]) and num_alive != at_most:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            ends = {rank: (self._connections[rank], self.processes[rank].sentinel) for rank in awaited}
            ready = multiprocessing.connection.wait([end for pair in ends.values() for end in pair], left)
            for rank, (connection, sentinel) in ends.items():
                if connection in ready or sentinel in ready:
                    answers[rank] = _received(connection)
                    num_alive += answers[rank] is not None
                    if outliving_s is not None and (answers[rank] is None or answers[rank][1]):
                        deadline = min(deadline, time.monotonic() + outliving_s)
        return answers

    def _ends_of(self, died, hanging):
        """How each of these ranks ended; those that hang write where they are. The whole world is ended."""
        for rank in hanging:
            with contextlib.suppress(ProcessLookupError):  # it has died since
                os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(1 if hanging else 0)
        for rank in died:
            self.processes[rank].join(ENDING_S)
        ends = {rank: _end_of(self.processes[rank]) for rank in (*died, *hanging)}
        self.kill()
        return ends

    def close(self):
        """End and reap every process."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process in self.processes:
            process.join(ENDING_S)
        self.kill()

    def kill(self):
        """End and reap every process without asking, where some are dead and the others may wait for them."""
        for process in self.processes:
            process.kill()
        for process, connection in zip(self.processes, self._connections, strict=True):
            process.join(ENDING_S)
            connection.close()
        self._is_sound = False


def _received(connection):
    """What a rank has sent, if only before it died; None if that is nothing."""
    try:
        return connection.recv() if connection.poll() else None
    except (EOFError, OSError):
        return None


def _end_of(process):
    code = process.exitcode
    if code is None:
        return "gave no answer in time, and is here"
    if code >= 0:
        return f"ended with exit status {code}"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:  # one of the real-time signals, which have no names of their own
        return f"died of signal {-code}"


def _size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def _read(path, start):
    """What was written to a file after its first `start` bytes; the end of it where it is long."""
    if not os.path.exists(path):
        return ""
    with open(path, "rb") as stream:
        stream.seek(start)
        lines = stream.read().decode(errors="replace").splitlines()
    # faulthandler ends with the names of more than a hundred modules, in one line that is longer than the stacks.
    return "\n".join(line for line in lines if not line.startswith("Extension modules: "))[-MOST_CHARACTERS:]


def _serve(rank, size, store, timeout_s, log, connection):
    with open(log, "wb") as stream:
        os.dup2(stream.fileno(), 2)  # with what glibc and the libraries write
    faulthandler.enable(sys.__stderr__)
    faulthandler.register(signal.SIGUSR1, sys.__stderr__)
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
    while (task := _next_task(connection)) is not None:
        function, args = task
        try:
            connection.send((function(*args), None))
        except BaseException:
            connection.send((None, traceback.format_exc()))
    torch.distributed.destroy_process_group()


def _next_task(connection):
    try:
        return connection.recv()
    except EOFError:  # whoever gave the tasks is gone
        return None
