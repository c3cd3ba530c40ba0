"""The documents say what is true: links lead somewhere, the command reference is that of --help."""

import re
import runpy
from pathlib import Path

import pytest
from sources import CHECKOUT

SKIPPED = {".venv", ".git", ".pytest_cache", "demo", "node_modules"}
DOCUMENTS = [path for path in sorted(CHECKOUT.rglob("*.md")) if not SKIPPED & set(path.relative_to(CHECKOUT).parts)]


def without_code(text: str) -> str:
    """Leave out code blocks and code in a line."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(document: Path) -> set[str]:
    """The names that headings of a document can be linked by."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def plain(text: str) -> list[str]:
    """Words, without what differs between versions of argparse."""
    text = text.replace("optional arguments:", "options:")
    text = re.sub(r"(-\w+|--[\w-]+) (\[?[A-Z]+\]?|\{[^}]*\}), (?=--?\w)", r"\1, ", text)  # -s ARG, --long ARG
    return re.sub(r"[\[\]]", " ", text).split()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text())):
        target, _, anchor = link.partition("#")
        if ":" in target:
            continue
        path = document.parent / target if target else document
        assert path.exists(), f"{document}: {link}"
        assert not anchor or anchor in anchors(path), f"{document}: {link}"


def test_command_reference_is_that_of_help() -> None:
    render = runpy.run_path(str(CHECKOUT / "scripts/commands-doc"))["render"]
    written = (CHECKOUT / "docs/commands.md").read_text()
    assert plain(written) == plain(render()), "run scripts/commands-doc and read the difference"


def test_flags_in_documents_exist() -> None:
    reference = (CHECKOUT / "docs/commands.md").read_text()
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", reference))
    for document in DOCUMENTS:
        for call in re.findall(r"hpcinfer(?:\.run)? [^`\n|#]*", document.read_text()):
            flags = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", call))
            assert flags <= known, f"{document}: {sorted(flags - known)} in {call!r}"


def test_scripts_and_launchers_are_named_in_a_document() -> None:
    text = "".join(path.read_text() for path in DOCUMENTS)
    scripts = [path for folder in ("scripts", "launch", "slurm") for path in (CHECKOUT / folder).iterdir()]
    assert not [str(path) for path in scripts if path.is_file() and f"{path.parent.name}/{path.name}" not in text]
