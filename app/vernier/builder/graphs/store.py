"""Reading and writing ONNX files of any size.

Protocol buffers end at 2 GiB, so a large model is never serialized whole: its weights go to one
external file beside it, and every tool that wants a serialized model gets one whose weights were
put aside. File names never come from the model: tensor names may hold any character.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from vernier.errors import BuildError

#: A model whose weights are larger is written with external data.
INLINE_LIMIT_BYTES = 1 << 30
#: Smaller tensors stay in the graph: shape inference reads shapes, axes and scales from them.
_SMALL_BYTES = 4096
_ALIGNMENT = 4096

_MAGIC = {
    b"\x89HDF": "a Keras/HDF5 file: convert it with tf2onnx",
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch checkpoint: export the model with torch.onnx.export",
    b"\x80\x02": "a Python pickle: export the model to ONNX from the framework that trained it",
    b"\x80\x04": "a Python pickle: export the model to ONNX from the framework that trained it",
    b"version https://git-lfs": "a Git LFS pointer: fetch the real file with `git lfs pull`",
    b"ptrt": "a serialized TensorRT engine: give the ONNX file that it was built from",
}


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The bodies of an If, Loop or Scan."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """`graph` and every graph inside it, outermost first."""
    yield graph
    for node in graph.node:
        for body in subgraphs(node):
            yield from all_graphs(body)


def copy_node(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def copy_model(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def unused_name(hint: str, taken: set[str]) -> str:
    """`hint`, with a number behind it where `taken` has the name already; added to `taken`."""
    name, number = hint, 0
    while name in taken:
        number += 1
        name = f"{hint}_{number}"
    taken.add(name)
    return name


def weight_bytes(model: ModelProto) -> int:
    """The size of all initializers that are held in memory, in bytes."""
    return sum(len(tensor.raw_data) for graph in all_graphs(model.graph) for tensor in graph.initializer)


def _refuse(path: Path, head: bytes, detail: str) -> BuildError:
    for magic, what in _MAGIC.items():
        if head.startswith(magic) or (magic == b"ptrt" and head[:4] in (b"ptrt", b"ftrt")):
            return BuildError(f"{path} is not an ONNX model but {what}")
    if head[:1] == b"\x08" and len(head) > 1 and head[1] < 0x40:
        return BuildError(f"{path} is truncated or damaged ({detail}): copy or export it again")
    return BuildError(f"{path} is not an ONNX model ({detail}): give a file written by an ONNX exporter")


def _parse(path: Path) -> ModelProto:
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
    except IsADirectoryError as error:
        raise BuildError(f"{path} is a folder: give the .onnx file inside it") from error
    except OSError as error:
        raise BuildError(f"cannot read {path}: {error.strerror}; give the path of an ONNX model") from error
    if not head:
        raise BuildError(f"{path} is empty: export the model again")
    try:
        model = onnx.load(os.fspath(path), format="protobuf", load_external_data=False)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise _refuse(path, head, "its contents end early or make no sense") from error
    if not model.HasField("graph") or not model.ir_version:
        raise _refuse(path, head, "it holds no graph")
    if not model.graph.output:
        raise BuildError(f"{path} has no outputs: it is truncated, or its export went wrong; export it again")
    if not model.opset_import and not model.functions:
        raise _refuse(path, head, "it does not say which opset it uses")
    return model


def _external_files(path: Path, model: ModelProto) -> list[Path]:
    """The external data files, sorted by name. Raises BuildError for a missing or too short one."""
    folder = path.parent.resolve()
    needed: dict[Path, int] = {}
    for graph in all_graphs(model.graph):
        for tensor in graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL:
                continue
            entries = {entry.key: entry.value for entry in tensor.external_data}
            file = (folder / entries.get("location", "")).resolve()
            if not file.is_relative_to(folder):
                raise BuildError(
                    f"{path} keeps weights outside its folder ({entries.get('location')}): "
                    f"move them beside the model and save it again"
                )
            end = int(entries.get("offset") or 0) + int(entries.get("length") or 0)
            needed[file] = max(needed.get(file, 0), end)
    for file, size in needed.items():
        if not file.is_file():
            raise BuildError(
                f"{path} keeps its weights in {file.name}, which is missing: copy it beside the model"
            )
        if file.stat().st_size < size:
            raise BuildError(
                f"{file} is truncated: it has {file.stat().st_size} bytes of {size}; copy it again"
            )
    return sorted(needed)


def _hash(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            for chunk in iter(lambda: stream.read(1 << 20), b""):
                digest.update(chunk)
    return digest.hexdigest()


def read_model(path: Path) -> tuple[ModelProto, str]:
    """Reads a model with its external data.

    Returns the model, every initializer in `raw_data`, and the sha256 of the file followed by its
    external files. Raises BuildError, in words, for whatever is not a whole ONNX model.
    """
    model = _parse(path)
    files = _external_files(path, model)
    try:
        onnx.load_external_data_for_model(model, os.fspath(path.parent))
    except (OSError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
        raise BuildError(f"cannot read the external weights of {path}: {error}") from error
    for graph in all_graphs(model.graph):
        for tensor in graph.initializer:
            _to_raw(path, tensor)
    return model, _hash([path, *files])


def input_names(path: Path) -> list[str]:
    """The inputs' names, weights left out, without reading external data. Raises BuildError."""
    graph = _parse(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [value.name for value in graph.input if value.name not in weights]


def _to_raw(path: Path, tensor: TensorProto) -> None:
    """Moves typed data fields to `raw_data` and checks its length against the shape."""
    if tensor.data_type == TensorProto.STRING:
        return
    try:
        if not tensor.HasField("raw_data"):
            name, doc = tensor.name, tensor.doc_string
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), name))
            tensor.doc_string = doc
        else:
            numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise BuildError(
            f"the weight '{tensor.name}' of {path} does not have the size of its shape "
            f"{list(tensor.dims)}: the file is damaged, export it again"
        ) from error


