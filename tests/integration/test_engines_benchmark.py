"""benchmarks/engines.py runs our engine as it is now, and compares like with like."""

import importlib.util
import sys

import pytest
from places import ROOT


@pytest.fixture
def engines(monkeypatch):
    spec = importlib.util.spec_from_file_location("engines", ROOT / "benchmarks/engines.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "engines", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.model
def test_our_engine_is_measured(engines, monkeypatch, capsys):
    arguments = ["engines.py", "--quick", "--rounds", "1", "--rows", "2", "--peers", "ours-8,openvino-32-256"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setenv("GXR_BATCH_PEER_OPENVINO", "/not/installed")
    engines.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (ours,) = [line for line in lines if line and line[0] == "ours-8" and line[4] == "1.00x"]
    assert float(ours[1]) > 0
    (parts,) = [line for line in lines if line and line[0] == "ours-8" and line[1].endswith("%")]
    assert float(parts[6]) > 0, "rows a step"
    (peer,) = [line for line in lines if line and line[0] == "openvino-32-256"]
    assert peer[1:3] == ["-", "missing:"]


def test_each_competitors_fastest_setting_is_repeated_and_ratios_stay_in_a_table(engines, monkeypatch, capsys):
    rates = {
        "ours-64": 300,
        "ours-128": 400,
        "openvino-32-256": 200,
        "openvino-64-2048": 350,
        "openvino-int8-32-256": 500,
    }
    peers = [peer for peer in engines.PEERS if peer.name in {*rates, "guide"}]
    ran = []

    def run_script(peer, task, model):
        ran.append(peer.name)
        return {"tokens": rates.get(peer.name, 10), "seconds": 1, "peak_mib": 1, "note": ""}

    monkeypatch.setattr(engines, "run_script", run_script)
    outcomes, _ = engines.run_rounds(peers, 3, None, None)
    times = {name: ran.count(name) for name in ran}
    assert times == {
        "machine": 3, "guide": 1, "ours-64": 1, "ours-128": 3, "openvino-32-256": 1, "openvino-64-2048": 3,
        "openvino-int8-32-256": 3,
    }  # fmt: skip
    engines.print_tables(peers, outcomes, 10)
    full, quantised = capsys.readouterr().out.split("quantised weights")
    ratios = {line.split()[0]: line.split()[4] for line in full.splitlines()[3:] if line}
    assert ratios["openvino-64-2048*"] == "1.14x"
    assert ratios["ours-128*"] == "1.00x"
    assert quantised.splitlines()[2].split()[4] == "-"


def test_a_ratio_compares_within_rounds(engines):
    ours, theirs, once = (
        engines.Outcome([{"tokens": rate, "seconds": 1} for rate in rates])
        for rates in ((100, 60, 90), (50, 20, 60), (80,))
    )
    assert engines.times(ours, theirs) == 2  # of 2, 3 and 1.5; that of the medians is 1.8
    assert engines.times(ours, once) == 1.25
