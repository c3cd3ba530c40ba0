"""Ranks of one node talk through shared memory: a region, a channel over it, sums and messages in the channel."""

import os
import sys

# Run from a checkout, `python -m hpcinfer.run` finds the sources first; the library is where hpcinfer was installed.
__path__.extend(os.path.join(entry, "hpcinfer", "comm", "node") for entry in sys.path if entry)
