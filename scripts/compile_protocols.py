"""`python -m scripts.compile_protocols`: writes app/vernier/api/grpc/protocols.binpb from the .proto files beside it.

The service reads descriptors, not generated modules: those put their names into the pool of the whole process, where
they would meet the same names of a client such as tritonclient, and need a protobuf as new as the compiler.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from grpc_tools import protoc

FOLDER = Path(__file__).resolve().parents[1] / "app/vernier/api/grpc"
PROTOCOLS = FOLDER / "protocols.binpb"


def compile_protocols() -> bytes:
    """The serialized FileDescriptorSet."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        sources = sorted(path.name for path in FOLDER.glob("*.proto"))
        code = protoc.main(["protoc", f"-I{FOLDER}", f"--descriptor_set_out={out}", *sources])
        if code:
            raise SystemExit(f"protoc ended with {code}")
        return out.read_bytes()


if __name__ == "__main__":
    PROTOCOLS.write_bytes(compile_protocols())