def skeleton(model: ModelProto) -> ModelProto:
    """A copy whose large weights keep name, type and shape and point to external data that nobody reads.

    It serializes to a small message whatever the size of the model. (Clearing and restoring fields of
    the model itself would leak: protobuf frees a field's memory only with the whole message.)
    """
    copy = ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            _assign(copy, field.name, value)
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _assign(copy.graph, field.name, value)
    copy.graph.SetInParent()
    for tensor in model.graph.initializer:
        if tensor.ByteSize() <= _SMALL_BYTES:
            copy.graph.initializer.append(tensor)
        else:
            _stub(copy.graph.initializer.add(), tensor, {"location": "aside"})
    return copy


def _assign(message: ModelProto | GraphProto, field: str, value: object) -> None:
    if hasattr(value, "CopyFrom"):
        getattr(message, field).CopyFrom(value)
    elif isinstance(value, (str, int)):
        setattr(message, field, value)
    else:
        getattr(message, field).extend(value)


def _stub(stub: TensorProto, tensor: TensorProto, place: dict[str, object]) -> None:
    stub.name = tensor.name
    stub.data_type = tensor.data_type
    stub.dims.extend(tensor.dims)
    stub.data_location = TensorProto.EXTERNAL
    for key, value in place.items():
        stub.external_data.add(key=key, value=str(value))


def write_model(model: ModelProto, path: Path, inline_limit_bytes: int = INLINE_LIMIT_BYTES) -> list[Path]:
    """Writes `model` and returns the files: the ONNX file, then its external data if it has any.

    The model itself is not changed. OSError (a full disk) is left to the caller.
    """
    if weight_bytes(model) <= inline_limit_bytes:
        try:
            path.write_bytes(model.SerializeToString(deterministic=True))
        except EncodeError as error:
            raise BuildError(f"cannot serialize the model ({error}): export it with external data") from error
        return [path]
    data_path = path.with_name(path.name + ".data")
    copy = skeleton(model)
    with data_path.open("wb") as stream:
        for stub, tensor in zip(copy.graph.initializer, model.graph.initializer, strict=True):
            if stub.data_location != TensorProto.EXTERNAL:
                continue
            stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
            place = {"location": data_path.name, "offset": stream.tell(), "length": len(tensor.raw_data)}
            stub.Clear()
            _stub(stub, tensor, place)
            stream.write(tensor.raw_data)
    path.write_bytes(copy.SerializeToString(deterministic=True))
    return [path, data_path]
