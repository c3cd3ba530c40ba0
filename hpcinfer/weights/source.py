"""A Hugging Face folder as the source of a conversion: its config, its tensors by name, its tokenizer files."""

import json
from pathlib import Path
from types import TracebackType

import numpy as np

from hpcinfer.config import ModelConfig
from hpcinfer.errors import ModelError
from hpcinfer.weights.families import read_config
from hpcinfer.weights.safetensors_file import SafetensorsFile
from hpcinfer.weights.schema import param_specs, source_name

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


class Source:
    """An open Hugging Face folder. Use as a context manager: it holds its files open."""

    def __init__(self, folder: Path) -> None:
        """Read the small files of a folder; of the safetensors files only the names of their tensors.

        Not collective.

        Raises:
            ModelError: a model that is not supported or not complete.
        """
        self.folder = folder
        self.config: ModelConfig = read_config(folder)
        self.tokenizer_files = _read_tokenizer(folder)
        self._open: dict[str, SafetensorsFile] = {}
        self._file_of = _read_weight_map(folder) if (folder / INDEX).exists() else {}
        if (folder / SINGLE).exists():
            self._file_of = dict.fromkeys(self._file(SINGLE).entries, SINGLE)
        if not self._file_of:
            raise _no_weights(folder)
        self._check_names()

    def __enter__(self) -> "Source":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files. Not collective."""
        for file in self._open.values():
            file.close()

    @property
    def weight_files(self) -> list[str]:
        """Names of the safetensors files, sorted."""
        return sorted(set(self._file_of.values()))

    def path_of(self, name: str) -> Path:
        """File that holds a tensor. Not collective."""
        return self.folder / self._file_of[name]

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name. Not collective."""
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Not collective."""
        return self._holder(name).entries[name].shape

    def dtype(self, name: str) -> str:
        """Element type of a tensor. Not collective."""
        return self._holder(name).dtype(name)

    def read(self, name: str, rows: range | None = None) -> np.ndarray:
        """Read a tensor, or some rows of it, as stored. Not collective."""
        return self._holder(name).read(name, rows)

    def check_tied_head(self) -> None:
        """Compare an output head in the checkpoint of a tied model with the embedding that it must repeat.

        Not collective.

        Raises:
            ModelError: they differ.
        """
        head, embedding = "lm_head.weight", source_name("embed_tokens.weight")
        if not (self.config.tie_word_embeddings and self.has(head)):
            return
        same_shape = self.shape(head) == self.shape(embedding) and self.dtype(head) == self.dtype(embedding)
        if not same_shape or self.read(head).tobytes() != self.read(embedding).tobytes():
            raise ModelError(
                f"{head} differs from {embedding}",
                expected="equal tensors, as tie_word_embeddings says",
                where=str(self.path_of(head)),
                hint="set tie_word_embeddings to false in config.json",
            )

    def _holder(self, name: str) -> SafetensorsFile:
        file = self._file(self._file_of[name])
        if name not in file.entries:
            raise ModelError(f"tensor {name} is missing", expected=f"it where {INDEX} says", where=str(file.path))
        return file

    def _file(self, file_name: str) -> SafetensorsFile:
        if file_name not in self._open:
            self._open[file_name] = SafetensorsFile(self.folder / file_name)
        return self._open[file_name]

    def _check_names(self) -> None:
        expected = {source_name(spec.name) for spec in param_specs(self.config, grains=1)}
        missing = sorted(expected - set(self._file_of))
        if missing:
            hint = "is tie_word_embeddings right in config.json?" if missing == ["lm_head.weight"] else ""
            raise ModelError(
                f"{len(missing)} tensors are missing: {_some(missing)}",
                expected="all parameters of the model",
                where=str(self.folder),
                hint=hint,
            )
        unknown = sorted(name for name in set(self._file_of) - expected if not _is_harmless(name))
        if unknown:
            raise ModelError(
                f"{len(unknown)} tensors do not belong to a {self.config.architecture}: {_some(unknown)}",
                expected="a checkpoint that fits its config.json",
                where=str(self.folder),
                hint="merge adapters into the model first; take the original checkpoint of a quantised model",
            )


def _is_harmless(name: str) -> bool:
    """Whether a tensor may be left out: recomputed frequencies, or the output head that repeats a tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read_tokenizer(folder: Path) -> dict[str, bytes]:
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}
    if "tokenizer.json" not in files:
        raise ModelError(
            "no tokenizer.json",
            expected="a fast tokenizer beside the weights",
            where=str(folder),
            hint="AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers writes one",
        )
    for name in (name for name in files if name.endswith(".json")):
        try:
            json.loads(files[name])
        except ValueError as error:
            raise ModelError(f"{name} is no JSON: {error}", where=str(folder / name), hint="fetch it again") from error
    return files


def _read_weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{INDEX} cannot be read: {type(error).__name__}: {error}", where=str(path)) from error
    for file in sorted(set(names.values())):
        if Path(file).name != file or not (folder / file).exists():
            raise ModelError(
                f"{INDEX} names {file}, which is not there",
                expected="all files in one folder",
                where=str(folder),
                hint="fetch the model again",
            )
    return names


def _no_weights(folder: Path) -> ModelError:
    expected, hint = f"{SINGLE} or {INDEX}", ""
    if any(folder.glob("pytorch_model*.bin")) or any(folder.glob("*.pt*")):
        expected += " (pickled weights are never read: they can run code)"
        hint = "model.save_pretrained(FOLDER) of transformers writes safetensors; do it where you trust the file"
    return ModelError("no safetensors weights", expected=expected, where=str(folder), hint=hint)
