"""Opens calibration and evaluation data: an .npz file, a folder of .npy files, or a Python function.

Whatever the source, the result is one array per name with the samples along the first axis. Large arrays are
never held, so that memory does not grow with the data: they stay in their file and are read by rows, and what has
no file of its own (compressed data, a function's batches) is mapped from a copy that no other process sees.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import shutil
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from vernier.builder.samples.stored import StoredArray
from vernier.errors import BuildError
from vernier.package.integrity import temporary_folder
from vernier.tensors import Array, Arrays

#: Arrays up to this size are simply read.
_IN_MEMORY_BYTES = 64 << 20


def open_source(source: str, names: Iterable[str]) -> Arrays:
    """Opens `source`; `names` are the inputs and labels that a folder is searched for.

    Raises:
        BuildError: nothing is there, it is damaged, or it holds Python objects.
    """
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, names)
    if path.is_file():
        return _open_file(path, names)
    module, separator, function = source.rpartition(":")
    if separator and module and function.isidentifier():
        return _call(source, module, function)
    raise BuildError(
        f"there is no data at '{source}': give an .npz file, a folder of .npy files, or module:function"
    )


def _open_file(path: Path, names: Iterable[str]) -> Arrays:
    if path.suffix == ".npy":
        wanted = list(names)
        return {wanted[0]: _open_npy(path)}
    try:
        with zipfile.ZipFile(path) as archive, _scratch() as folder:
            return {
                member.filename.removesuffix(".npy"): _open_member(path, archive, member, folder / str(i))
                for i, member in enumerate(archive.infolist())
            }
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error) as error:
        raise BuildError(
            f"{path} is not a whole .npz file ({error}): write it again with numpy.savez"
        ) from error
    except ValueError as error:
        raise _not_plain(path, error) from error
    except OSError as error:
        raise BuildError(f"cannot read {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for files that outlive it only as mappings: nothing stays on disk, whatever happens."""
    with temporary_folder(Path(tempfile.gettempdir()), "vernier-data-", 0o700) as folder:
        yield folder


def _open_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, temporary: Path) -> Array:
    if member.file_size <= _IN_MEMORY_BYTES:
        with archive.open(member) as stream:
            return _checked(path, np.lib.format.read_array(stream, allow_pickle=False))
    if member.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as stored:
            # Its data follows a local header of 30 bytes plus two texts.
            stored.seek(member.header_offset + 26)
            name_bytes, extra_bytes = struct.unpack("<HH", stored.read(4))
            stored.seek(member.header_offset + 30 + name_bytes + extra_bytes)
            found = _stored(path, stored)
        if found is not None:
            return found
    with archive.open(member) as stream, temporary.open("wb") as target:
        shutil.copyfileobj(stream, target, 1 << 20)
    return _map_own(temporary)


