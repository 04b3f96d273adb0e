from __future__ import annotations

from collections.abc import Mapping

from moesaic.bench.report_sections import environment_section, summary_line

ROWS = [{"run_key": "a", "status": "ok", "wall_s": 2.0}]


def on_nodes(*nodes: Mapping[str, object], device: str = "cuda") -> dict[str, object]:
    return {"device": device, "cpu": "the driver's", "gpus": [], "engine": {"name": "ray", "nodes": list(nodes)}}


def test_the_summary_names_what_trained_not_the_driver() -> None:
    def node(host: str, gpu: str) -> dict[str, object]:
        return {"host": host, "cpu": "Xeon", "gpus": [gpu] * 8}

    assert " on the driver's." in summary_line(ROWS, {**on_nodes(), "engine": {"name": "local"}})
    alike = on_nodes(node("a", "H100"), node("b", "H100"))
    assert " on 2 nodes: H100." in summary_line(ROWS, alike)
    assert " on 2 nodes: Xeon." in summary_line(ROWS, {**alike, "device": "cpu"})
    mixed = on_nodes(node("a", "H100"), node("b", "A100"), node("c", "H100"))
    assert " on 3 nodes: H100 (2), A100 (1)." in summary_line(ROWS, mixed)
    assert " on 1 node: H100." in summary_line(ROWS, on_nodes(node("a", "H100")))
    # As folders had it before: names alone.
    assert " on the driver's." in summary_line(ROWS, {**on_nodes(), "engine": {"name": "ray", "nodes": ["a", "b"]}})


def test_equal_nodes_share_their_lines() -> None:
    nodes = [
        {"host": host, "cpu": cpu, "versions": {"torch": "2"}} for host, cpu in (("a", "X"), ("b", "Y"), ("c", "X"))
    ]
    text = environment_section(on_nodes(*nodes))
    assert "engine.nodes.1.hosts" in text
    assert text.count("engine.nodes.1.versions.torch") == text.count("engine.nodes.2.versions.torch") == 1
    assert "engine.nodes.3" not in text
    assert text.index("engine.name") < text.index("engine.nodes.1.cpu")
