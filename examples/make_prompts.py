"""Write the demo prompts: openings of documentation that the demo model never saw, and chat questions.

The same Python version gives the same file. Needs the standard library and tokenizers.

    python examples/make_prompts.py
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from demo_corpus import QUESTIONS, Document, load_corpus

PROMPT_WORDS = [4, 5, 6, 7, 8, 10, 12, 15, 18, 22, 28, 36, 48, 64, 90, 130, 180, 250]  # each is used four times
MAX_TOKENS = range(24, 97, 8)
SAMPLING: list[dict] = [{}, {"temperature": 0.8, "top_p": 0.9}]  # greedy, as generation_config.json says; sampled
WELL_KNOWN = {"str", "list", "dict", "set", "int", "os", "math", "json", "random", "shutil", "threading", "socket"}
SYSTEM = {"role": "system", "content": "You explain Python."}
HANDWRITTEN = [
    [{"role": "user", "content": "How do I read a file line by line?"}],
    [{"role": "user", "content": "What is the difference between a list and a tuple?"}],
    [SYSTEM, {"role": "user", "content": "What is an iterator?"}],
    [SYSTEM, {"role": "user", "content": "Explain exceptions in Python."}],
]


def is_prose(text: str) -> bool:
    """Tell whether a text is mostly sentences, not a table, a grammar or a session."""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return letters > 0.9 * len(text) and text[0].isupper() and ">>>" not in text


def opening(text: str, num_words: int) -> str:
    """Return the first words of a text with the whitespace between them."""
    words = list(re.finditer(r"\S+", text))[:num_words]
    return text[: words[-1].end()]


def plain_prompts(held_out: list[Document], rng: random.Random) -> list[str]:
    """Return the openings of documents; the long ones run on from one document into the next."""
    texts = [document.text for document in held_out if is_prose(document.text)]
    prompts = []
    for num_words in PROMPT_WORDS * 4:
        rng.shuffle(texts)
        long_enough = [text for text in texts if len(text.split()) >= 1.5 * num_words]
        text = long_enough[0] if num_words < 60 and long_enough else "\n\n".join(texts)
        if opening(text, num_words) in prompts:
            text = next(text for text in long_enough if opening(text, num_words) not in prompts)
        prompts.append(opening(text, num_words))
    return prompts


def questions(documents: list[Document], count: int, rng: random.Random) -> list[list[dict[str, str]]]:
    """Return chats of one question each about public names with a short description."""
    public = [document for document in documents if "_" not in document.name and 40 < len(document.text) < 500]
    chosen = rng.sample([document for document in public if is_prose(document.text)], count)
    asked = [rng.choice(QUESTIONS[document.kind]).format(document.name) for document in chosen]
    return [[{"role": "user", "content": question}] for question in asked]


def make_rows(documents: list[Document], seed: int) -> list[dict]:
    """Return the 96 rows: 72 openings and 24 chats, shuffled; half of them greedy, half sampled."""
    rng = random.Random(seed)
    held_out = [document for document in documents if document.is_held_out]
    known = [d for d in documents if not d.is_held_out and d.name.split(".")[0] in WELL_KNOWN]
    chats = questions(known, 14, rng) + questions(held_out, 6, rng) + HANDWRITTEN
    rows: list[dict] = [{"prompt": prompt} for prompt in plain_prompts(held_out, rng)]
    rows += [{"messages": messages} for messages in chats]
    rng.shuffle(rows)
    rows = [{**row, "max_tokens": rng.choice(MAX_TOKENS)} for row in rows]
    return [{**row, **rng.choice(SAMPLING)} for row in rows]


def main() -> None:
    """Write one JSON object per line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "prompts.jsonl", help="file to write")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    rows = make_rows(load_corpus(), args.seed)
    args.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
