"""How the figures of several processes become one exposition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from vernier.exposition import Metrics
from vernier.exposition_merge import Family, Totals, families_of, render


def counter(name: str, value: float, **labels: str) -> Family:
    return (name, "counter", "Text.", [(f"{name}_total", labels, value)])


def gauge(name: str, value: float, **labels: str) -> Family:
    return (name, "gauge", "Text.", [(name, labels, value)])


def samples(totals: Totals) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample, tuple(sorted(labels.items()))): value
        for _, _, _, found in totals.families()
        for sample, labels, value in found
    }


def merged(*each: tuple[str, list[Family]]) -> Totals:
    totals = Totals()
    for process, families in each:
        totals.add(process, families)
    return totals


def test_counters_are_summed_label_by_label_whatever_their_order() -> None:
    first = [("c", "counter", "Text.", [("c_total", {"model": "a", "code": "ok"}, 2)])]
    second = [("c", "counter", "Text.", [("c_total", {"code": "ok", "model": "a"}, 3)])]
    found = samples(merged(("front-0", first), ("front-1", [*second, counter("c", 7, model="b", code="ok")])))
    assert found == {
        ("c_total", (("code", "ok"), ("model", "a"))): 5,
        ("c_total", (("code", "ok"), ("model", "b"))): 7,
    }


def test_of_a_gauge_the_largest_counts_but_shares_are_summed() -> None:
    families = [
        [
            gauge("vernier_ready", value),
            gauge("vernier_inflight_requests", 4),
            gauge("vernier_connections", 2),
        ]
        for value in (0, 1)
    ]
    found = samples(merged(("front-0", families[0]), ("front-1", families[1])))
    assert [
        found[name, ()] for name in ("vernier_ready", "vernier_inflight_requests", "vernier_connections")
    ] == [
        1,
        8,
        4,
    ]


def test_what_a_process_tells_of_itself_bears_its_name() -> None:
    found = samples(
        merged(("engine", [gauge("process_threads", 3)]), ("front-0", [gauge("process_threads", 2)]))
    )
    assert found == {
        ("process_threads", (("process", "engine"),)): 3,
        ("process_threads", (("process", "front-0"),)): 2,
    }


def _front(admitted: int, answered: int, inflight: int) -> list[Family]:
    registry = CollectorRegistry()
    model = Metrics(registry, "0").model("m", "1")
    model.admitted(admitted)
    model.ended("answered", answered)
    model.set_inflight(inflight)
    return families_of(registry)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 5))
def test_requests_that_a_dead_front_had_open_have_been_cancelled_with_it(
    answered: int, open_requests: int, on_the_way: int
) -> None:
    """Those that were on their way to the queue were never admitted."""
    totals = Totals()
    totals.add_ended(_front(answered + open_requests, answered, open_requests + on_the_way))
    books = totals.by_model()["m/1"]
    assert books["admitted"] == answered + open_requests
    assert books["answered"] == answered
    assert books.get("cancelled", 0) == open_requests
    assert "vernier_inflight_requests" not in {sample for sample, _ in samples(totals)}
    totals.add("front-0", _front(5, 5, 0))
    books = totals.by_model()["m/1"]
    assert books.pop("admitted") == sum(books.values())


def test_gauges_of_the_dead_are_forgotten_and_their_counts_kept() -> None:
    totals = Totals()
    totals.add_ended([counter("c", 3), gauge("g", 9), gauge("process_threads", 1)])
    other = Totals()
    other.include(totals)
    other.add("front-0", [counter("c", 4)])
    assert samples(other) == {("c_total", ()): 7}


def test_the_exposition_is_one_that_prometheus_reads() -> None:
    totals = merged(("front-0", _front(3, 2, 1)), ("front-1", _front(4, 4, 0)))
    body, kind = render(totals.families(), "text/plain")
    assert kind.startswith("text/plain")
    text = body.decode()
    assert 'vernier_requests_admitted_total{model="m",version="1"} 7.0' in text
    assert text.count("# TYPE vernier_requests_admitted_total counter") == 1
