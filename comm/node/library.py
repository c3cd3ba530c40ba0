"""The node library: loading it, and programs of the tree in its form."""

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from hpcinfer.partition.tree_program import TreeProgram

LAYOUT = 2  # HPC_LAYOUT of the node.h that this package was written with

logger = logging.getLogger(__name__)


class Library(NamedTuple):
    """The C functions as cffi shows them."""

    ffi: Any
    lib: Any


class Compiled(NamedTuple):
    """A program as a C struct, and what its pointers point to."""

    struct: Any
    held: tuple[Any, ...]


@functools.cache
def load() -> Library | None:
    """Load the library; None where it was not built, does not load, or is of another version. Not collective."""
    try:
        module = importlib.import_module("._node", __package__)
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        logger.warning("the node library is there, but cannot be loaded: %s", error)
        return None
    layout = getattr(module.lib, "HPC_LAYOUT", 1)
    if layout != LAYOUT:
        logger.warning(
            "the node library at %s is of another version of hpcinfer (layout %d, expected %d): ranks of a node talk"
            " through the MPI; install hpcinfer again", module.__file__, layout, LAYOUT,
        )  # fmt: skip
        return None
    return Library(module.ffi, module.lib)


@functools.lru_cache(maxsize=256)
def compile_program(library: Library, program: TreeProgram) -> Compiled:
    """Give every value of a program its place: an input, a register as long as it is needed, or an output.

    Not collective.
    """
    num_inputs, registers = len(program.inputs), library.lib.HPC_REGISTERS
    first_output = num_inputs + registers
    output_of = {value: first_output + i for i, value in enumerate(program.results)}
    places, free = list(range(num_inputs)), list(range(first_output - 1, num_inputs - 1, -1))
    steps: list[int] = []
    for i, (left, right) in enumerate(program.adds):
        operands = places[left], places[right]
        free += [place for place in operands if num_inputs <= place < first_output]
        value = num_inputs + i
        places.append(output_of[value] if value in output_of else free.pop())
        steps += [places[value], *operands]
    for value in program.results:
        if value < num_inputs:
            steps += [output_of[value], value, -1]
    inputs = [number for each in program.inputs for number in each]
    held = library.ffi.new("int32_t[]", inputs), library.ffi.new("int32_t[]", steps)
    struct = library.ffi.new("hpc_program *", {
        "num_inputs": num_inputs, "num_steps": len(steps) // 3, "num_outputs": len(program.results),
        "max_nodes": program.max_nodes, "inputs": held[0], "steps": held[1],
    })  # fmt: skip
    return Compiled(struct, held)


def evaluate(program: TreeProgram, nodes: Sequence[Sequence[np.ndarray]], outs: Sequence[np.ndarray]) -> None:
    """Run a program on arrays of this process. Not collective. Arguments are those of `evaluation`."""
    evaluation(program, nodes, outs)()


def evaluation(
    program: TreeProgram, nodes: Sequence[Sequence[np.ndarray]], outs: Sequence[np.ndarray]
) -> Callable[[], None]:
    """Prepare to run a program on arrays of this process; each call runs it.

    Not collective.

    Args:
        program: of ranks that `nodes` are of.
        nodes: contiguous float32 arrays of one size, for each rank those of its nodes.
        outs: contiguous float32 arrays for the results. One may be one of the nodes, but not lie across it.
    """
    library = load()
    if library is None:
        return partial(_evaluate, program, nodes, outs)
    from_buffer = library.ffi.from_buffer
    inputs = [from_buffer("float[]", nodes[each.rank][each.node]) for each in program.inputs]
    results = [from_buffer("float[]", out, require_writable=True) for out in outs]
    pointers = library.ffi.new("float *[]", inputs), library.ffi.new("float *[]", results)
    return _Evaluation(library, compile_program(library, program), pointers, (inputs, results), outs[0].size)


@dataclass(frozen=True)
class _Evaluation:
    """A program with its arrays."""

    library: Library
    compiled: Compiled
    pointers: tuple[Any, Any]
    held: tuple[list[Any], list[Any]]  # what they point to
    length: int

    def __call__(self) -> None:
        self.library.lib.hpc_evaluate(self.compiled.struct, *self.pointers, self.length)


def _evaluate(
    program: TreeProgram, nodes: Sequence[Sequence[np.ndarray]], outs: Sequence[np.ndarray]
) -> None:
    for out, value in zip(outs, program.evaluate(nodes, np.add), strict=True):
        np.copyto(out, value)
