"""Requests and answers by instance, as KServe's v1 protocol and Vertex AI have them: {"instances": […]}.

An instance is one row: an object from input name to value, or the value alone for a model with one input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import orjson

from vernier.api.formats.codecs import Inputs, PredictRequest, Text, parse_json
from vernier.api.formats.json_tensors import tensor_from_json
from vernier.api.v2.requests import InferRequest, read_parameters
from vernier.border.batch import Answer
from vernier.border.signature import Signature
from vernier.errors import InvalidJson, MissingInput, WrongShape, shown
from vernier.tensors import Arrays


def parse_instances(body: Text, model: str | None) -> tuple[PredictRequest, Inputs]:
    """The request of `POST /v1/models/{model}:predict`. Raises InvalidJson, MissingInput, NonFiniteInput."""
    data = parse_json(body)
    instances = data.get("instances") if isinstance(data, dict) else None
    if not isinstance(instances, list):
        raise MissingInput('\'instances\' is missing; send {"instances": [{"<input>": …}, …]}')
    if not instances:
        raise WrongShape("'instances' is empty; send at least one")
    parameters = data.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise InvalidJson("'parameters' must be an object")
    request = InferRequest(model)
    read_parameters(request, parameters or {})
    return request, InstanceInputs(instances)


@dataclass(slots=True)
class InstanceInputs:
    """Rows as Python objects; the parser has seen to it that none of their numbers is NaN."""

    finite: ClassVar[bool] = True
    instances: Sequence[Any]

    def decode(self, signature: Signature) -> Arrays:
        """Raises RequestError."""
        rows = self.instances
        if isinstance(rows[0], dict):
            columns = self._columns(signature)
        elif len(signature.inputs) == 1:
            columns = {next(iter(signature.inputs)): list(rows)}
        else:
            named = ", ".join(f"'{name}'" for name in signature.inputs)
            raise MissingInput(f"each instance must be an object with {named}")
        if not signature.has_batch:
            if len(rows) != 1:
                raise WrongShape(f"model '{signature.model}' takes one instance in a request")
            columns = {name: values[0] for name, values in columns.items()}
        return {name: tensor_from_json(signature.input(name), values) for name, values in columns.items()}

    def _columns(self, signature: Signature) -> dict[str, Any]:
        names = self.instances[0].keys()
        for name in names:
            signature.input(name)
        for at, row in enumerate(self.instances):
            if not isinstance(row, dict) or row.keys() != names:
                listed = ", ".join(map(shown, names))
                raise InvalidJson(f"instance {at} must be an object with {listed}, as the first is")
        return {name: [row[name] for row in self.instances] for name in names}


def encode_predictions(answer: Answer, has_batch: bool) -> bytes:
    """{"predictions": […]}, one for each instance: a value, or an object where there are several outputs."""
    outputs = answer.outputs if has_batch else {name: array[None] for name, array in answer.outputs.items()}
    columns = {name: np.ascontiguousarray(array) for name, array in outputs.items()}
    predictions: Any
    if len(columns) == 1:
        (predictions,) = columns.values()
    else:
        rows = len(next(iter(columns.values())))
        predictions = [{name: array[row] for name, array in columns.items()} for row in range(rows)]
    return orjson.dumps({"predictions": predictions}, option=orjson.OPT_SERIALIZE_NUMPY)
