"""A Hugging Face folder becomes a store: the ranks share its files, and root publishes it by one rename."""

import glob
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hpcinfer.agree import on_all, on_root
from hpcinfer.config import ModelConfig
from hpcinfer.errors import ConfigError, StoreError
from hpcinfer.units import format_bytes, format_seconds
from hpcinfer.weights.schema import UNQUANTISED, layer_specs, outer_specs, param_specs, stored_specs
from hpcinfer.weights.source import Source
from hpcinfer.weights.store_format import INDEX_FILE, MAX_CHUNK, OUTER_FILE, StoredParam, layer_file
from hpcinfer.weights.writer import Contents, Moments, Part, Shape, parts_of, sync, write_index, write_parameters

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

log = logging.getLogger(__name__)

LARGE_MODEL = 60 * 10**9  # parameters from which 16 grains are the default
MAX_GRAINS = 1024
_HASH_BLOCK = 1 << 22  # bytes
_ABANDONED_S = 24 * 3600.0  # a temporary folder that nobody wrote to for so long; hashing large sources takes hours


class Calibrator(Protocol):
    """Runs a model on a text, layer by layer, for the sake of the inputs of its weights."""

    facts: dict[str, Any]  # for the index: what the text was

    def moments(self, layer: int, owner: int) -> Moments:
        """Second moments of the inputs of a layer's weights, on the owner; empty on the other ranks.

        Collective over the group of the conversion; layers come in order.
        """


@dataclass(frozen=True)
class Recipe:
    """What a conversion makes of a model."""

    grains: int | None = None  # a power of two; None is 8, or 16 from about 60 B parameters
    quantization: str = UNQUANTISED  # none, int8, fp8 or int4
    calibrate: Callable[[Source, int], Calibrator] | None = None  # of source and grains; None rounds to nearest


def convert(
    src: Path, dst: Path, group: "Collectives", recipe: Recipe = Recipe(), *, existing_ok: bool = False
) -> None:
    """Write the store of a Hugging Face folder, whole or not at all.

    Collective over `group`.

    Args:
        src: folder with config.json, safetensors and tokenizer.json.
        dst: folder of the store, which must not exist yet.
        group: ranks that share the work.
        recipe: grains and quantisation.
        existing_ok: keep what another job has published at `dst` meanwhile, without an error.

    Raises:
        ModelError: a model that is not supported, not complete or damaged.
        ConfigError: `dst` exists, too little space, or a wrong number of grains.
    """
    source = on_all(group, lambda: Source(src))
    temporary = dst.parent / on_root(group, lambda: f"{dst.name}.tmp-{secrets.token_hex(4)}".encode()).decode()
    try:
        _convert(source, _Target(dst, temporary, existing_ok), group, recipe)
    except Exception as error:
        if group.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise StoreError(f"the store cannot be written: {error}", where=str(dst)) from error
        raise
    finally:
        source.close()


def default_grains(config: ModelConfig) -> int:
    """Grains of a store if nobody asks for a number: 8, or 16 from about 60 B parameters. Not collective."""
    return 16 if sum(math.prod(spec.shape) for spec in param_specs(config, 8)) >= LARGE_MODEL else 8


def store_size(source: Source, shape: Shape) -> int:
    """Bytes that the store of a source needs, but for a little of HDF5's own. Not collective."""
    return sum(part.spec.shape[0] * part.unit_bytes for part in _parts(source, shape))


class _Target:
    """Where a conversion writes, and how it ends."""

    def __init__(self, folder: Path, temporary: Path, existing_ok: bool) -> None:
        self.folder, self.temporary, self.existing_ok = folder, temporary, existing_ok

    def make(self, size_bytes: int) -> None:
        """Make the temporary folder where there is room for the store."""
        if self.folder.exists() and not self.existing_ok:
            raise _exists(self.folder)
        self.temporary.mkdir(parents=True)
        self._remove_abandoned()
        free = shutil.disk_usage(self.temporary).free
        if free < size_bytes:
            raise ConfigError(
                f"{format_bytes(free)} free",
                expected=f"{format_bytes(size_bytes)} for the store",
                where=str(self.folder),
                hint="name another folder, or make room",
            )

    def _remove_abandoned(self) -> None:
        """Delete what killed conversions left; only times that the file system wrote are compared."""
        now = self.temporary.stat().st_mtime
        for folder in self.folder.parent.glob(f"{glob.escape(self.folder.name)}.tmp-*"):
            try:
                is_old = all(now - item.stat().st_mtime > _ABANDONED_S for item in (folder, *folder.iterdir()))
            except OSError:
                continue  # it is gone meanwhile, or not ours to look at
            if is_old:
                log.info("removing %s, which a killed conversion left", folder)
                shutil.rmtree(folder, ignore_errors=True)

    def publish(self) -> None:
        """Give the finished folder its name; if another job was faster, its store stays."""
        sync(self.temporary)
        try:
            os.rename(self.temporary, self.folder)
        except OSError as error:
            if not self.folder.exists():
                raise
            if not (self.existing_ok and (self.folder / INDEX_FILE).exists()):
                raise _exists(self.folder) from error
            shutil.rmtree(self.temporary)
            log.info("another job has published %s meanwhile", self.folder)
        sync(self.folder.parent)


