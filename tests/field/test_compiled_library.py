"""What is executed from the cache, and a step in the surroundings that a compiler may have.

The compiler is a script here, which writes what the real one has written once: tests that compile would be slow.
"""

import ctypes
import errno
import hashlib
import os
import platform
import pwd
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

import hf_tam
from hf_tam.backends import native, select_backend, torch_fused
from hf_tam.backends.native import library, private
from hf_tam.cli import status

pytestmark = pytest.mark.skipif(not native.is_available(), reason=f"the kernels are not there: {native.why_not()}")
IS_ROOT = os.geteuid() == 0
ANOTHER = 12345
"""A user."""
OF_WHOM = [
    "as the kernel says",
    pytest.param("really", marks=pytest.mark.skipif(not IS_ROOT, reason="chown is root's")),
]


@pytest.fixture(scope="module")
def shared_objects(tmp_path_factory):
    """`good`: the library. `planted`, with its functions: says `PLANTED` to whoever loads it. `deadly`: ends him.
    `empty`: has none of the functions."""
    folder = tmp_path_factory.mktemp("shared_objects")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        library._load.cache_clear()
        assert library.load() is not None
        library._load.cache_clear()
    (good,) = (folder / "hf_tam").iterdir()
    names = ("sums", "step", "adam", "sgd")
    functions = "".join(f"void hf_tam_{name}(void) {{}}\n" for name in names)
    start = "__attribute__((constructor)) static void start(void)"
    sources = {
        "planted": f'#include <stdlib.h>\n{functions}{start} {{ setenv("PLANTED", "1", 1); }}',
        "deadly": f"#include <unistd.h>\n{functions}{start} {{ _exit(3); }}",
        "empty": "int nothing;",
    }
    for name, source in sources.items():
        (folder / f"{name}.c").write_text(source)
        command = [*library._compiler(), "-shared", "-fPIC", f"{folder / name}.c", "-o", f"{folder / name}.so"]
        subprocess.run(command, check=True, timeout=120)
    return {"good": good, **{name: folder / f"{name}.so" for name in sources}}


class Process:
    """One that has not looked for the kernels yet, with a cache and a compiler of its own."""

    def __init__(self, folder, shared_objects, monkeypatch):
        self.folder, self.shared_objects, self.monkeypatch = folder, shared_objects, monkeypatch
        self.cache = folder / "cache" / "hf_tam"
        self.use(self.compiler("write {good}"))

    def compiler(self, body, name="cc"):
        """A script that does `body` for a compilation to `$out`, and counts how often it is run."""
        path = self.folder / name
        objects = {key: shlex.quote(str(path)) for key, path in self.shared_objects.items()}
        prelude = f"""#!/bin/sh
            echo >> {self.folder}/runs
            all="$*"
            while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done
            write() {{ cp "$1" "$out"; }}
            """
        path.write_text(prelude + body.format(**objects))
        path.chmod(0o700)
        return path

    def use(self, compiler):
        self.monkeypatch.setenv("CC", str(compiler))
        self.begin_anew()

    @staticmethod
    def begin_anew():
        library._load.cache_clear()

    @property
    def compilations(self):
        runs = self.folder / "runs"
        return len(runs.read_text()) if runs.exists() else 0

    @property
    def kept(self):
        (path,) = self.cache.iterdir()
        return path

    def plant(self):
        """In the place of the library that was kept, one that is named by its own digest."""
        assert library.load() is not None
        self.begin_anew()
        kept = self.kept
        content = self.shared_objects["planted"].read_bytes()
        path = kept.with_name(f"{kept.stem.rpartition('-')[0]}-{hashlib.sha256(content).hexdigest()}.so")
        self.replace(kept, content)
        return kept.rename(path)

    @staticmethod
    def replace(path, content):
        """By another file: this process may have loaded what is there."""
        path.unlink()
        path.write_bytes(content)
        path.chmod(0o700)

    def give_away(self, path, how):
        """Let a file or folder belong to another user."""
        if how == "really":
            os.chown(path, ANOTHER, -1)
            return
        fstat, target = os.fstat, os.stat(path)

        def of_another(descriptor):
            found = fstat(descriptor)
            if os.path.samestat(found, target):
                return os.stat_result([*found[: stat.ST_UID], ANOTHER, *found[stat.ST_UID + 1 : 10]])
            return found

        self.monkeypatch.setattr(os, "fstat", of_another)


