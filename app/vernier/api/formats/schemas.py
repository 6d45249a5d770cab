"""What /docs shows. The hot path does not validate with these; the codecs do, and tests hold the two together."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from vernier.package.manifest import EvidenceWarning

#: A real request to the example ranker, with its real answer in PredictAnswer.
EXAMPLE: dict[str, Any] = {
    "model": "ranker",
    "inputs": {
        "dense": [[-1.04, -1.09, 1.47, -0.06, -0.05, 0.44, -0.07, 0.56, -0.64, 0.97, -1.13, -0.76, 0.29]],
        "ids": [[1580, 1032, 15, 45, 19, 5, 2, 12]],
    },
    "timeout_ms": 1000,
}
_ANSWER: dict[str, Any] = {
    "id": "5f0c2a9b1d3e4f60",
    "model": "ranker",
    "version": "1",
    "precision": "fp32",
    "outputs": {"score": [[0.81423545]]},
    "timing": {"queue_ms": 0.031, "compute_ms": 0.084, "batch_size": 1},
}


class PredictBody(BaseModel):
    """A prediction. Only `inputs` is required when a single model is loaded."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": EXAMPLE})

    inputs: dict[str, Any] = Field(description="Input name → nested lists; the first axis is the batch.")
    model: str | None = Field(None, description="Model name; optional when one model is loaded.")
    version: str | None = Field(None, description="Package version; the newest when absent.")
    outputs: list[str] | None = Field(None, description="Which outputs to answer; all when absent.")
    precision: str | None = Field(None, description="Demand a variant, such as `fp32`.")
    priority: int = Field(0, ge=-9, le=9, description="Larger goes first.")
    timeout_ms: float | None = Field(None, ge=0, description="Milliseconds until the answer is worthless.")
    id: str | None = Field(None, description="Comes back in the answer; made up when absent.")


class Timing(BaseModel):
    queue_ms: float = Field(description="From admission to dispatch, in milliseconds.")
    compute_ms: float = Field(description="The execution that answered, in milliseconds.")
    batch_size: int = Field(description="Rows that were computed together.")


class PredictAnswer(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": _ANSWER})

    id: str
    model: str
    version: str
    precision: str = Field(description="The variant that computed this answer.")
    outputs: dict[str, Any] = Field(description="Output name → nested lists.")
    timing: Timing


class ErrorAnswer(BaseModel):
    error: str = Field(description="One sentence that says what to do.")
    code: str = Field(description="Stable, for programs.")


class ModelSummary(BaseModel):
    name: str
    version: str
    precision: str
    runtime: str
    state: str


class ModelList(BaseModel):
    models: list[ModelSummary]


class TensorDescription(BaseModel):
    name: str
    dtype: str
    shape: list[int] = Field(description="−1 for a dynamic dimension.")


class VariantDescription(BaseModel):
    precision: str
    active: bool
    engine_bytes: int
    budget: list[str] = Field(description="The terms that the gate held it to.")
    error: dict[str, float] = Field(description="What the gate measured against FP32.")
    latency_ms: dict[str, float] = Field(description="Batch size → median milliseconds on this runtime.")


class ModelDescription(ModelSummary):
    ready: bool = Field(description="What KServe's clients look at.")
    inputs: list[TensorDescription]
    outputs: list[TensorDescription]
    max_batch: int
    warnings: list[EvidenceWarning] = Field(description="What is doubtful about the evidence of the build.")
    variants: list[VariantDescription]


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses=`."""
    texts = {
        400: "The request is malformed or does not fit the model.",
        401: "The administration token is missing or wrong.",
        403: "Administration is off.",
        409: "The package cannot be served; what was served before is served still.",
        404: "No such model or version.",
        413: "The body is over the limit.",
        415: "The media type cannot be read for this model.",
        429: "The queue is full; see Retry-After.",
        500: "The service failed; details are in its log.",
        503: "Not ready, or shutting down.",
        504: "The deadline passed.",
    }
    return {status: {"model": ErrorAnswer, "description": texts[status]} for status in statuses}
