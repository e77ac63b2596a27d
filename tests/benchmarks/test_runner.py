"""Logic of the benchmark runner, on cases with known outcomes."""

import copy
import json

import numpy as np
import pytest
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import report as report_command
from benchmarks._case import Case, Run, case, cases_of, groups
from benchmarks._measure import Summary, calls_needed, summarise
from benchmarks._report import SchemaError, compare, make_report, read_report, validate
from benchmarks._runner import judge, report_entry, run_case
from benchmarks._table import number, plot_group, show_list, show_results

FAKE = "tests.benchmarks.fake_cases"
RUN = Run(rounds=3, peers=None)


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {found.id: found for found in cases_of([FAKE])}


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    """Short measured stretches: the logic is under test, not the figures."""
    for module in ("benchmarks._runner", "benchmarks._measure"):
        monkeypatch.setattr(f"{module}.calls_needed", lambda seconds: 3)


def test_summary_is_median_and_percentiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert summarise(values) == Summary(3.0, float(np.percentile(values, 20)), float(np.percentile(values, 80)))
    assert summarise(values).spread == pytest.approx((4.2 - 1.8) / 3)
    assert (calls_needed(0.05), calls_needed(10.0), calls_needed(0.0)) == (2, 1, 2000)


def test_ratio_is_paired_and_peers_are_told_apart(cases):
    entry = run_case(cases["fake.ratio"], RUN)
    slow = entry["peers"]["slow"]
    assert slow["ratio"] == pytest.approx(2.0, rel=0.2) and slow["status"] == "ok" and slow["version"] == "1.0"
    assert entry["ours"] == pytest.approx(2.0, rel=0.2), "milliseconds"
    assert entry["peers"]["wrong"]["status"] == "peer wrong" and entry["peers"]["wrong"]["ratio"] is None
    assert entry["peers"]["absent"]["status"] == "not installed"
    assert entry["verdict"] in ("ok", "noisy") and entry["rounds"] == 3


def test_only_wanted_peers_run_but_the_one_compared_with(cases):
    entry = run_case(cases["fake.ratio"], Run(rounds=2, peers=()))
    assert list(entry["peers"]) == ["slow"]
    assert Run(peers=("Torch.Compile",)).wants_peer("torch compile")


def test_a_wrong_result_has_no_figures(cases):
    entry = run_case(cases["fake.wrong"], RUN)
    assert entry["verdict"] == "WRONG" and entry["ours"] is None
    assert command.exit_code([entry], check=False) == 3


def test_unwritten_memory_is_a_wrong_result(cases):
    assert run_case(cases["fake.unwritten"], RUN)["verdict"] == "WRONG"


def test_operator_with_floor(cases):
    entry = run_case(cases["fake.operator"], Run(rounds=2))
    assert entry["floor"] > 0 and entry["fraction"] > 0.01 and entry["workload"]["mode"] == "backward"
    assert entry["check"]["error"] <= entry["check"]["tolerance"]


def test_counted_is_exact_and_never_noisy(cases):
    entry = run_case(cases["fake.counted"], RUN)
    assert (entry["ours"], entry["fraction"], entry["peers"]["host"]["ratio"]) == (24, 0.5, 2.0)
    assert entry["verdict"] == "ok" and entry["clock"] == "count"
    assert judge(cases["fake.counted"], Summary(25, 25, 25)) == "missed"


def test_paired_rounds_drop_the_warm_up(cases):
    entry = report_entry_of_paired(cases["fake.paired"])
    assert entry["rounds"] == 3 and entry["value"] == 2.0 and entry["ours"] == 1500.0
    assert entry["verdict"] == "ok"


def report_entry_of_paired(declared):
    from benchmarks._runner import _figures

    return report_entry(declared, _figures(declared, RUN), busy=False)


def test_noise_neither_passes_nor_fails(cases):
    assert run_case(cases["fake.noisy"], Run(rounds=5))["verdict"] == "noisy"
    assert run_case(cases["fake.best"], Run(rounds=5))["verdict"] == "ok"
    assert judge(cases["fake.paired"], Summary(2.0, 2.0, 2.0), busy=True) == "noisy"


def test_verdicts_follow_the_direction(cases):
    higher, lower = cases["fake.ratio"], cases["fake.best"]
    verdicts = [judge(higher, Summary(value, value, value)) for value in (1.0, 1.5, 5.0)]
    assert verdicts == ["missed", "ok", "aim"]
    assert [judge(lower, Summary(value, value, value)) for value in (0.9, 1.1)] == ["ok", "missed"]
    assert judge(cases["fake.skipped"], Summary(1, 1, 1)) == "info"


