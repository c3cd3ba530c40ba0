"""Steps as processes: exit codes, signals, what is left behind, and the death of the supervisor."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from jobs import wait_until

from hpcinfer.recovery.inflight import STEP_VARIABLE
from hpcinfer.supervision.launchers import Command
from hpcinfer.supervision.step import LaunchedStep

PYTHON = [sys.executable, "-S", "-c"]


def start(code, name="test-step", **environment):
    return LaunchedStep(name, Command([*PYTHON, code], {**os.environ, STEP_VARIABLE: name, **environment}))


def ended(step, timeout=20):
    wait_until(lambda: step.poll() is not None, timeout)
    return step.poll()


@pytest.mark.parametrize(("code", "exit_code"), [
    ("raise SystemExit(75)", 75), ("pass", 0), ("import os; os.kill(0, 9)", 137), ("import os; os.abort()", 134),
])
def test_exit_code_is_as_of_a_shell(code, exit_code):
    assert ended(start(code)) == exit_code


def test_step_is_asked_then_told_then_killed():
    stubborn = start("import signal, time\nfor s in (10, 15): signal.signal(s, lambda *_: print('no', flush=True))\n"
                     "print('up', flush=True)\nwhile True: time.sleep(9)")
    time.sleep(1)
    for call in (stubborn.stop, stubborn.end):
        call()
        time.sleep(0.2)
        assert stubborn.poll() is None
    stubborn.end()
    assert ended(stubborn) == 137


def test_signals_to_an_ended_step_hurt_nobody():
    step = start("pass")
    ended(step)
    step.stop()
    step.end()
    step.end()


def test_own_session_keeps_ctrl_c_from_the_step():
    step = start("import time; time.sleep(60)")
    assert os.getsid(step._process.pid) == step._process.pid != os.getsid(0)
    step.end()
    ended(step)


def test_ranks_that_the_launcher_left_are_killed():
    name = f"left-{os.getpid()}"
    sleeper = "[sys.executable, '-S', '-c', 'import time; time.sleep(60)']"
    step = start(f"import subprocess, sys; subprocess.Popen({sleeper})", name)
    other = subprocess.Popen([*PYTHON, "import time; time.sleep(60)"], env={**os.environ, STEP_VARIABLE: f"{name}0"})
    ended(step)
    assert [process for process in psutil.process_iter() if is_of(process, name)]
    step.bury()
    assert not [process for process in psutil.process_iter() if is_of(process, name)]
    assert other.poll() is None
    other.kill()
    other.wait()


def is_of(process, name):
    try:
        return process.environ().get(STEP_VARIABLE) == name and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def test_step_dies_with_its_supervisor():
    program = f"""
import os, sys, time
from hpcinfer.supervision.launchers import Command
from hpcinfer.supervision.step import LaunchedStep
step = LaunchedStep("x", Command([{sys.executable!r}, "-S", "-c", "import time; time.sleep(60)"], dict(os.environ)))
print(step._process.pid, flush=True)
time.sleep(60)
"""
    supervisor = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    step = psutil.Process(int(supervisor.stdout.readline()))
    assert step.is_running()
    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.wait()
    wait_until(lambda: not step.is_running() or step.status() == psutil.STATUS_ZOMBIE, 10)
    supervisor.stdout.close()
