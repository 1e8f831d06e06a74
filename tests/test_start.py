"""What is loaded at the start, and that Ctrl-C ends it at any time."""

import ast
import ctypes
import importlib
import io
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import nanochat_jax as nj
from nanochat_jax import cli
from nanochat_jax.commands import doctor
from nanochat_jax.commands.usage import ending

COMMANDS = ("doctor", "plan", "generate", "import", "prepare-data")
LIGHT = ("--help", "--version", *(f"{name} --help" for name in COMMANDS))


def run(code, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, **kwargs
    )


def test_help_and_versions_need_neither_jax_nor_its_frameworks():
    code = f"""
import sys
from nanochat_jax import cli
for words in {LIGHT!r}:
    assert cli.main(words.split()) == 0
print(sorted({{"jax", "jaxlib", "flax", "optax", "orbax", "grain"}} & set(sys.modules)))
"""
    done = run(code, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""


def test_names_are_those_that_a_type_checker_sees():
    tree = ast.parse(Path(nj.__file__).read_text(encoding="utf-8"))
    static = next(node for node in tree.body if isinstance(node, ast.If))
    names = {
        alias.name: importlib.import_module(node.module)
        for node in static.body
        if isinstance(node, ast.ImportFrom) and node.module != "nanochat_jax"
        for alias in node.names
    }
    assert [*nj.__all__] == [*names]
    for name, package in names.items():
        assert getattr(nj, name) is getattr(package, name)


def test_lazy_names_are_as_good_as_others():
    assert {*nj.__all__} <= {*dir(nj)}
    scope = {}
    exec("from nanochat_jax import *", scope)
    assert scope.keys() >= {*nj.__all__}
    assert pickle.loads(pickle.dumps(nj.muon)) is nj.muon
    assert nj.transforms.galore is nj.galore
    with pytest.raises(AttributeError, match="has no attribute 'adamw'"):
        nj.adamw  # noqa: B018


def test_the_version_is_that_of_the_package(capsys):
    assert cli.main(["--version"]) == 0
    version = importlib.metadata.version("nanochat-jax")
    assert capsys.readouterr().out.startswith(f"nanochat-jax {version} (jax ")


def test_without_the_extra_of_the_command_line_it_is_named():
    code = """
import sys
from nanochat_jax import cli
sys.modules["rich.console"] = None
sys.exit(cli.main(["--help"]))
"""
    done = run(code)
    assert done.returncode == 1
    assert "rich.console is not installed" in done.stderr
    assert "`pip install 'nanochat-jax[train]'`" in done.stderr
    assert "Traceback" not in done.stderr


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("how", ["Go on with `--resume a`.", None])
def test_ctrl_c_says_how_to_go_on_and_leaves_the_terminal_as_it_was(
    how, monkeypatch, capsys
):
    def run(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor.Doctor, "run", run)
    monkeypatch.setattr(doctor.Doctor, "how_to_go_on", lambda _: how, raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    assert cli.main(["doctor"]) == ending.INTERRUPTED == 130
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before
    assert (
        capsys.readouterr().err == "\ninterrupted." + (f" {how}" if how else "") + "\n"
    )
    assert sys.stdout.getvalue().endswith("\x1b[2K\x1b[?25h")  # no bar, a cursor


SLOW = """
import hashlib, os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind `nohup`
from nanochat_jax import cli
from nanochat_jax.commands import doctor

def run(self):
    press = lambda: os.kill(os.getpid(), signal.SIGINT)
    if {where!r} == "compiled":
        threading.Timer(0.2, press).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 50_000_000)  # half a minute, or more
    elif {where!r} == "callback":
        import gc
        gc.callbacks.append(lambda *_: gc.callbacks.clear() or press())
        gc.collect()
        time.sleep(20)
    else:
        class Finder:
            def find_spec(self, *_):
                press()
        sys.meta_path.insert(0, Finder())
        import absent
    print("went on")

doctor.Doctor.run = run
sys.argv[1:] = ["doctor"]
sys.exit(cli.main())
"""


@pytest.mark.parametrize("where", ["compiled", "callback", "import"])
def test_ctrl_c_ends_calls_callbacks_and_imports(where):
    done = run(SLOW.format(where=where), timeout=60)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "\ninterrupted.\n"


def test_making_an_optimizer_starts_no_backend():
    """Since `jax.distributed.initialize` has to come before."""
    script = """
import jax, nanochat_jax as nj
nj.muon(0.02, bits=8), nj.orthogonalize()
jax.config.update("jax_num_cpu_devices", 2)
assert jax.device_count() == 2
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


ARENAS = """
import ctypes, sys, tempfile, threading
from nanochat_jax.commands.launch import bound_arenas
if sys.argv[1] == "bound":
    bound_arenas()
barrier = threading.Barrier(8)
def work():
    kept = [bytearray(100_000) for _ in range(50)]
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
with tempfile.NamedTemporaryFile() as file:
    libc.malloc_info(0, libc.fopen(file.name.encode(), b"w"))
    libc.fflush(None)
    print(open(file.name).read().count("<heap"))
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_info"), reason="of the GNU C library"
)
def test_threads_of_the_command_line_share_one_arena():
    count = lambda how: int(
        subprocess.run(
            [sys.executable, "-c", ARENAS, how],
            check=True,
            capture_output=True,
            env={k: v for k, v in os.environ.items() if k != "MALLOC_ARENA_MAX"},
        ).stdout
    )
    assert count("bound") == 1 < count("free")