@pytest.fixture
def process(tmp_path, shared_objects, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(library.SWITCH, raising=False)
    yield Process(tmp_path, shared_objects, monkeypatch)
    library._load.cache_clear()


def _getenv(name):
    """What the C library has: os.environ is a copy."""
    function = ctypes.CDLL(None).getenv
    function.restype = ctypes.c_char_p
    return function(name)


@pytest.fixture(autouse=True)
def nothing_planted_runs():
    yield
    assert _getenv(b"PLANTED") is None


def step():
    """The backend that has taken the step, which is AdamW's where the torque is held at 0."""
    results = []
    for cls, options in ((torch.optim.AdamW, {}), (hf_tam.AdaTAMW, {"gamma": 1.0, "damping_eps": 0.0})):
        parameter = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 300))
        parameter.grad = torch.linspace(2.0, -3.0, 300)
        cls([parameter], lr=1e-2, **options).step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results)
    return select_backend(torch.device("cpu"), foreach=None, fused=None, on_host=True)


def refuse(number):
    def refusal(*_, **__):
        raise OSError(number, os.strerror(number))

    return refusal


# --- a library that somebody else may have put there is not executed ------------------------------------------------


@pytest.mark.long
def test_planted_libraries_would_run(process):
    """What the others rest on: in a folder of the user's own, the name and the digest are enough."""
    process.plant()
    assert library.load() is not None
    assert _getenv(b"PLANTED") == b"1"
    ctypes.CDLL(None).unsetenv(b"PLANTED")


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702], ids=oct)
def test_folder_that_others_can_write_to(process, mode):
    process.plant()
    process.cache.chmod(mode)
    assert step() is native
    assert library.why_not_kept() == (
        f"others can write to {process.cache} (mode {mode:o}); chmod go-w {process.cache}"
    )
    assert status._backend() == f"native (device: cpu; compiled for this process only: {library.why_not_kept()})"


@pytest.mark.parametrize("above", [0o700, 0o777], ids=oct)
def test_file_that_others_can_write_to(process, above):
    path = process.plant()
    path.chmod(0o720)
    process.cache.parent.chmod(above)
    assert step() is native
    assert library.why_not_kept() == f"others can write to {path} (mode 720); delete it"


@pytest.mark.parametrize("how", OF_WHOM)
@pytest.mark.parametrize("what", ["folder", "file"])
def test_of_another_user(process, what, how):
    path = process.plant()
    given = path if what == "file" else process.cache
    process.give_away(given, how)
    assert step() is native
    assert library.why_not_kept().startswith(f"{given} belongs to user {ANOTHER}, and this is user {os.geteuid()}; ")


def test_folder_that_is_a_link(process):
    process.plant()
    elsewhere = process.cache.with_name("elsewhere")
    process.cache.rename(elsewhere)
    process.cache.symlink_to(elsewhere)
    assert step() is native
    assert library.why_not_kept().startswith(f"{process.cache} is a symbolic link; ")


