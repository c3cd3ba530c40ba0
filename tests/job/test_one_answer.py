"""The output is the same, byte for byte, whatever the mesh, the batch, the blocks and the cache."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import pytest
from golden import DEMO_MODEL, Output, demo_prompts, read_output, varied_rows, write_rows
from jobs import run_job
from models import FAMILIES, make_tiny_model
from stages import native_was_built

MESHES = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 3), (1, 3, 1), (1, 1, 4), (2, 1, 2), (1, 2, 2), (2, 2, 2)]
SHAPES = {
    "one sequence at a time": ["--max-num-seqs", "1"],
    "seven sequences": ["--max-num-seqs", "7", "--block-size", "8"],
    "chunks of 32 tokens": ["--max-num-batched-tokens", "32", "--block-size", "64"],
    "a small cache": ["--kv-cache-memory", "1600KiB", "--block-size", "2"],  # 400 tokens of the demo model
}
CROSSED = {  # small caches with everything at once: 240 or 320 tokens of the demo model per rank
    "two stages": ((1, 2, 1), "640KiB"),
    "two replicas of two ranks": ((2, 1, 2), "480KiB"),
    "two stages of two ranks": ((1, 2, 2), "320KiB"),
}
SHAPES |= {
    name: ["--kv-cache-memory", memory, "--block-size", "2", "--max-num-seqs", "8", "--max-num-batched-tokens", "48"]
    for name, (_, memory) in CROSSED.items()
}
TINY = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 100}
TEXTS = ["The list of files is read line by line, " * 3, "Return", "hello world, the quick", "def main(", "Straße"]
needs_native = pytest.mark.skipif(not native_was_built(), reason="the native kernels were not built")

QUANTISED = {"demo-int8": "int8", "demo-int4": "int4"}
MODELS = ("demo", *FAMILIES, *QUANTISED)
SETTINGS = {  # of the native kernels: none of them changes a bit
    "two threads": (["--threads", "2"], {}),
    "three threads": (["--threads", "3"], {}),
    "AVX2": ([], {"HPCINFER_SIMD": "avx2"}),
}
SETTING_MESHES = [(1, 1, 1), (1, 1, 2)]
REFERENCE_MESHES = [(2, 1, 1), (1, 1, 2), (1, 2, 1), (1, 1, 3)]
CACHES = ("bfloat16", "int8")


class Question(NamedTuple):
    """One job."""

    model: str
    mesh: tuple[int, int, int] = (1, 1, 1)  # dp, pp, tp
    shape: str = ""
    seed: int = 7
    setting: str = ""
    flags: str = ""

    @property
    def ranks(self) -> int:
        """Ranks that the mesh needs."""
        return self.mesh[0] * self.mesh[1] * self.mesh[2]

    @property
    def name(self) -> str:
        """A folder's name."""
        words = f"{self.shape} {self.setting} {self.flags}".split()
        return "-".join([self.model, *map(str, self.mesh), *words, str(self.seed)])

    @property
    def environment(self) -> dict[str, str]:
        """What all ranks find in their environment."""
        return SETTINGS[self.setting][1] if self.setting else {}


QUESTIONS = [
    *(Question(model, mesh) for model in MODELS for mesh in [(1, 1, 1), *MESHES]),
    *(Question("demo", CROSSED[shape][0] if shape in CROSSED else (1, 1, 1), shape) for shape in SHAPES),
    Question("demo", seed=8),
    *(Question(model, mesh, setting=setting)
      for model in ("demo", *QUANTISED) for setting in SETTINGS for mesh in SETTING_MESHES),
    *(Question(model, mesh, flags="--kernels reference")
      for model in ("demo", "demo-int4") for mesh in [(1, 1, 1), *REFERENCE_MESHES]),
    *(Question("demo-int8", mesh, flags=f"--kv-cache-dtype {dtype}")
      for dtype in CACHES for mesh in [(1, 1, 1), (1, 1, 3), (2, 2, 1)]),
    *(Question(model, shape="chunks of 32 tokens") for model in QUANTISED),
]


