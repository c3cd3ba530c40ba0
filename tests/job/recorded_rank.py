"""`hpcinfer run` that writes down, at its first token, what this rank has imported and which files it has opened.

On ranks but the root the list begins when modules are shared.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

opened: list[str] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes):
        opened.append(os.path.abspath(os.fsdecode(arguments[0])))


if __name__ == "__main__":
    sys.addaudithook(_note)
    import hpcinfer.run
    from hpcinfer.__main__ import main
    from hpcinfer.report.timeline import Timeline

    step, share_imports = Timeline.step, hpcinfer.run.share_imports

    def share(*arguments: Any) -> None:
        """Note what was opened before."""
        before = list(opened)
        share_imports(*arguments)
        if os.environ["OMPI_COMM_WORLD_RANK"] != "0":
            assert opened == before, opened[len(before) :]
            opened.clear()

    def first_step(timeline: Timeline, *values: Any, **more: Any) -> None:
        """Write it down, and go on as ever."""
        found = {"opened": list(opened), "modules": sorted(sys.modules)}
        Path(f"recorded.{os.environ['OMPI_COMM_WORLD_RANK']}").write_text(json.dumps(found))
        Timeline.step = step  # type: ignore[method-assign]
        step(timeline, *values, **more)

    hpcinfer.run.share_imports = share
    Timeline.step = first_step  # type: ignore[method-assign]
    raise SystemExit(main(["run", *sys.argv[1:]]))
