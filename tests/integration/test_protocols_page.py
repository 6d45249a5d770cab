"""The clients on docs/protocols.md, as written, against the example ranker's graph."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from tests.support.packages import write_package
from tests.support.server import ROOT, Server, free_port, serve

PAGE = (ROOT / "docs" / "protocols.md").read_text()
CLIENTS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, int]]:
    root = tmp_path_factory.mktemp("page")
    model = onnx.load(ROOT / "examples" / "recommender" / "model.onnx")
    write_package(root / "engines", "ranker", model=model)
    port = free_port()
    with serve(root / "engines", root / "log", grpc_port=str(port)) as server:
        yield server, port


def test_clients_have_five_lines() -> None:
    assert len(CLIENTS) == 4
    for client in CLIENTS:
        lines = [line for line in client.splitlines() if line and not line.startswith("import")]
        assert len(lines) <= 5, client


@pytest.mark.parametrize("client", CLIENTS)
def test_each_client_gets_a_score(client: str, served: tuple[Server, int], tmp_path: Path) -> None:
    server, port = served
    here = client.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace(
        "127.0.0.1:8001", f"127.0.0.1:{port}"
    )
    done = subprocess.run([sys.executable, "-c", here], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.search(r"0\.\d{3}", done.stdout), done.stdout
