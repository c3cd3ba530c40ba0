"""`hpcinfer supervise`, whose steps run the module that its first argument names instead of hpcinfer.run."""

import sys

from hpcinfer import supervise
from hpcinfer.__main__ import main

if __name__ == "__main__":
    supervise._STEP = sys.argv[1]
    raise SystemExit(main(["supervise", *sys.argv[2:]]))