def _stored(path: Path, stream: BinaryIO) -> Array | None:
    """The array whose .npy header `stream` stands at; None when it is in Fortran order, where samples are no rows."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("object arrays are pickles")
    if fortran and len(shape) > 1:
        return None
    return _checked(path, StoredArray(path, dtype, shape, stream.tell()))


def _open_npy(path: Path) -> Array:
    try:
        if path.stat().st_size <= _IN_MEMORY_BYTES:
            return _checked(path, np.load(path, allow_pickle=False))
        with path.open("rb") as stream:
            found = _stored(path, stream)
        if found is not None:
            return found
        with _scratch() as folder:
            shutil.copyfile(path, folder / "copy")
            return _map_own(folder / "copy")
    except (ValueError, EOFError) as error:
        raise _not_plain(path, error) from error
    except OSError as error:
        raise BuildError(f"cannot read {path}: {error.strerror or error}") from error


def _map_own(path: Path) -> Array:
    """Maps a file of ours."""
    return _checked(path, np.load(path, mmap_mode="r", allow_pickle=False))


def _not_plain(path: Path, error: Exception) -> BuildError:
    if "pickle" in str(error) or "object" in str(error).lower():
        return BuildError(
            f"{path} holds Python objects, which are never loaded: store plain arrays of one shape, "
            f"variable-length samples padded, with an input for their lengths"
        )
    return BuildError(f"{path} is damaged ({error}): write it again")


def _checked(path: Path | str, array: Any) -> Array:
    if not isinstance(array, (np.ndarray, StoredArray)) or array.dtype.hasobject:
        raise BuildError(f"{path} holds something other than plain arrays: store numbers of one shape")
    if array.ndim == 0:
        raise BuildError(f"{path} holds a single number where an array of samples belongs")
    return cast(Array, array)


def file_stem(name: str) -> str:
    """What the .npy file of an input is called: characters that trouble file systems become `_`."""
    return re.sub(r"[^A-Za-z0-9_.\-]", "_", name)


def _open_folder(folder: Path, names: Iterable[str]) -> Arrays:
    """One `<input>.npy` per input, or, for a single input, one file per sample in the order of names."""
    wanted = list(names)
    files = {path.stem: path for path in sorted(folder.glob("*.npy"))}
    if not files:
        raise BuildError(f"{folder} holds no .npy files: store one <input>.npy per input, samples first")
    found = {name: _open_npy(files[file_stem(name)]) for name in wanted if file_stem(name) in files}
    if wanted and wanted[0] not in found and not any(name in found for name in wanted[1:]):
        return _stack_files(folder, wanted[0], list(files.values()))
    return found


def _stack_files(folder: Path, name: str, files: list[Path]) -> Arrays:
    samples = (np.asarray(_open_npy(path))[None] for path in files)
    try:
        return _gather(({name: sample} for sample in samples), str(folder))
    except BuildError as error:
        raise BuildError(
            f"{folder} has no {file_stem(name)}.npy, and its files do not stack to samples of one shape: {error}"
        ) from error


def _call(source: str, module: str, function: str) -> Arrays:
    """Calls the function: it returns one mapping name → array, or an iterable of such mappings, batch by batch."""
    try:
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module).stem, module)
            if spec is None or spec.loader is None:
                raise ImportError(f"cannot load {module}")
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            sys.path.insert(0, "")
            try:
                loaded = importlib.import_module(module)
            finally:
                sys.path.remove("")
    except (ImportError, OSError, SyntaxError) as error:
        raise BuildError(f"cannot import the data source '{source}': {error}") from error
    target = getattr(loaded, function, None)
    if not callable(target):
        raise BuildError(f"'{module}' has no function '{function}': check the data source '{source}'")
    try:
        made = target()
        batches = [made] if isinstance(made, Mapping) else iter(made)
        return _gather(batches, source)
    except BuildError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise BuildError(f"the data source '{source}' failed with {type(error).__name__}: {error}") from error


def _gather(batches: Iterable[Any], source: str) -> Arrays:
    """Appends batches to one file per name, so that a generator may be longer than memory."""
    kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    counts: dict[str, int] = {}
    with _scratch() as folder:
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise BuildError(
                    f"'{source}' gave a {type(batch).__name__}: give mappings from input name to array"
                )
            for name, values in batch.items():
                array = _checked(source, np.asarray(values))
                kind = (array.dtype, array.shape[1:])
                if kinds.setdefault(str(name), kind) != kind:
                    raise BuildError(
                        f"'{source}' gave '{name}' as {kind[0]} {list(kind[1])} after {kinds[name][0]} "
                        f"{list(kinds[name][1])}: every batch needs one dtype and one shape but for the samples"
                    )
                counts[name] = counts.get(name, 0) + array.shape[0]
                with (folder / str(list(kinds).index(name))).open("ab") as stream:
                    np.ascontiguousarray(array).tofile(stream)
        arrays: Arrays = {}
        for position, (name, (dtype, shape)) in enumerate(kinds.items()):
            file, full = folder / str(position), (counts[name], *shape)
            arrays[name] = (
                np.memmap(file, dtype, "r", 0, full) if file.stat().st_size else np.empty(full, dtype)
            )
    return arrays