def test_home_that_is_a_link(process, monkeypatch):
    """As on clusters whose homes are small: what counts is where it leads."""
    link = process.folder / "link"
    (process.folder / "scratch").mkdir()
    link.symlink_to(process.folder / "scratch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(link))
    assert step() is native
    assert library.why_not_kept() == ""


def test_file_that_is_a_link(process):
    path = process.plant()
    path.rename(process.folder / "planted.so")
    path.symlink_to(process.folder / "planted.so")
    assert step() is native
    assert library.why_not_kept() == ""
    assert not process.kept.is_symlink()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file(process, make):
    """Nothing is waited for, and no descriptor is lost."""
    path = process.plant()
    path.unlink()
    make(path)
    descriptors = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    assert step() is native
    assert not descriptors or len(os.listdir("/proc/self/fd")) == descriptors


def test_content_that_was_exchanged(process, shared_objects):
    assert step() is native
    process.begin_anew()
    process.replace(process.kept, shared_objects["planted"].read_bytes())
    assert step() is native
    assert process.kept.read_bytes() == shared_objects["good"].read_bytes()


def test_folder_of_the_working_folder(process, monkeypatch):
    """A project that was downloaded may have brought it along; the specification says to ignore relative paths."""
    process.plant()
    monkeypatch.chdir(process.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(process.folder / "home"))
    assert step() is native
    assert [path.suffix for path in (process.folder / "home" / ".cache" / "hf_tam").iterdir()] == [".so"]


def test_home_of_the_working_folder(process, monkeypatch):
    process.plant()
    process.cache.parent.rename(process.folder / ".cache")
    monkeypatch.chdir(process.folder)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", ".")
    assert step() is native
    assert library.why_not_kept() == "the home folder is a relative path: ."


@pytest.mark.skipif(sys.platform != "linux", reason="by /proc")
def test_folder_that_is_exchanged_after_the_look_at_it(process, monkeypatch):
    """Others can write to the folder above."""
    process.cache.parent.mkdir()
    process.cache.parent.chmod(0o777)
    assert step() is native
    process.begin_anew()
    own, attackers = process.cache.with_name("own"), process.cache.with_name("attackers")
    attackers.mkdir()
    shutil.copy(process.shared_objects["planted"], attackers / process.kept.name)
    read = private.read

    def read_and_exchange(path):
        content = read(path)
        process.cache.rename(own)
        attackers.rename(process.cache)
        return content

    monkeypatch.setattr(private, "read", read_and_exchange)
    assert step() is native
    assert own.exists()
    assert library.why_not_kept() == ""
    assert process.compilations == 1


def test_folder_that_can_be_exchanged_where_there_is_no_proc(process, monkeypatch):
    process.plant()
    process.cache.parent.chmod(0o777)
    monkeypatch.setattr(os, "getpid", lambda: 0)
    assert step() is native
    assert library.why_not_kept().startswith(f"others can put another folder in the place of {process.cache}; ")


@pytest.mark.parametrize("mode", [0o777, 0o1777], ids=oct)
def test_disk_of_all_users(process, mode):
    """The folder in it is the user's alone, and used."""
    process.cache.parent.mkdir()
    process.cache.parent.chmod(mode)
    for _ in range(2):
        assert step() is native
        assert library.why_not_kept() == ""
        process.begin_anew()
    assert process.compilations == 1


def test_umask_that_forbids_nothing(process):
    process.use(process.compiler("write {good} && chmod 777 $out"))
    before = os.umask(0)
    try:
        assert step() is native
    finally:
        os.umask(before)
    process.begin_anew()
    assert step() is native
    assert process.compilations == 1
    assert [stat.S_IMODE(path.stat().st_mode) for path in (process.cache.parent, process.cache, process.kept)] == [
        0o700
    ] * 3


@pytest.mark.skipif(not IS_ROOT, reason="what root does in a user's home")
def test_root_leaves_nothing_in_the_home_of_a_user(process):
    """A container that has it mounted: the user could neither use nor remove it."""
    home = process.cache.parent
    home.mkdir()
    os.chown(home, ANOTHER, -1)
    assert step() is native
    assert list(home.iterdir()) == []
    assert library.why_not_kept().startswith(f"{home} belongs to user {ANOTHER}, and this is root; ")


# --- a library that is damaged, or of no use here, is compiled anew, once ------------------------------------------

DAMAGES = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "cut off by a byte": lambda content: content[:-1],
    "zeros": lambda content: bytes(len(content)),
    "a bit": lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged(process, damage):
    """Loaded, most of these would end the process by SIGBUS."""
    assert step() is native
    good = process.kept.read_bytes()
    process.replace(process.kept, DAMAGES[damage](good))
    for _ in range(2):
        process.begin_anew()
        assert step() is native
    assert process.compilations == 2
    assert process.kept.read_bytes() == good


def test_damaged_and_found_by_several_at_once(process):
    assert step() is native
    process.replace(process.kept, b"")
    threads = [threading.Thread(target=library._load.__wrapped__) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    process.begin_anew()
    before = process.compilations
    assert step() is native
    assert process.compilations == before
    assert process.kept.stat().st_size > 0


@pytest.mark.parametrize("error", ["version `GLIBC_2.99' not found", "wrong ELF class: ELFCLASS32"])
def test_of_a_newer_system(process, error, monkeypatch):
    assert step() is native
    process.begin_anew()
    useless, load = os.stat(process.kept), ctypes.CDLL

    def refuse_that(name, *rest):
        if name and os.path.samestat(os.stat(name), useless):
            raise OSError(f"{name}: {error}")
        return load(name, *rest)

    monkeypatch.setattr(ctypes, "CDLL", refuse_that)
    for _ in range(2):
        assert step() is native
        assert library.why_not_kept() == ""
        process.begin_anew()
    assert process.compilations == 2


def test_removed_by_another_rank_meanwhile(process, monkeypatch):
    assert step() is native
    process.begin_anew()
    read = private.read

    def remove_and_read(path):
        path.unlink()
        return read(path)

    monkeypatch.setattr(private, "read", remove_and_read)
    assert step() is native
    assert library.why_not_kept() == ""


def test_written_before_it_is_named(process, monkeypatch):
    """A crash of the machine leaves the whole file, or none."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda at: (done.append(stat.S_IFMT(os.fstat(at).st_mode)), fsync(at))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("named"), replace(*paths))[1])
    assert step() is native
    assert done == [stat.S_IFREG, "named", stat.S_IFDIR]


# --- a cache that cannot be used -------------------------------------------------------------------------------------


def _without_room(process, patch):
    write = Path.write_bytes
    full = refuse(errno.ENOSPC)
    patch.setattr(
        Path, "write_bytes", lambda at, *content: (full if process.cache in at.parents else write)(at, *content)
    )


def _read_only(process, patch):
    make, refused = tempfile.mkdtemp, refuse(errno.EROFS)

    def mkdtemp(suffix, prefix, folder):
        return (refused if folder == process.cache else make)(suffix, prefix, folder)

    patch.setattr(tempfile, "mkdtemp", mkdtemp)


def _mounted_noexec(process, patch):
    look, flag = os.statvfs, os.ST_NOEXEC

    def statvfs(path):
        found = look(path)
        is_there = Path(path) == process.cache
        return os.statvfs_result([*found[:8], found.f_flag | flag, *found[9:]]) if is_there else found

    patch.setattr(os, "statvfs", statvfs)


def _without_a_home(process, patch):
    patch.delenv("HOME", raising=False)
    patch.delenv("XDG_CACHE_HOME")
    patch.setattr(pwd, "getpwuid", lambda user: {}[user])  # KeyError: a container of a user without a name


def _no_folder(process, patch):
    patch.setenv("XDG_CACHE_HOME", "/dev/null")


PLACES = {
    "full": (_without_room, "No space left on device"),
    "over quota when it is written out": (lambda _, patch: patch.setattr(os, "fsync", refuse(errno.EDQUOT)), "quota"),
    "busy": (lambda _, patch: patch.setattr(os, "replace", refuse(errno.EBUSY)), "busy"),
    "read only": (_read_only, "Read-only file system"),
    "mounted noexec": (_mounted_noexec, "is on a disk that is mounted noexec"),
    "no home": (_without_a_home, "home directory"),
    "no folder": (_no_folder, "/dev/null"),
}


@pytest.mark.parametrize("place", PLACES)
def test_cache_that_cannot_be_used(process, place, monkeypatch):
    """The library is compiled for the process, and nothing is left anywhere."""
    spoil, reason = PLACES[place]
    monkeypatch.setattr(tempfile, "tempdir", str(process.folder / "tmp"))
    (process.folder / "tmp").mkdir()
    with monkeypatch.context() as patch:
        spoil(process, patch)
        assert step() is native
        assert reason in library.why_not_kept()
        assert process.compilations == 1
        assert f"compiled for this process only: {library.why_not_kept()})" in status._backend()
    assert not process.cache.exists() or not list(process.cache.iterdir())
    assert not list((process.folder / "tmp").glob("hf_tam*"))


def test_cache_that_can_be_read_only(process, monkeypatch):
    """It came with the image of a container, say."""
    assert step() is native
    process.begin_anew()
    for name in ("replace", "unlink", "mkdir", "fsync"):
        monkeypatch.setattr(os, name, refuse(errno.EROFS))
    assert step() is native
    assert library.why_not_kept() == ""
    assert process.compilations == 1


def test_neither_cache_nor_temporary_folder(process, monkeypatch):
    monkeypatch.setattr(tempfile, "mkdtemp", refuse(errno.ENOENT))
    assert step() is torch_fused
    assert "No such file or directory; in a temporary folder: [Errno 2] No such file or dir" in library.why_not()


def test_surroundings_of_the_compiler(process, monkeypatch):
    """It has a temporary folder, which is removed, and it speaks English."""
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    process.use(process.compiler('[ "$LC_ALL" = C ] && > "$TMPDIR/object.o" && write {good}'))
    assert step() is native
    assert process.kept.suffix == ".so"


# --- a compiler that is none, or another one -----------------------------------------------------------------------

X86 = platform.machine() in ("x86_64", "AMD64")
COMPILERS = {
    "fails in bytes that are no text": (
        "printf 'error: \\377\\376\\033[1mno' >&2; exit 1",
        r"cc failed: error: \\xff\\xfe \[1mno",
    ),
    "fails and says nothing": ("exit 4", "cc failed: status 4"),
    "fails without the word": ("echo unknown flag >&2; exit 1", "cc failed: unknown flag"),
    "is killed": ("kill -9 $$", "cc failed: status -9"),
    "writes nothing": ("exit 0", "cc reported success, and wrote no library"),
    "writes a folder": ("mkdir $out", "cc reported success, and wrote no library"),
    "writes text": ("echo hello > $out", "file too short|invalid ELF header"),
    "cuts it off": ("head -c 20000 {good} > $out", "cc wrote ends the process that loads it|file too short"),
    "writes another library": ("write {empty}", "cc wrote is not this library: .*undefined symbol: hf_tam_sums"),
    "writes one that ends the process": ("write {deadly}", "cc wrote ends the process that loads it: .*status 3"),
    "compiles for another machine": (
        "write {good}; printf '\\377\\177' | dd of=$out bs=1 seek=18 conv=notrunc 2> /dev/null",
        "tmp.*so: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiler_that(process, compiler):
    body, reason = COMPILERS[compiler]
    process.use(process.compiler(body))
    assert step() is torch_fused
    assert_is_one_line(library.why_not(), reason)
    assert not list(process.cache.iterdir())


def assert_is_one_line(text, pattern):
    assert re.search(pattern, text), text
    assert text.isprintable()
    text.encode()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("gcc 'x", r"CC=gcc 'x is no command: No closing quotation"),
        ("gcc \\", r"CC=gcc \\ is no command: No escaped character"),
        ("''", "could not be run: "),
        ("/", "/ could not be run: .*Permission denied"),
        ("/nowhere/\udcff/cc", r"/nowhere/\\udcff/cc could not be run: "),
        ("-O2", "-O2 could not be run: "),
    ],
)
def test_command_that_is_none(process, command, reason):
    process.use(command)
    assert step() is torch_fused
    assert_is_one_line(library.why_not(), reason)


@pytest.mark.parametrize("name", ["my compiler", "o'brien", "ü", "\udcff"])
def test_path_of_the_compiler_as_it_is(process, name):
    process.use(process.compiler("write {good}", name=name))
    assert step() is native


def test_command_of_several_words(process):
    process.use(f"env A=1 '{process.compiler('write {good}', name='a cc')}' -pipe")
    assert step() is native


@pytest.mark.parametrize("command", ["", " "])
def test_empty_command_is_none(process, command, monkeypatch):
    monkeypatch.setenv("PATH", f"{process.folder}{os.pathsep}{os.environ['PATH']}")
    process.use(command)
    assert step() is native
    assert process.compilations == 1


@pytest.mark.parametrize("path", [None, "", "/nowhere"])
def test_no_path(process, path, monkeypatch):
    monkeypatch.delenv("CC")
    if path is None:
        monkeypatch.delenv("PATH")
        monkeypatch.setattr(shutil, "which", lambda name: None)  # whatever is in the system's own folders
    else:
        monkeypatch.setenv("PATH", path)
    assert step() is torch_fused
    assert library.why_not() == "no C compiler was found (cc, gcc, clang, or CC)"


@pytest.mark.parametrize("name", ["ü", "\udcff", "a b"])
def test_path_of_the_cache_that_is_no_plain_text(process, name, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(process.folder / name))
    for _ in range(2):
        assert step() is native
        assert library.why_not_kept() == ""
        process.begin_anew()
    assert process.compilations == 1


@pytest.mark.skipif(not X86, reason="instruction sets of x86-64")
@pytest.mark.parametrize("unknown", ["-march=*", "-mavx512bf16", "-mprefer-vector-width*", "-mavx512*"])
def test_compiler_that_is_older(process, unknown):
    """gcc 10 knows no x86-64-v3, gcc 9 no bf16, gcc 7 no preferred width; zig spells -march otherwise."""
    refuse = f'case " $all " in *" {unknown}"*) echo error: unknown {unknown} >&2; exit 1;; esac'
    process.use(process.compiler(f"{refuse}; write {{good}}"))
    assert step() is native


def test_compiler_that_hangs(process, monkeypatch):
    """It is stopped, with all that it has started, and not tried again."""
    monkeypatch.setattr(library, "_TIMEOUT", 0.5)
    process.use(process.compiler(f"sleep 300 & echo $! > {process.folder}/child; wait"))
    assert step() is torch_fused
    assert library.why_not() == f"{process.folder}/cc was stopped after 0 seconds"
    assert process.compilations == 1
    assert is_gone(int((process.folder / "child").read_text()))


def is_gone(number):
    """Within seconds: ended, or a zombie that nobody waits for."""
    for _ in range(100):
        try:
            if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(number, 0)
        except OSError:
            return not Path("/proc/self").exists() or not Path(f"/proc/{number}").exists()
        time.sleep(0.05)
    return False


def test_compiler_that_leaves_something_running(process):
    """As sccache its server, which holds on to what it has inherited."""
    process.use(process.compiler("sleep 300 & echo $! > $(dirname $0)/child; write {good}"))
    begin = time.monotonic()
    try:
        assert step() is native
        assert time.monotonic() - begin < 100
    finally:
        os.kill(int((process.folder / "child").read_text()), 9)


def test_compiler_that_asks(process, monkeypatch):
    """It reads nothing of what is the program's."""
    process.use(process.compiler("cat > /dev/null; write {good}"))
    reading, writing = os.pipe()  # nobody ever writes
    saved = os.dup(0)
    os.dup2(reading, 0)
    monkeypatch.setattr(library, "_TIMEOUT", 30.0)
    try:
        assert step() is native
    finally:
        os.dup2(saved, 0)
        for descriptor in (saved, reading, writing):
            os.close(descriptor)


def test_ctrl_c_while_it_compiles(process, monkeypatch):
    """Is Ctrl-C; the compiler ends, and the next step compiles."""
    process.use(process.compiler(f"echo $$ > {process.folder}/child; sleep 300"))
    wait = subprocess.Popen.wait

    def interrupt(child, timeout=None):
        if timeout is None:
            return wait(child)
        while not (process.folder / "child").exists() or not (process.folder / "child").read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            step()
    assert is_gone(int((process.folder / "child").read_text()))
    process.compiler("write {good}")
    assert step() is native


# --- whatever else happens -------------------------------------------------------------------------------------------

ERRORS = [UnicodeError, ValueError, MemoryError, PermissionError, RuntimeError, RecursionError, DeprecationWarning]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["_compiler", "_instruction_sets", "_compiled"])
def test_whatever_is_raised_the_step_is_taken(process, where, error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(library, where, fail)
    assert step() is torch_fused
    assert error.__name__ in library.why_not()


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_is_raised_over_the_cache_another_folder_is_used(process, error, monkeypatch):
    def fail():
        raise error("so it is")

    monkeypatch.setattr(library, "_cache_folder", fail)
    assert step() is native
    assert library.why_not_kept() == "so it is"


def test_sources_that_are_not_there(process, monkeypatch):
    """Installed as a zip file, or frozen."""
    monkeypatch.setattr(library, "SOURCE", Path(__file__, "kernels.c"))
    assert step() is torch_fused
    assert "Not a directory" in library.why_not()


@pytest.mark.parametrize(("body", "expected"), [("write {good}", native), ("exit 1", torch_fused)])
def test_program_that_does_not_hear_of_its_children(process, body, expected):
    """Then nobody knows how they ended."""
    process.use(process.compiler(body))
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert step() is expected
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_warnings_that_are_errors(process):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step() is native
    assert process.compilations == 1


@pytest.mark.launch
def test_ascii_locale(process, monkeypatch):
    """In a process of its own: what Python takes for text is settled when it begins."""
    process.use(process.compiler("printf 'error: \\303\\251\\377' >&2; exit 1", name="compil\u00e9r"))
    script = "from tests.field.test_compiled_library import step; assert step().__name__.endswith('torch_fused')"
    script += "; from hf_tam.cli import status; status._print_registration = lambda: 0; status.status(None)"
    changes = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert rb"compil\udcc3\udca9r failed: error: \xe9\xff)" in run.stdout
