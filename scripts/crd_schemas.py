"""Writes tests/ops/schemas/*.json: what KEDA, the Prometheus operator and KServe accept, as JSON Schema.

Kubernetes' own schemas come with the kubernetes-validate package; those of other projects do not, and
KServe's client would bring a hundred packages along. So they are generated once from the projects' published
Python models, for the kinds that k8s/ uses, and committed. To renew, in an environment of its own:

    pip install cloudcoil cloudcoil-models-keda cloudcoil-models-prometheus-operator
    pip download --no-deps kserve
    python scripts/crd_schemas.py kserve-*.whl

Kubernetes types inside KServe's objects (containers, volumes …) are left open: the test checks those with
Kubernetes' schemas.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent.parent / "tests" / "ops" / "schemas"
PYDANTIC_KINDS = {
    "keda": ("cloudcoil.models.keda.v1alpha1", ["ScaledObject", "TriggerAuthentication"]),
    "prometheus-operator": ("cloudcoil.models.prometheus_operator.v1", ["ServiceMonitor", "PrometheusRule"]),
}
KSERVE_KINDS = ["V1alpha1ClusterServingRuntime", "V1beta1InferenceService"]
PLAIN = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "object": {},
    "datetime": {"type": "string"},
}


def strict(node: Any) -> Any:
    """Without titles, texts and nulls; an object with named fields allows no other."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {
        k: strict(v) for k, v in node.items() if not (k in {"title", "description"} and isinstance(v, str))
    }
    kept.pop("default", None)
    options = [option for option in kept.get("anyOf", []) if option != {"type": "null"}]
    if len(options) == 1 and len(kept) == 1:
        return options[0]
    if kept.get("type") == "object" and kept.get("properties"):
        kept["additionalProperties"] = False
    return kept


def from_pydantic(module: str, kinds: list[str]) -> dict[str, Any]:
    models = importlib.import_module(module)
    return {kind: strict(getattr(models, kind).model_json_schema(by_alias=True)) for kind in kinds}


def from_kserve(wheel: Path) -> dict[str, Any]:
    """KServe's generated client declares each model's fields in two dictionaries; nothing is imported."""
    classes: dict[str, tuple[dict[str, str], dict[str, str], set[str]]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("kserve/models/") and name.endswith(".py"):
                classes.update(declared(archive.read(name).decode()))

    used: dict[str, Any] = {}

    def of(type_name: str) -> dict[str, Any]:
        if type_name in PLAIN:
            return PLAIN[type_name]
        if match := re.fullmatch(r"list\[(.+)\]", type_name):
            return {"type": "array", "items": of(match[1])}
        if match := re.fullmatch(r"dict\(str, (.+)\)", type_name):
            return {"type": "object", "additionalProperties": of(match[1])}
        if type_name not in classes:
            return {}
        if type_name not in used:
            types, names, required = classes[type_name]
            used[type_name] = {"type": "object"}
            used[type_name].update(
                properties={names[f]: {} if f == "status" else of(kind) for f, kind in types.items()},
                additionalProperties=False,
                required=sorted(names[field] for field in required),
            )
        return {"$ref": f"#/$defs/{type_name}"}

    schemas = {}
    for kind in KSERVE_KINDS:
        used.clear()
        reference = of(kind)
        schemas[re.sub(r"^V1(alpha|beta)1", "", kind)] = {**reference, "$defs": dict(sorted(used.items()))}
    return schemas


def declared(source: str) -> dict[str, tuple[dict[str, str], dict[str, str], set[str]]]:
    """Class name to (field types, wire names, required fields)."""
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        tables = {
            target.id: ast.literal_eval(item.value)
            for item in node.body
            if isinstance(item, ast.Assign)
            for target in item.targets
            if isinstance(target, ast.Name)
        }
        required = set(re.findall(r"Invalid value for `(\w+)`, must not be `None`", ast.unparse(node)))
        if "openapi_types" in tables:
            found[node.name] = (tables["openapi_types"], tables["attribute_map"], required)
    return found


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    wheel = Path(sys.argv[1])
    results = {name: from_pydantic(*source) for name, source in PYDANTIC_KINDS.items()}
    origins = {
        name: f"{source[0].split('.v1')[0].replace('.', '-').replace('_', '-')} "
        for name, source in PYDANTIC_KINDS.items()
    }
    for name, package in origins.items():
        results[name] = {"$comment": f"from {package}{version(package.strip())}, Apache-2.0"} | results[name]
    release = wheel.name.split("-")[1]
    results["kserve"] = {"$comment": f"from kserve {release}, Apache-2.0"} | from_kserve(wheel)
    OUT.mkdir(parents=True, exist_ok=True)
    for name, schemas in results.items():
        lines = [
            f"{json.dumps(kind)}: {json.dumps(schema, sort_keys=True)}" for kind, schema in schemas.items()
        ]
        (OUT / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
