"""hpcinfer: a file of prompts becomes a file of completions, with one `mpirun` or `srun`.

Importing this package imports neither MPI nor torch nor h5py.
"""

import os

__version__ = "0.1.0"

__all__ = ["__version__"]

if not os.path.isdir(os.path.join(__path__[0], "comm")):  # run from a checkout, where comm/ and partition/ stand beside
    __path__.append(os.path.dirname(__path__[0]))
