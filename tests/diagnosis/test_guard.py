"""Real processes: what the guard does must not depend on Python being able to run."""

import subprocess
import sys
import textwrap
import time

import pytest


def run(body, limit_s=1.0):
    """Run code under a guard; returns exit code, what was said, seconds."""
    code = f"""
        import ctypes, os, sys, time
        from hpcinfer.diagnosis.guard import Guard
        def speak(step, has_ended):
            return ("ended in " if has_ended else "late in ").encode() + step.encode()
        with Guard({limit_s}, 0.1, speak) as guard:
            guard.step("one")
            guard.step("two")
            {body}
        print("after")
    """
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout, time.monotonic() - start


def test_work_in_time_is_left_alone():
    code, said, seconds = run("pass", 20.0)
    assert (code, said) == (0, "after\n") and seconds < 10


@pytest.mark.parametrize("body", ["time.sleep(30)", "ctypes.PyDLL(None).sleep(30)"], ids=["sleeps", "keeps the GIL"])
def test_work_that_hangs_is_ended_with_its_step_and_code_1(body):
    code, said, seconds = run(body)
    assert (code, said) == (1, "late in two") and seconds < 10


def test_an_exit_code_comes_through():
    assert run("sys.exit(3)", 20.0)[:2] == (3, "")


@pytest.mark.parametrize(("body", "code"), [("os.kill(os.getpid(), 9)", -9), ("os._exit(4)", 4)])
def test_a_process_that_ends_in_a_step_is_told_and_not_outlived(body, code):
    ended, said, seconds = run(body, 20.0)
    assert (ended, said) == (code, "ended in two") and seconds < 10  # the pipe to us closes when the child has ended
