"""Who is compared: what to install, how to start it, how it is spoken to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson

from benchmarks.load import Call, FloatOutput, JsonOutput, post
from benchmarks.peers.workloads import Workload

SERVERS = Path(__file__).parent / "servers"
RAW = "application/octet-stream"

#: One request of a workload: its input and the right answer.
Say = Callable[[np.ndarray, np.ndarray], Call]


@dataclass(frozen=True)
class Place:
    """Where a server is to run: the Python of its environment, its port and another free one, and the engines."""

    python: str
    port: int
    second_port: int
    workload: Workload
    engines: Path


@dataclass(frozen=True)
class Peer:
    """
    Attributes:
        name: of its environment.
        title: for the page.
        requirements: pinned; none for Vernier and what runs in its environment.
        package: whose version stands for it.
        says: by workload, how a request is written; a workload that is missing is not measured.
        formats: by workload, in words.
        command: starts it.
        environment: variables for it.
        why_not: by workload, why it is missing.
        system_python: use Debian's Python and not the one that runs this.
        survives_pause: it can be stopped for a minute; otherwise it is started anew for each round.
    """

    name: str
    title: str
    requirements: tuple[str, ...]
    package: str
    says: Mapping[str, Say]
    formats: Mapping[str, str]
    command: Callable[[Place], list[str]]
    environment: Callable[[Place], dict[str, str]] = lambda place: {}
    why_not: Mapping[str, str] = field(default_factory=dict)
    system_python: bool = False
    survives_pause: bool = True


# --- requests -------------------------------------------------------------------------------------
def _json(path: str, wrap: Callable[[np.ndarray], object], *answer: str | int) -> Say:
    def say(x: np.ndarray, y: np.ndarray) -> Call:
        body = orjson.dumps(wrap(x), option=orjson.OPT_SERIALIZE_NUMPY)
        return Call(post(path, body), JsonOutput(answer, y.tolist()))

    return say


def _raw(path: str) -> Say:
    return lambda x, y: Call(post(path, x.tobytes(), RAW), FloatOutput(y.tolist()))


def _vernier_raw(model: str) -> Say:
    def say(x: np.ndarray, y: np.ndarray) -> Call:
        return Call(
            post(f"/v1/predict?model={model}", x.tobytes(), RAW), JsonOutput(("outputs", "y"), y.tolist())
        )

    return say


def _triton_json(x: np.ndarray) -> object:
    return {"inputs": [{"name": "x", "shape": [1, *x.shape], "datatype": "FP32", "data": x.ravel()}]}


def _triton_raw(x: np.ndarray, y: np.ndarray) -> Call:
    """Triton's binary extension: a JSON head, the input's bytes behind it; the same in the answer."""
    head = orjson.dumps(
        {
            "inputs": [
                {
                    "name": "x",
                    "shape": [1, *x.shape],
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": x.nbytes},
                }
            ],
            "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
        }
    )
    headers = {"inference-header-content-length": str(len(head))}
    return Call(
        post("/v2/models/model/infer", head + x.tobytes(), RAW, headers=headers), FloatOutput(y.tolist())
    )


def _echo(x: np.ndarray, y: np.ndarray) -> Call:
    body = orjson.dumps(x, option=orjson.OPT_SERIALIZE_NUMPY)
    return Call(post("/", body), JsonOutput((), x.ravel().tolist()))


def _echo_raw(x: np.ndarray, y: np.ndarray) -> Call:
    return Call(post("/", x.tobytes(), RAW), FloatOutput(x.ravel().tolist()))


def _drain(x: np.ndarray, y: np.ndarray) -> Call:
    return Call(post("/", x.tobytes(), RAW), JsonOutput((), ()))


# --- starting -------------------------------------------------------------------------------------
def _script(name: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        workload = place.workload
        return [place.python, str(SERVERS / name), str(place.port), str(workload.model), workload.name]

    return command


def _bare(what: str) -> Callable[[Place], list[str]]:
    return lambda place: [place.python, str(SERVERS / "bare.py"), str(place.port), what]


def _by_variables(place: Place) -> dict[str, str]:
    return {"PEER_MODEL": str(place.workload.model), "PEER_WORKLOAD": place.workload.name}


def _bentoml(place: Place) -> list[str]:
    address = ["--host", "127.0.0.1", "--port", str(place.port)]
    return [
        *(place.python, "-m", "bentoml", "serve", "bentoml_service:Rows"),
        *("--working-dir", str(SERVERS), *address),
    ]


def _vernier(place: Place) -> dict[str, str]:
    return {
        "VERNIER_HOST": "127.0.0.1",
        "VERNIER_PORT": str(place.port),
        "VERNIER_ENGINES_DIR": str(place.engines),
        "VERNIER_LOG_LEVEL": "error",
    }


VERNIER = Peer(
    name="vernier",
    title="Vernier",
    requirements=(),
    package="vernier",
    says={
        "json": _json("/v1/predict", lambda x: {"model": "mlp", "inputs": {"x": x[None]}}, "outputs", "y"),
        "binary": _vernier_raw("mlp"),
        "large": _vernier_raw("last_pixels"),
    },
    formats={"json": "JSON", "binary": "raw float32 in, JSON out", "large": "raw float32 in, JSON out"},
    command=lambda place: [sys.executable, "-m", "vernier"],
    environment=_vernier,
)

PEERS = (
    VERNIER,
    Peer(
        name="mosec",
        title="MOSEC",
        requirements=("mosec==0.9.8", "onnxruntime==1.32.0", "numpy==2.4.6", "orjson==3.13.0"),
        package="mosec",
        says={
            "json": _json("/inference", lambda x: {"x": x}, "y"),
            "binary": _raw("/inference"),
            "large": _raw("/inference"),
        },
        formats={"json": "JSON", "binary": "raw float32", "large": "raw float32"},
        command=lambda place: [place.python, str(SERVERS / "mosec_server.py"), str(place.port)],
        environment=_by_variables,
        survives_pause=False,  # it once answered nothing afterwards
    ),
    Peer(
        name="fastapi",
        title="FastAPI + ONNX Runtime",
        requirements=(
            *("fastapi==0.165.0", "uvicorn==0.54.0", "uvloop==0.23.0", "httptools==0.9.0"),
            *("onnxruntime==1.32.0", "numpy==2.4.6"),
        ),
        package="fastapi",
        says={
            "json": _json("/predict", lambda x: {"x": x[None]}, "y"),
            "binary": _raw("/raw"),
            "large": _raw("/raw"),
        },
        formats={"json": "JSON", "binary": "raw float32", "large": "raw float32"},
        command=_script("fastapi_onnxruntime.py"),
    ),
    Peer(
        name="pytriton",
        title="Triton's Python backend (PyTriton)",
        requirements=("nvidia-pytriton==0.7.0", "onnxruntime==1.32.0"),
        package="nvidia-pytriton",
        says={
            "json": _json("/v2/models/model/infer", _triton_json, "outputs", 0, "data"),
            "binary": _triton_raw,
            "large": _triton_raw,
        },
        formats={"json": "JSON", "binary": "Triton's binary extension", "large": "Triton's binary extension"},
        command=_script("pytriton_server.py"),
        environment=lambda place: {"PEER_SECOND_PORT": str(place.second_port)},
        system_python=True,
        survives_pause=False,
    ),
    Peer(
        name="litserve",
        title="LitServe",
        requirements=(
            "litserve==0.2.19",
            "onnxruntime==1.32.0",
            "numpy==2.4.6",
            "uvloop==0.23.0",
            "httptools==0.9.0",
        ),
        package="litserve",
        says={"json": _json("/predict", lambda x: {"x": x}, "y")},
        formats={"json": "JSON"},
        command=_script("litserve_server.py"),
        why_not=dict.fromkeys(("binary", "large"), "it reads JSON and forms only"),
    ),
    Peer(
        name="bentoml",
        title="BentoML",
        requirements=("bentoml==1.4.40", "onnxruntime==1.32.0"),
        package="bentoml",
        says={"json": _json("/predict", lambda x: {"x": x[None]})},
        formats={"json": "JSON"},
        command=_bentoml,
        environment=lambda place: {**_by_variables(place), "BENTOML_DO_NOT_TRACK": "True"},
        why_not=dict.fromkeys(("binary", "large"), "its arrays travel as JSON or as pickle"),
    ),
    Peer(
        name="ray",
        title="Ray Serve",
        requirements=("ray[serve]==2.60.0", "onnxruntime==1.32.0"),
        package="ray",
        says={"json": _json("/", lambda x: {"x": x}, "y"), "binary": _raw("/"), "large": _raw("/")},
        formats={"json": "JSON", "binary": "raw float32", "large": "raw float32"},
        command=_script("ray_serve.py"),
        survives_pause=False,
    ),
    Peer(
        name="uvicorn",
        title="bare uvicorn, echo",
        requirements=(),
        package="uvicorn",
        says={"json": _echo, "binary": _echo_raw},
        formats={"json": "JSON", "binary": "raw float32"},
        command=_bare("echo"),
    ),
    Peer(
        name="uvicorn-drain",
        title="bare uvicorn that only reads the body",
        requirements=(),
        package="uvicorn",
        says={"large": _drain},
        formats={"large": "raw float32 in, two bytes out"},
        command=_bare("drain"),
    ),
)
