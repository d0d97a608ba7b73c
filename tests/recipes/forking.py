"""Starts Pythons by forking one that has imported everything: seven of the eight seconds of a short run are imports.

`ForkServer.run` runs a program in a fork of a server. What that program starts by `sys.executable`, as `accelerate
launch` does, is a fork too: there it names a client, which asks the same server and stands for the fork until it ends.
A server that died is started anew for the next program.
"""

import contextlib
import faulthandler
import importlib.util
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STARTING_S = 300
IMPORTED = ("torch", "accelerate.commands.launch", "recipes.sft", "deepspeed")
"""By the server, where they are installed."""

CLIENT = r"""#!{python} -SE
import json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
words = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(connection, [len(words).to_bytes(4, "big")], [1, 2])
connection.sendall(words)
replies = connection.makefile()
pid = int(replies.readline())
signal.signal(signal.SIGTERM, lambda number, frame: os.kill(pid, number))
status = replies.readline()
if not status:
    os.write(2, b"the fork ended without an exit status: a signal ended it, or the fork server is gone\n")
os._exit(int(status or 1))
"""


class ForkServer:
    """A Python that has imported everything, and runs programs in forks of itself.

    Args:
        folder: For its socket and its client.
        imported: The modules that it imports.
    """

    def __init__(self, folder, imported=IMPORTED):
        self.folder, self.imported = folder, imported
        self.client = Path(folder, "python")
        self._start()

    def _start(self):
        address = str(Path(self.folder, "socket"))
        Path(address).unlink(missing_ok=True)
        self.client.write_text(CLIENT.format(python=sys.executable, address=address))
        self.client.chmod(0o700)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        words = [sys.executable, "-m", "tests.recipes.forking", address, str(self.client), *self.imported]
        self.process = subprocess.Popen(words, env=environment, cwd=ROOT, start_new_session=True)
        deadline = time.monotonic() + STARTING_S
        while not os.path.exists(address):
            assert self.process.poll() is None, "the fork server ended"
            assert time.monotonic() < deadline, "the fork server did not start"
            time.sleep(0.05)

    def run(self, words, *, timeout, **environment):
        """Run `python *words` in a fork to its end.

        Returns:
            The completed process, with its output as text in `stdout`, errors included.

        Raises:
            AssertionError: It took too long, or the server died meanwhile.
        """
        if self.process.poll() is not None:
            self.close()  # its forks
            self._start()
        plain = {key: value for key, value in os.environ.items() if not key.startswith(("HF_TAM_", "ACCELERATE_"))}
        process = subprocess.Popen(
            [str(self.client), *map(str, words)],
            env={**plain, "OMP_NUM_THREADS": "1", **environment},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # Without its client a fork ends, and with it the clients of what it had started.
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"{words} took longer than {timeout} s; its output was:\n{output}") from None
        status = self.process.poll()
        assert status is None, f"the fork server ended with {status}; the output was:\n{output}"
        return subprocess.CompletedProcess(words, process.returncode, output)

    def close(self):
        """End it, and every fork with it."""
        with contextlib.suppress(ProcessLookupError):  # where it has ended, and all of them
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def serve(address, client, *imported):
    """Import everything, then run what clients ask for, each in a fork."""
    for module in imported:
        if importlib.util.find_spec(module.partition(".")[0]):
            importlib.import_module(module)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.starting")
    listener.listen()
    os.rename(f"{address}.starting", address)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            run_for_client(connection, client)
        connection.close()


def run_for_client(connection, client):
    """Run what the client was called with, as it would; does not return."""
    size, descriptors, _, _ = socket.recv_fds(connection, 4, 2)
    words, environment, folder = json.loads(connection.makefile("rb").read(int.from_bytes(size, "big")))
    for target, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, target)
    faulthandler.enable(sys.__stderr__)  # who dies of a signal writes where, into the output of the program
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.executable = client
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.sendall(f"{os.getpid()}\n".encode())
    threading.Thread(target=end_with_client, args=(connection,), daemon=True).start()
    code = run_program([word for word in words if word != "-u"])
    connection.sendall(f"{code}\n".encode())
    os._exit(code)


def end_with_client(connection):
    """Wait until the client is gone, which says nothing before, and end this process."""
    connection.recv(1)
    os._exit(1)


def run_program(words):
    """Run `python *words`; returns the exit status."""
    from tests.recipes import cpu_strategies

    # A launcher is run as a module, and what it launches is a script.
    reports = None if words[0] == "-m" else os.environ.get("STRATEGY_REPORTS")
    if reports:
        cpu_strategies.install()
    code = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, os.path.dirname(words[0])
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    if reports:
        cpu_strategies.write_report(reports)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve(*sys.argv[1:])
