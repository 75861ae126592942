"""What every program shares, each in a process of its own."""

import os
import pathlib
import sys

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