def test_cases_that_cannot_run_say_why(cases):
    assert run_case(cases["fake.skipped"], RUN)["reason"] == "needs 2 devices"
    broken = run_case(cases["fake.broken"], RUN)
    assert (broken["verdict"], broken["reason"]) == ("failed", "RuntimeError: no such model")
    assert run_case(cases["fake.gpu"], RUN)["reason"] == "runs on cuda only"


def test_a_hanging_case_is_killed_with_its_stack(cases, capsys):
    assert command.run_apart(cases["fake.counted"], [FAKE], RUN)["verdict"] == "ok", "and the process is warm now"
    entry = command.run_apart(cases["fake.hang"], [FAKE], Run(timeout=3))
    assert entry["verdict"] == "hung"
    assert "in hang" in capsys.readouterr().err
    assert command.run_apart(cases["fake.counted"], [FAKE], RUN)["verdict"] == "ok"


@pytest.mark.parametrize(
    ("verdicts", "check", "code"),
    [
        (["ok", "noisy", "skipped"], True, 0),
        (["missed"], False, 0),
        (["missed", "ok"], True, 1),
        (["failed", "missed"], True, 2),
        (["hung"], True, 2),
        (["WRONG", "failed"], True, 3),
        (["WRONG"], False, 3),
    ],
)
def test_exit_codes(verdicts, check, code):
    assert command.exit_code([{"verdict": verdict} for verdict in verdicts], check=check) == code


@pytest.fixture(scope="module")
def report(cases):
    entries = [run_case(cases[name], Run(rounds=2)) for name in ("fake.counted", "fake.wrong", "fake.ratio")]
    return make_report("cpu", {"copy_GBps": 1.0}, [0.1, 0.2], entries)


def test_report_fits_its_schema(report, tmp_path):
    validate(report)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    assert read_report(path)["cases"][0]["id"] == "fake.counted"
    text = report_command.markdown(report)
    assert "| `fake.counted` |" in text and "host ×2.00" in text and "fake.wrong" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema=2), "this version reads 1"),
        (lambda r: r.pop("commit"), "lacks 'commit'"),
        (lambda r: r["cases"][0].update(must="high"), r"cases\[0\].must is 'high'"),
        (lambda r: r["cases"][0].update(extra=1), "unknown entry 'extra'"),
        (lambda r: r["cases"][2]["peers"]["slow"].pop("status"), r"peers\['slow'\] lacks 'status'"),
    ],
)
def test_a_report_of_another_form_is_refused(report, change, message):
    spoilt = copy.deepcopy(report)
    change(spoilt)
    with pytest.raises(SchemaError, match=message):
        validate(spoilt)


def test_comparison_flags_what_got_worse(report):
    now = copy.deepcopy(report)
    now["cases"][0]["value"] = 25
    now["cases"][2]["value"] /= 1.05
    now["cases"][2]["spread"] = 0.02
    rows = {row["id"]: row["verdict"] for row in compare(report, now)}
    assert rows == {"fake.counted": "worse", "fake.ratio": "same"}
    now["cases"][2]["value"] /= 2
    assert compare(report, now)[1]["verdict"] == "worse"


def test_tables_and_plots(report, cases, tmp_path):
    console = Console(record=True, width=200)
    show_results(console, "fake", report["cases"])
    show_list(console, cases.values(), RUN)
    text = console.export_text()
    assert "WRONG" in text and "peer wrong" in text and "ratio to slow" in text and "An exact figure." in text
    path = plot_group(tmp_path, "fake", report["cases"])
    assert path is not None and path.stat().st_size > 1000
    assert (number(3.0), number(0.12345), number(None)) == ("3", "0.123", "")


def test_declarations_are_checked():
    with pytest.raises(TypeError, match="docstring"):
        case("x.y", feature="x", metric="value")(lambda run: None)
    with pytest.raises(TypeError, match="needs the peer"):
        case("x.y", feature="x", metric="ratio")
    with pytest.raises(TypeError, match="preset 'huge'"):
        case("x.y", feature="x", metric="value", preset="huge")


def test_all_real_cases_can_be_listed():
    found = cases_of(module for modules in groups().values() for module in modules)
    assert all(declared.group in groups() for declared in found)


def test_unknown_groups_and_empty_selections_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["no-such-group"])
    assert "unknown group no-such-group; there are" in capsys.readouterr().err
