"""The errors of hpcinfer, one family.

HpcInferError
├── ConfigError            a wrong job: option, path, environment (exit code 2)
│   ├── MeshError          the ranks do not form the mesh that was asked for
│   ├── ModelError         a model that cannot be found, read or supported
│   └── ManifestError      a job directory that belongs to another job
├── StorageError           the file system refuses: full, over quota, read-only, not permitted
├── StoreError             a store that is damaged: names file, dataset and chunk
├── JobDirectoryError      a job directory that is damaged or cannot be written
├── RequestError           one row that cannot be served: becomes that row's error record
├── PeerError              another rank failed; this one ends too, quietly
└── RankFailedError        a rank has died, and the MPI lets the others go on
    └── RevokedError       a survivor has ended the communication of this group

Every message has four parts: what was found, what was expected, where, and a hint.
"""

import errno
import os

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_RESUMABLE = 75


class HpcInferError(Exception):
    """Base of all errors that hpcinfer raises on purpose."""

    exit_code = EXIT_FAILED

    def __init__(self, found: str, *, expected: str = "", where: str = "", hint: str = "") -> None:
        self.found, self.expected, self.where, self.hint = found, expected, where, hint
        super().__init__(found)

    def __str__(self) -> str:
        parts = (("expected", self.expected), ("where", self.where), ("hint", self.hint))
        return "\n".join([self.found, *(f"  {name}: {text}" for name, text in parts if text)])


class StorageError(HpcInferError):
    """The file system refuses: full, over quota, read-only, not permitted."""


class ConfigError(HpcInferError):
    """A wrong job: refused on all ranks before any work."""

    exit_code = EXIT_USAGE


class MeshError(ConfigError):
    """The world does not form the mesh that was asked for."""


class ModelError(ConfigError):
    """A model that cannot be found, read or supported."""


class ManifestError(ConfigError):
    """A job directory that was made by another job."""


class StoreError(HpcInferError):
    """A store whose bytes are not what was written."""


class JobDirectoryError(HpcInferError):
    """A job directory that is damaged or cannot be written."""


class RequestError(HpcInferError):
    """One row that cannot be served; `code` is the machine-readable kind of the error record."""

    def __init__(self, code: str, message: str, *, param: str = "") -> None:
        super().__init__(message)
        self.code, self.param = code, param


class PeerError(HpcInferError):
    """Another rank failed and has said why; this rank only ends."""


class RankFailedError(HpcInferError):
    """A rank of the group has died; the others can go on without it."""


class RevokedError(RankFailedError):
    """A rank has left the group for good: no message will come any more."""


_REFUSALS = {
    errno.ENOSPC: "make room; the same command goes on",
    errno.EDQUOT: "make room in your quota; the same command goes on",
    errno.EROFS: "is the file system mounted read-only here?",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
}


def storage_error(error: BaseException) -> StorageError | None:
    """Turn an error of the system that is the site's and not ours into words; None for all others."""
    if not isinstance(error, OSError) or error.errno not in _REFUSALS:
        return None
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    return StorageError(os.strerror(error.errno), where=where, hint=_REFUSALS[error.errno])