def _convert(source: Source, target: _Target, group: "Collectives", recipe: Recipe) -> None:
    started = time.monotonic()
    grains = on_all(group, lambda: _check_grains(source.config, recipe.grains))
    shape = Shape(grains, recipe.quantization)
    if group.rank == 0:
        log.info("converting %s to %s, %d grains", source.folder, target.folder, grains)
    on_root(group, lambda: _prepare(source, target, shape))
    calibrator = on_all(group, lambda: recipe.calibrate(source, grains) if recipe.calibrate else None)
    mine = _Share(source, shape, target.temporary, group).write(calibrator)
    shares = [json.loads(share) for share in group.all_gather_bytes(json.dumps(mine).encode())]
    quantization: dict[str, Any] = {} if shape.quantization == UNQUANTISED else {"weights": shape.quantization}
    if calibrator is not None:
        quantization["calibration"] = calibrator.facts
    on_root(group, lambda: _finish(source, target, Contents(grains, quantization, {}, []), shares))
    if group.rank == 0:
        log.info("converted to %s in %s", target.folder, format_seconds(time.monotonic() - started))


def _check_grains(config: ModelConfig, grains: int | None) -> int:
    if grains is None:
        return default_grains(config)
    if not 1 <= grains <= MAX_GRAINS or grains & (grains - 1):
        raise ConfigError(f"grains={grains}", expected=f"a power of two from 1 to {MAX_GRAINS}")
    return grains


def _prepare(source: Source, target: _Target, shape: Shape) -> bytes:
    for part in _parts(source, shape):
        if part.unit_bytes > MAX_CHUNK:
            raise ConfigError(
                f"a unit of {part.spec.name} has {format_bytes(part.unit_bytes)}",
                expected="less than 4 GiB",
                hint=f"more --grains than {shape.grains}",
            )
    target.make(store_size(source, shape))
    return b""


def _parts(source: Source, shape: Shape) -> list[Part]:
    specs = param_specs(source.config, shape.grains)
    return [part for spec in specs for part in parts_of(source, spec, shape.quantization)]


@dataclass
class _Share:
    """The files of one rank: round robin, outer, layer 0, layer 1, ..."""

    source: Source
    shape: Shape
    folder: Path
    group: "Collectives"

    def write(self, calibrator: Calibrator | None) -> dict[str, Any]:
        """Write this rank's files and hash its part of the source files.

        Collective over the group.
        """
        files, size = range(-1, self.source.config.num_layers), self.group.size  # -1: what stands outside the layers
        mine = files[self.group.rank :: size]
        if calibrator is None:
            written = on_all(self.group, lambda: [self._write_file(layer, {}) for layer in mine])
        else:
            rounds = [files[start : start + size] for start in range(0, len(files), size)]
            written = [params for layers in rounds for params in self._write_calibrated(layers, calibrator)]
        parameters = {name: param for params in written for name, param in params.items()}
        return {"parameters": parameters, "source_files": on_all(self.group, self._check_source)}

    def _write_calibrated(self, layers: range, calibrator: Calibrator) -> list[dict[str, StoredParam]]:
        """Write one file on each rank: first all ranks run the layers, then each rounds its own."""
        moments: Moments = {}
        for owner, layer in enumerate(layers):
            if layer >= 0:
                moments |= calibrator.moments(layer, owner)
        mine = layers[self.group.rank : self.group.rank + 1]
        return on_all(self.group, lambda: [self._write_file(layer, moments) for layer in mine])

    def _write_file(self, layer: int, moments: Moments) -> dict[str, StoredParam]:
        config, grains = self.source.config, self.shape.grains
        specs = outer_specs(config, grains) if layer < 0 else layer_specs(config, layer, grains)
        path = self.folder / (OUTER_FILE if layer < 0 else layer_file(layer))
        written = write_parameters(self.source, specs, self.shape, path, moments)
        log.debug("r%d wrote %s", self.group.rank, path.name)
        return written

    def _check_source(self) -> list[dict[str, Any]]:
        if self.group.rank == 0:
            self.source.check_tied_head()
        names = sorted(["config.json", *self.source.weight_files, *self.source.tokenizer_files])
        return [_describe_file(self.source.folder / name) for name in names[self.group.rank :: self.group.size]]


def _finish(source: Source, target: _Target, contents: Contents, shares: list[dict[str, Any]]) -> bytes:
    written = {name: StoredParam(*param) for share in shares for name, param in share["parameters"].items()}
    kind = contents.quantization.get("weights", UNQUANTISED)
    ordered = {spec.name: written[spec.name] for spec in stored_specs(source.config, contents.grains, kind)}
    parameters = {name: param._replace(checksums=tuple(param.checksums)) for name, param in ordered.items()}
    source_files = [file for share in shares for file in share["source_files"]]
    source_files.sort(key=lambda file: str(file["name"]))
    write_index(target.temporary, source, contents._replace(parameters=parameters, source_files=source_files))
    target.publish()
    return b""


def _describe_file(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return {"name": path.name, "size": path.stat().st_size, "sha256": digest.hexdigest()}


def _exists(folder: Path) -> ConfigError:
    return ConfigError(
        f"{folder} exists already", expected="a path where nothing is", hint="remove it, or name another"
    )
