"""Options of `hpcinfer study`."""

from dataclasses import dataclass

from hpcinfer.config import option


@dataclass(frozen=True)
class StudyOptions:
    """What is studied, and how its runs are started."""

    input: str = option("", "prompts; each point takes as many of the first rows as it needs, again and again if these"
                        " are too few", metavar="FILE")
    output: str = option("", "folder of the study; the same one again goes on with what is missing", metavar="DIR")
    nodes: str = option("", "numbers of nodes; 1 if not given", metavar="N,...")
    ranks_per_node: str = option("", "ranks on each node; what was asked of Slurm if not given, else 1",
                                metavar="N,...")
    mesh: tuple[str, ...] = option(
        (), "a replica, as tp=2 or pp=nodes,tp=node; a size is a number, or node (ranks of a node), nodes or all"
        " (ranks); dp is what is left; repeatable", metavar="SIZES",
    )  # fmt: skip
    auto: bool = option(False, "choose nodes, ranks and meshes that make sense on this machine and for this model")
    scaling: str = option("both", "strong: the same rows everywhere; weak: as many for each rank",
                          choices=("both", "strong", "weak"))
    rows: int | None = option(None, "rows of the smallest point, and of all in strong scaling; those of the input if"
                              " not given")
    repeats: int = option(3, "runs of each point, in rounds over all of them")
    launcher: str = option("auto", "what starts the runs; auto is srun in a Slurm allocation, where it can start our"
                           " MPI, else mpiexec", choices=("auto", "mpiexec", "srun"))
    hosts: str | None = option(None, "hosts for the runs; those of the allocation if not given, without one this one",
                               metavar="HOST,...")
    run_timeout: float | None = option(None, "seconds after which a run has failed", metavar="SECONDS")
    run_option: tuple[str, ...] = option((), "one more option of hpcinfer run, as --run-option=--seed=3; repeatable",
                                         metavar="OPTION")
    submit: bool = option(False, "submit a job to Slurm for each number of nodes and ranks, instead of running here")
    sbatch_option: tuple[str, ...] = option((), "one more option of sbatch, as --sbatch-option=--time=30; repeatable",
                                            metavar="OPTION")
    only: str | None = option(None, "run only what takes so many nodes and ranks on each", metavar="NODESxRANKS")
    print: bool = option(False, "show what would be started, start nothing")
    collect: bool = option(False, "run nothing: table and plots of what there is")
    plots: str = option("svg", "format of the plots", choices=("svg", "png", "pdf"))
