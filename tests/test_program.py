"""What every program shares, each in a process of its own."""

import os
import pathlib
import signal
import sys
from importlib import metadata

import pytest

from tests.processes import execute

PROGRAM = """
import os, sys
from absl import flags
from prn_jax import program

WORD = flags.DEFINE_string("word", "", "Any.")

def main(rest):
    print(os.getpid(), sys.prefix, WORD.value, rest, os.environ.get("GLIBC_TUNABLES"))

if __name__ == "__main__":
    print(os.getpid(), flush=True)
    program.run(main, positional=True)
"""
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
FOR_PROGRAMS = HUGE_PAGES.exists() and "[madvise]" in HUGE_PAGES.read_text()


@pytest.mark.parametrize("given", [None, "glibc.malloc.mxfast=0", "glibc.malloc.hugetlb=0"])
@pytest.mark.parametrize("as_module", [False, True])
def test_memory_is_in_huge_pages_where_programs_decide(tmp_path, given, as_module):
    """The process, its Python and its arguments are the same; who set the tunable is left alone."""
    (tmp_path / "named.py").write_text(PROGRAM)
    named = ["-m", "named"] if as_module else [str(tmp_path / "named.py")]
    variables = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    variables |= {"GLIBC_TUNABLES": given or ""}
    finished = execute([sys.executable, *named, "--word=a b", "ä", "*"], **variables)
    assert not finished.returncode, finished.stderr
    *before, after = finished.stdout.splitlines()
    ours = "glibc.malloc.hugetlb=1"
    expected = [given] if "hugetlb" in (given or "") or not FOR_PROGRAMS else [given, ours]
    number = before[0]
    assert len(before) == len(expected)  # once, and again where it starts anew
    tunables = ":".join(filter(None, expected))
    assert after == f"{number} {sys.prefix} a b ['ä', '*'] {tunables}"
    assert before == [number] * len(before)


PRINTS = """
from prn_jax import program

def main():
    print("ä" * 100_000)
    open(__file__ + ".done", "w").close()

if __name__ == "__main__":
    program.run(main)
"""


@pytest.mark.parametrize(
    ("redirection", "status"), [("2>&-", 0), (">&- 2>&- <&-", 0), ("| true", 141)]
)
def test_a_program_needs_nobody_who_reads(tmp_path, redirection, status):
    program = tmp_path / "prints.py"
    program.write_text(PRINTS)
    command = f"{sys.executable} {program} {redirection}; exit ${{PIPESTATUS[0]}}"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    finished = execute(["bash", "-c", command], PYTHONPATH=os.getcwd(), **ascii_only)
    assert finished.returncode == status, finished.stderr
    assert "Traceback" not in finished.stderr
    if not status:
        assert (tmp_path / "prints.py.done").exists()


STOPPED = """
import gc, os, time
from prn_jax import program

def main():
    def callback(phase, info):
        if phase == "stop":
            gc.callbacks.remove(callback)
            os.kill(os.getpid(), NUMBER)
            time.sleep(0.1)  # the handler runs here, where its exception ends nothing

    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(20)
    print("went on")

if __name__ == "__main__":
    program.run(main, afterwards="the same command goes on")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_amid_a_callback_is_a_stop(tmp_path, number):
    path = tmp_path / "stopped.py"
    path.write_text(STOPPED.replace("NUMBER", str(int(number))))
    finished = execute([sys.executable, str(path)], PYTHONPATH=os.getcwd())
    assert finished.returncode == 128 + number
    assert finished.stdout == ""
    assert finished.stderr.endswith("; the same command goes on\n")
    assert len(finished.stderr.splitlines()) == 1


CONV = """
import os
import jax
from jax import lax, numpy as jnp
from prn_jax import program

def main():
    x, kernel = jnp.ones((1, 64, 8, 8)), jnp.ones((64, 64, 3, 3))
    conv = jax.jit(lambda x: lax.conv(x, kernel, (1, 1), "SAME"))
    print("ynn" in conv.lower(x).compile().as_text())
    print(os.environ["XLA_FLAGS"])

if __name__ == "__main__":
    program.run(main)
"""
FUSIONS = "--xla_cpu_experimental_ynn_fusion_type="
OURS = f"{FUSIONS}-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
ANOTHER = "--xla_llvm_disable_expensive_passes=true"


@pytest.mark.skipif(not metadata.version("jaxlib").startswith("0.10."), reason="XLA's is another")
@pytest.mark.parametrize(
    ("given", "expected"), [("", OURS), (ANOTHER, f"{ANOTHER} {OURS}"), (FUSIONS, FUSIONS)]
)
def test_convs_are_left_to_eigen(tmp_path, given, expected):
    """XLA takes the flag and heeds it; who has set it is left alone."""
    path = tmp_path / "conv.py"
    path.write_text(CONV)
    finished = execute([sys.executable, str(path)], PYTHONPATH=os.getcwd(), XLA_FLAGS=given)
    assert not finished.returncode, finished.stderr
    assert finished.stdout.splitlines() == ["False", expected]
