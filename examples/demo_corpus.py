"""The corpus of the demo model, documentation that every Python installation has, and its tokenizer.

The corpus is the topics of `help()`, the docstrings of the standard library's sources (read with `ast`, not imported)
and those of its compiled modules. The model is in train_demo_model.py.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
BEGIN, END, USER, ASSISTANT = SPECIAL_TOKENS = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'system' %}{{ message['content'] }}\
{% elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}\
{% else %}{{ '<|assistant|>' + message['content'] + eos_token }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
QUESTIONS = {
    "function": ["What does {} do?", "What is {} for?", "Explain the function {}.", "How does {} work?"],
    "class": ["What is the class {}?", "Describe the class {}.", "What is a {}?", "What is {} for?"],
    "module": ["What is the module {} for?", "Describe the module {}.", "What does the module {} do?"],
    "topic": ["Explain {} in Python.", "What should I know about {}?"],
}


class Document(NamedTuple):
    """One piece of documentation: what it is about, of which kind, and its text."""

    name: str
    kind: str  # a key of QUESTIONS
    text: str

    @property
    def is_held_out(self) -> bool:
        """Tell whether the document is among the 2 % that are never trained on."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 50 == 0


def source_documents(root: Path) -> Iterator[Document]:
    """Yield the docstrings in the Python files below `root`, read without importing them."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if skipped.isdisjoint(parts):
            name = ".".join(part for part in parts if part != "__init__")
            yield from docstrings(ast.parse(path.read_bytes()), name)


def docstrings(node: Documented, name: str) -> Iterator[Document]:
    """Yield the docstrings of a module, class or function and of all that it contains."""
    kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
    text = ast.get_docstring(node)
    if text:
        yield Document(name, kind, text)
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from docstrings(child, f"{name}.{child.name}")


def compiled_documents() -> Iterator[Document]:
    """Yield the docstrings of the standard library's compiled modules, their classes and functions."""
    for name in filter(is_compiled, sorted(sys.stdlib_module_names)):
        module = importlib.import_module(name)
        yield from described(module, name)
        for key, value in sorted(vars(module).items()):
            yield from described(value, f"{name}.{key}")
            if isinstance(value, type):
                for inner, member in sorted(vars(value).items()):
                    yield from described(member, f"{name}.{key}.{inner}")


def is_compiled(name: str) -> bool:
    """Tell whether a module is written in C and not only there to test the interpreter."""
    if name in sys.builtin_module_names:
        return True
    spec = importlib.util.find_spec(name)
    is_extension = spec is not None and isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)
    return is_extension and not name.startswith(("_test", "_xx", "xx"))


def described(value: object, name: str) -> Iterator[Document]:
    """Yield the docstring of a compiled object, if it has one of its own."""
    kind = "module" if inspect.ismodule(value) else "class" if isinstance(value, type) else "function"
    text = value.__doc__ if kind != "function" or callable(value) or inspect.isdatadescriptor(value) else None
    if isinstance(text, str):
        yield Document(name.replace("builtins.", ""), kind, inspect.cleandoc(text))


def load_corpus() -> list[Document]:
    """Return all documents, each text once, in an order that depends on the Python installation only."""
    warnings.simplefilter("ignore")  # invalid escapes in old sources, deprecated modules
    documents = [Document(name, "topic", inspect.cleandoc(text)) for name, text in sorted(topics.items())]
    documents += compiled_documents()
    documents += source_documents(Path(sysconfig.get_paths()["stdlib"]))
    unique = {document.text: document for document in reversed(documents) if len(document.text) >= 20}
    return list(reversed(unique.values()))


def render(document: Document, rng: random.Random) -> str:
    """Write a document for training: 15 % as a chat, 35 % as a titled text, else the bare text."""
    draw = rng.random()
    if draw < 0.15:
        question = rng.choice(QUESTIONS[document.kind]).format(document.name)
        system = "You explain Python." if draw < 0.03 else ""
        return f"{BEGIN}{system}{USER}{question}{ASSISTANT}{document.text}{END}"
    title = f"{document.name}\n\n" if draw < 0.5 else ""
    return f"{BEGIN}{title}{document.text}{END}"


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer that puts the begin token before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{document.name}\n\n{document.text}" for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    return tokenizer
