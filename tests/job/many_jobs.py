"""Several jobs one after another in the same ranks, to start MPI and import torch once: a JSON list of arguments."""

import json
import sys
from pathlib import Path

from hpcinfer.__main__ import main

if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        if exit_code := main(["run", *arguments]):
            raise SystemExit(exit_code)
