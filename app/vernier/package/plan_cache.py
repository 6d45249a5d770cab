"""The folder of plans rebuilt on this machine and of latency curves measured on it.

It lies outside the verified packages (`<engines>/.cache/<model>/<version>/`, or under
VERNIER_CACHE_DIR), because a package never changes after its build:

    index.json     a PlanEntry for each plan, with the plan's and the variant's sha256
    curves.json    latency per bucket, keyed by the plan's sha256 and the GPU's name
    *.plan         named after their own hash
    *.timing       TensorRT's timing caches, one for each runtime version and architecture

Deserializing a plan runs native code, so the folder must belong to this user (or root) and be
writable by nobody else; otherwise it is not read at all. Every plan is compared with the index's
hash first. Several processes may share the folder: writers take a lock, readers see whole files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Type, TypeVar

from pydantic import Field, ValidationError

from vernier.errors import PackageError
from vernier.package.manifest import Model, PlanEntry
from vernier.package.plans import Target

try:
    import fcntl
except ImportError:  # not a POSIX system: one process at a time
    fcntl = None  # type: ignore[assignment]

INDEX_NAME = "index.json"
CURVES_NAME = "curves.json"
_LOCK_NAME = ".lock"
_BUILD_LOCK_NAME = ".building"

_Index = TypeVar("_Index", bound=Model)


def plan_entry(
    data: bytes,
    precision: str,
    target: Target,
    variant_sha256: str,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
) -> PlanEntry:
    """The entry of a plan that was built on `target`; its path is a name made from its own hash."""
    digest = hashlib.sha256(data).hexdigest()
    return PlanEntry(
        path=f"{precision}-{digest[:16]}.plan",
        sha256=digest,
        bytes=len(data),
        precision=precision,
        runtime=target.runtime,
        runtime_version=target.runtime_version,
        compute_capability="" if hardware_compatible else target.compute_capability,
        variant_sha256=variant_sha256,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )


class PlanIndex(Model):
    plans: List[PlanEntry] = Field(default_factory=list)


class CurveEntry(Model):
    """Median seconds of one execution, by bucket (as text), of one plan on one kind of GPU."""

    plan_sha256: str
    device_name: str
    seconds: Dict[str, float]


class CurveIndex(Model):
    curves: List[CurveEntry] = Field(default_factory=list)


def cache_folder(engines_dir: Path, cache_dir: Optional[Path], model: str, version: int) -> Path:
    """Where the cache of one package lies; `cache_dir` is the setting of that name."""
    return (cache_dir or engines_dir / ".cache") / model / str(version)


class PlanCache:
    """One package's folder. Methods raise PackageError for a folder that must not be trusted.

    A folder that cannot be written is no error of the caller's: `add` raises OSError, and the plan is
    then used from memory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # --- plans ------------------------------------------------------------------------------------
    def plans(self) -> List[PlanEntry]:
        """Every plan of the index; none when there is no index or it is damaged (plans are rebuilt then)."""
        return self._read_index().plans

    def read(self, entry: PlanEntry) -> bytes:
        """The plan's bytes, compared with the index's hash. Raises PackageError."""
        self._require_private()
        path = self.folder / entry.path
        if Path(entry.path).name != entry.path:
            raise PackageError(f"{self.folder / INDEX_NAME} names a file outside its folder: '{entry.path}'")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise PackageError(f"cannot read the rebuilt plan {path}: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise PackageError(
                f"{path} does not have the sha256 of its index: it was truncated or changed; it will be rebuilt"
            )
        return data

    def add(
        self,
        data: bytes,
        precision: str,
        target: Target,
        variant_sha256: str,
    ) -> PlanEntry:
        """Writes a plan, then its entry in place of older ones for the same target. Raises OSError."""
        entry = plan_entry(data, precision, target, variant_sha256)
        with self._locked():
            write_whole(self.folder / entry.path, data)
            known = self._read_index().plans
            replaced = [old for old in known if _same_place(old, entry)]
            index = PlanIndex(plans=[*(old for old in known if old not in replaced), entry])
            write_whole(self.folder / INDEX_NAME, index.model_dump_json(indent=2).encode())
            for old in replaced:
                if old.path != entry.path:
                    with contextlib.suppress(FileNotFoundError):
                        (self.folder / Path(old.path).name).unlink()
        return entry

    def discard(self, entry: PlanEntry) -> None:
        """Takes a plan out of the index and removes its file. Raises OSError."""
        with self._locked():
            index = PlanIndex(plans=[known for known in self._read_index().plans if known != entry])
            write_whole(self.folder / INDEX_NAME, index.model_dump_json(indent=2).encode())
            with contextlib.suppress(FileNotFoundError):
                (self.folder / Path(entry.path).name).unlink()

    def timing_cache(self, target: Target) -> Path:
        """The path of the builder's timing cache for this runtime version and GPU architecture."""
        sm = target.compute_capability.replace(".", "")
        return self.folder / f"{target.runtime}-{target.runtime_version}-sm{sm}.timing"

    def kernels(self, target: Target, precision: str) -> Path:
        """The path of the kernels that tensorrt-rtx compiles at run time."""
        sm = target.compute_capability.replace(".", "")
        return self.folder / f"{precision}-{target.runtime}-{target.runtime_version}-sm{sm}.kernels"

    def prepare(self) -> None:
        """Makes the folder, for this user alone. Raises OSError, PackageError."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._require_private()

    @contextlib.contextmanager
    def build_turn(self, wait: Callable[[], None]) -> Iterator[None]:
        """Held while a plan is built, by one process at a time.

        Args:
            wait: called again and again while another process has its turn; what it raises ends the waiting.
        """
        try:
            self.prepare()
            handle = os.open(self.folder / _BUILD_LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        except (OSError, PackageError):  # what cannot be kept cannot be shared either
            yield
            return
        try:
            while fcntl is not None and not _try_lock(handle):
                wait()
            yield
        finally:
            os.close(handle)

    # --- latency curves ---------------------------------------------------------------------------
    def curve(self, plan_sha256: str, device_name: str) -> Optional[Dict[int, float]]:
        """Bucket → median seconds, as measured before; None when it was not."""
        for entry in self._read_curves().curves:
            if (entry.plan_sha256, entry.device_name) == (plan_sha256, device_name):
                return {int(bucket): seconds for bucket, seconds in entry.seconds.items()}
        return None

    def save_curve(self, plan_sha256: str, device_name: str, seconds: Mapping[int, float]) -> None:
        """Raises OSError."""
        entry = CurveEntry(
            plan_sha256=plan_sha256,
            device_name=device_name,
            seconds={str(bucket): value for bucket, value in sorted(seconds.items())},
        )
        with self._locked():
            kept = [
                c
                for c in self._read_curves().curves
                if (c.plan_sha256, c.device_name) != (plan_sha256, device_name)
            ]
            text = CurveIndex(curves=[*kept, entry]).model_dump_json(indent=2)
            write_whole(self.folder / CURVES_NAME, text.encode())

    # --- the folder -------------------------------------------------------------------------------
    def _read_index(self) -> PlanIndex:
        return self._read(INDEX_NAME, PlanIndex)

    def _read_curves(self) -> CurveIndex:
        return self._read(CURVES_NAME, CurveIndex)

    def _read(self, name: str, kind: Type[_Index]) -> _Index:
        """An empty one where the file is missing or damaged."""
        self._require_private()
        try:
            return kind.model_validate_json((self.folder / name).read_bytes())
        except (OSError, ValidationError):
            return kind()

    def _require_private(self) -> None:
        try:
            status = self.folder.stat()
        except OSError:
            return
        if hasattr(os, "getuid") and (status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022):
            raise PackageError(
                f"the plan cache {self.folder} can be written by other users, and a plan is native code: "
                f"make it private (chmod 700) or set VERNIER_CACHE_DIR to a folder of your own"
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.prepare()
        handle = os.open(self.folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _same_place(old: PlanEntry, new: PlanEntry) -> bool:
    """Whether `new` makes `old` useless: the same precision for the same runtime and GPU."""
    return (old.precision, old.runtime, old.runtime_version, old.compute_capability) == (
        new.precision,
        new.runtime,
        new.runtime_version,
        new.compute_capability,
    )


def write_whole(path: Path, data: bytes) -> None:
    """Replaces a file in one step for readers; the temporary file is removed on failure. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
