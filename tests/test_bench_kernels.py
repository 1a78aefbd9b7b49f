"""The GPU benchmark on a CPU, in small: everything but its timer. Times here mean nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.cases import Shape
from kernels.grouped_gemm_table import Setting
from scripts import bench_kernels as bench
from scripts import kernel_arms as arms

CPU = torch.device("cpu")
MODELS = {"1B": Shape(64, 32, 16, 8, 2)}
ROUTER = {"share": Shape(64, 0, 0, 16, 2), "latency": Shape(32, 0, 0, 8, 2)}


def measure(functions: dict[str, Any]) -> dict[str, float]:
    """One call of each."""
    found = {}
    for name, fn in functions.items():
        start = time.perf_counter()
        fn()
        found[name] = time.perf_counter() - start
    return found


def test_p43_everything_runs_and_every_figure_names_its_routing(tmp_path: Path):
    scores = torch.rand(3, 32, 8, generator=torch.Generator().manual_seed(0)).numpy()
    np.savez(tmp_path / "scores.npz", scores=scores, top_k=2, steps=np.arange(3))
    options = bench.parsed(["--shape", "1B", "--tokens", "64", "--recorded", str(tmp_path / "scores.npz")])
    said: list[str] = []
    limits = {"bytes_": 4096, "side": 32}
    rows, entries, top = bench.bench(options, CPU, measure, said.append, MODELS, ROUTER, limits)
    assert options.routing[0] == "skewed"  # balance is not forced unless asked for, and never alone by default
    assert all("MaxVio" in row.where for row in rows) and min(top.values()) > 0
    assert {kind for kind in arms.ROUTINGS if any(f", {kind} " in row.where for row in rows)} == set(arms.ROUTINGS)
    assert any("balanced (MaxVio 0.00)" in row.where for row in rows)
    assert {row.what for row in rows} >= set(bench.GOALS)
    assert all(np.isfinite(row.value) and row.value > 0 for row in rows)
    assert {entry["op"] for entry in entries} == {"moe_mlp", "grouped_gemm"} and len(entries) == 3
    assert all(set(entry) >= {"device", "triton_ms", "torch_ms", *Setting._fields} for entry in entries)
    assert any("megablocks skipped: it is not installed" in line for line in said)
    table = bench.markdown(rows)
    assert len(table.splitlines()) == len(rows) + 2 and ("pass" in table or "miss" in table)


def test_the_routings_are_what_they_say():
    s = Shape(512, 16, 16, 16, 4)
    maxvio = {kind: arms.make_batch(kind, s, CPU).maxvio for kind in ("balanced", "skewed")}
    assert maxvio["balanced"] == 0 and maxvio["skewed"] > 1
    counts = arms.make_batch("skewed", s, CPU).permutation.counts_E
    assert counts[0] > counts[8] > 0
    with pytest.raises(ValueError, match=r"recorded scores are \(8, 7\): give at least 512 tokens of 16 experts"):
        arms.make_batch("recorded", s, CPU, torch.rand(8, 7))


def test_bytes_and_flops_by_hand():
    b = arms.make_batch("balanced", Shape(64, 32, 16, 8, 2), CPU)
    work = arms.moving(b)
    assert work["route"].bytes_fwd == 64 * 8 * 2 + 64 * 2 * 8
    assert work["permute"].bytes_fwd == (64 + 128) * 32 * 2 + 2 * 8 * 128
    assert work["combine"].bytes_fwd == (64 + 128) * 32 * 2 + (8 + 4) * 128
    assert arms.flops(b.shape) == 2 * 128 * 3 * 32 * 16


def test_a_rival_that_computes_something_else_is_left_out(monkeypatch):
    b, said = arms.make_batch("skewed", Shape(64, 32, 16, 8, 2), CPU), []
    right = arms._grouped_mm

    def wrong(b: arms.Batch) -> Any:
        return lambda: 1.1 * right(b)()

    monkeypatch.setattr(arms, "_grouped_mm", wrong)
    assert (
        list(arms.expert_arms(b, said.append))[:1] == ["ours"]
        and "F.grouped_mm skipped: its output is off by" in said[0]
    )


TESTS = {
    "red": ("assert 1 == 2", "are red (1 failed"),
    "green": ("pass", None),
    "skipped": ("pytest.skip('no')", "ran 0 and skipped 1: run them on a GPU"),
}


@pytest.mark.parametrize("name", TESTS)
def test_only_a_green_run_of_the_tests_is_taken(name: str, tmp_path: Path):
    body, reason = TESTS[name]
    (tmp_path / "test_it.py").write_text(f"import pytest\n@pytest.mark.gpu\ndef test_it():\n    {body}\n")
    found = bench.run_tests(str(tmp_path))
    assert (found is None) == (reason is None) and (reason or "") in (found or ""), found


def test_no_test_at_all_is_red(tmp_path: Path):
    assert "red" in (bench.run_tests(str(tmp_path)) or "")


def test_red_tests_and_no_gpu_report_nothing(tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--out", str(out)]) == 2
    assert "there is no CUDA GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "run_tests", lambda: "the tests of tests/gpu are red")
    monkeypatch.setattr(bench, "bench", None)
    assert bench.main(["--out", str(out)]) == 1 and not out.exists()
    assert capsys.readouterr().err == "error: the tests of tests/gpu are red\n"
    assert bench.main(["--tokens", "0", "--out", str(out)]) == 2


def test_a_green_run_appends_a_record_and_writes_the_table(tmp_path: Path, monkeypatch, capsys):
    row = bench.Row("route, forward, microseconds", "router T=8, skewed (MaxVio 1.00)", 7.0, "us")
    entry = bench.table_entry(Setting("moe_mlp", "bfloat16", 8, 8, 8, 16)._asdict(), CPU, 1e-3, 2e-3)
    table = tmp_path / "table.json"
    table.write_text(json.dumps([entry | {"triton_ms": 9.0, "git": "old"}, entry | {"rows": 32}]))
    monkeypatch.setattr(bench, "TABLE", table)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "run_tests", lambda: None)
    monkeypatch.setattr(bench, "CudaTimer", lambda repeats: measure)
    monkeypatch.setattr(bench, "device_name", lambda device: "A card")
    monkeypatch.setattr(bench, "bench", lambda *_: ([row], [entry], {"copy": 1.0, "matmul": 1.0}))
    for _ in range(2):
        assert bench.main(["--out", str(tmp_path / "out.json"), "--write-table"]) == 0
    records = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    assert len(records) == 2 and records[0]["device"] == "A card" and records[0]["torch"] == torch.__version__
    assert records[0]["rows"][0]["value"] == 7.0 and records[0]["git"] and records[0]["date"]
    assert sorted((e["rows"], e["triton_ms"]) for e in json.loads(table.read_text())) == [(16, 1.0), (32, 1.0)]
    assert "| 7 us | <= 6.5 | miss |" in capsys.readouterr().out
