"""`hpcinfer run` on a GPU that Triton's interpreter plays, with the products of one."""

import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from interpreter import play_gpu

    from hpcinfer.__main__ import main

    play_gpu(pytest.MonkeyPatch())
    raise SystemExit(main(["run", *sys.argv[1:]]))