class Answers:
    """Runs all questions of one number of ranks when the first of them is asked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models = {family: make_tiny_model(folder / family, family, **TINY) for family in FAMILIES}
        self._models["demo"] = DEMO_MODEL
        for name, kind in QUANTISED.items():
            self._models[name] = folder / f"{name}.store"
            run = run_job(0, "--quantize", kind, DEMO_MODEL, self._models[name], module="hpcinfer.convert")
            assert run.rc == 0, run.stderr
        self._prompts = {
            "demo": write_rows(folder / "demo.jsonl", varied_rows(demo_prompts(32))),
            "tiny": write_rows(folder / "tiny.jsonl", varied_rows((TEXTS + TEXTS[::-1]) * 2)),
        }

    def read(self, question: Question) -> Output:
        """Give the answer to a question."""
        self._run(question.ranks, tuple(question.environment.items()))
        return read_output(self._output(question))

    def _output(self, question: Question) -> Path:
        return self._folder / question.name / "out.jsonl"

    @functools.cache  # noqa: B019 (lives as long as the module's tests)
    def _run(self, ranks: int, variables: tuple[tuple[str, str], ...]) -> None:
        asked = [each for each in QUESTIONS if (each.ranks, each.environment) == (ranks, dict(variables))]
        plan = self._folder / f"jobs-{'-'.join([str(ranks), *dict(variables).values()])}.json"
        plan.write_text(json.dumps([self._arguments(question) for question in asked]))
        environment = {"HPCINFER_CACHE": str(self._folder / "cache"), **dict(variables)}
        run = run_job(ranks, plan, module="many_jobs", cwd=Path(__file__).parent, env=environment, timeout=400)
        assert run.rc == 0, run.stderr

    def _arguments(self, question: Question) -> list[str]:
        self._output(question).parent.mkdir()
        dp, pp, tp = question.mesh
        is_demo = question.model.startswith("demo")
        prompts = self._prompts["demo" if is_demo else "tiny"]
        flags = SHAPES.get(question.shape, []) if is_demo else ["--max-num-batched-tokens", "16"]
        flags = [*flags, *question.flags.split(), *(SETTINGS[question.setting][0] if question.setting else [])]
        mesh = ["-dp", dp, "-pp", pp, "-tp", tp, "--debug-lockstep"]
        files = ["--model", self._models[question.model], "--input", prompts, "--output", self._output(question)]
        return [*map(str, [*files, *mesh, *flags, "--seed", question.seed]), "--max-model-len", "200"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """All answers."""
    return Answers(tmp_path_factory.mktemp("golden"))


@pytest.mark.time_limit(400)
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "dp{}-pp{}-tp{}".format(*mesh))
@pytest.mark.parametrize("model", MODELS)
def test_same_bytes_on_every_mesh(model: str, mesh: tuple[int, int, int], answers: Answers) -> None:
    dp, pp, _ = mesh
    alone, output = answers.read(Question(model)), answers.read(Question(model, mesh))
    assert output.peak("micro_batches") == pp
    finished = [rank["rows"]["finished"] for rank in output.report["ranks"]]
    assert sum(finished) == len(alone.lines)
    assert sum(rows > 0 for rows in finished) == dp
    assert output.digest == alone.digest


@pytest.mark.time_limit(400)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in CROSSED])
def test_same_bytes_for_every_batch_and_cache(shape: str, answers: Answers) -> None:
    alone, output = answers.read(Question("demo")), answers.read(Question("demo", shape=shape))
    happened = {
        "one sequence at a time": output.peak("batch_sequences") == 1,
        "seven sequences": output.peak("batch_sequences") == 7,
        "chunks of 32 tokens": output.counts("chunks") > 0 and output.peak("batch_tokens") <= 32,
        "a small cache": output.counts("preemptions") > 0,
    }
    assert happened[shape], output.report
    assert output.digest == alone.digest


@pytest.mark.time_limit(400)
@pytest.mark.parametrize("shape", CROSSED)
def test_preemption_changes_no_byte_on_any_mesh(shape: str, answers: Answers) -> None:
    mesh = CROSSED[shape][0]
    alone, output = answers.read(Question("demo")), answers.read(Question("demo", mesh, shape))
    assert output.counts("preemptions") > 0
    assert output.counts("chunks") > 0
    assert output.peak("micro_batches") == mesh[1]
    assert output.digest == alone.digest


@needs_native
@pytest.mark.time_limit(400)
@pytest.mark.parametrize("mesh", SETTING_MESHES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", ["demo", *QUANTISED])
def test_same_bytes_with_any_threads_and_vectors(
    model: str, setting: str, mesh: tuple[int, int, int], answers: Answers
) -> None:
    alone, output = answers.read(Question(model)), answers.read(Question(model, mesh, setting=setting))
    assert output.digest == alone.digest


@pytest.mark.time_limit(400)
@pytest.mark.parametrize("mesh", REFERENCE_MESHES, ids=str)
@pytest.mark.parametrize("model", ["demo", "demo-int4"])
def test_reference_kernels_give_the_same_bytes_on_every_mesh(
    model: str, mesh: tuple[int, int, int], answers: Answers
) -> None:
    flags = "--kernels reference"
    alone, output = answers.read(Question(model, flags=flags)), answers.read(Question(model, mesh, flags=flags))
    assert output.digest == alone.digest


@pytest.mark.time_limit(400)
@pytest.mark.parametrize("dtype", CACHES)
def test_same_bytes_with_a_smaller_cache_precision(dtype: str, answers: Answers) -> None:
    flags = f"--kv-cache-dtype {dtype}"
    alone = answers.read(Question("demo-int8", flags=flags))
    for mesh in [(1, 1, 3), (2, 2, 1)]:
        assert answers.read(Question("demo-int8", mesh, flags=flags)).digest == alone.digest
    assert alone.digest != answers.read(Question("demo-int8")).digest


@pytest.mark.time_limit(400)
@pytest.mark.parametrize("model", QUANTISED)
def test_quantised_models_are_prefilled_in_chunks_too(model: str, answers: Answers) -> None:
    alone, output = answers.read(Question(model)), answers.read(Question(model, shape="chunks of 32 tokens"))
    assert output.digest == alone.digest != answers.read(Question("demo")).digest


@pytest.mark.time_limit(400)
def test_rows_of_every_kind_are_answered(answers: Answers) -> None:
    alone = answers.read(Question("demo"))
    failed = [line for line in alone.lines if "error" in line]
    assert all(line["error"]["code"] == "prompt_too_long" for line in failed)
    assert len(failed) < 10
    assert any(len(line.get("choices", [])) == 2 for line in alone.lines)
    assert alone.counts("mixed_batches") > 0
    stopped = [line for line in alone.lines[3::8] if line.get("finish_reason") == "stop"]
    assert stopped
    assert not any(stop in line["text"] for line in stopped for stop in ("the", "e r", "\n"))


@pytest.mark.time_limit(400)
def test_tiny_models_are_prefilled_in_chunks(answers: Answers) -> None:
    assert all(answers.read(Question(family)).counts("chunks") > 0 for family in FAMILIES)


@pytest.mark.time_limit(400)
def test_another_seed_gives_another_answer(answers: Answers) -> None:
    alone, other = answers.read(Question("demo")), answers.read(Question("demo", seed=8))
    assert other.digest != alone.digest
    assert other.lines[0::8] == alone.lines[0::8]  # greedy rows
