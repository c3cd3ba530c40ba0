"""Jobs that keep copies of the weights on the node's own disk."""

from pathlib import Path

from golden import DEMO_MODEL, demo_prompts, write_rows
from jobs import run_job


def test_copies_serve_the_next_job_and_change_no_byte(folder: Path) -> None:
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": text, "max_tokens": 3} for text in demo_prompts(4)])
    flags = ["--model", DEMO_MODEL, "--input", prompts, "-tp", "2"]
    outputs, warnings = [], []
    for number, more in enumerate([[], ["--stage", folder / "node"], ["--stage", folder / "node"]]):
        done = run_job(2, *flags, "--output", folder / f"{number}.jsonl", *more)
        assert done.rc == 0, done.stderr
        outputs.append((folder / f"{number}.jsonl").read_bytes())
        warnings.append("copies in" in done.stderr)
        for path in folder.glob("node/*/layer-0000.units"):  # is found by the next job, if it reads there
            path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    assert outputs[0] == outputs[1] == outputs[2]
    assert warnings == [False, False, True]
