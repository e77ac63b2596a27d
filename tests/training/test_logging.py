"""What is printed, written to TensorBoard and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindspeed.training.history import History
from mindspeed.training.plots import loss_curve
from tests.training.runs import LINE, TINY, train


def test_lines_of_a_run(tmp_path):
    flags = TINY.replace("--eval-iters 0", "--eval-iters 1 --eval-interval 2") + " --log-throughput --log-params-norm"
    run = train(
        f"{flags} --log-num-zeros-in-grad --log-progress --save {tmp_path}/ckpt --save-interval 2 --data-cache-path {tmp_path}/cache "
        f"--tensorboard-dir {tmp_path}/tb --log-timers-to-tensorboard --log-validation-ppl-to-tensorboard "
        "--log-memory-to-tensorboard --log-world-size-to-tensorboard"
    )
    assert [int(line["iteration"]) for line in run.lines] == [1, 2, 3]
    assert [int(line["samples"]) for line in run.lines] == [4, 8, 12]
    assert all(line["tflops"] and line["params"] and line["zeros"] for line in run.lines)
    blocks = [line for line in run.text.splitlines() if line.startswith(" validation loss at")]
    assert len(blocks) == 3  # at step 2, at the end on both held-out sets
    assert blocks[0].startswith(" validation loss at iteration 2 | lm loss value: ")
    assert "iteration 3 on validation set" in blocks[1] and "iteration 3 on test set" in blocks[2]
    rule = "-" * (len(blocks[0]) + 1)
    assert f"{rule}\n{blocks[0]}\n{rule}" in run.text
    progress = (tmp_path / "ckpt" / "progress.txt").read_text().splitlines()
    assert progress[0].endswith("# GPUs: 1\tStarting job") and "\tSaved checkpoint\tIteration: 2\t" in progress[1]
    assert {"lm loss", "lm loss vs samples", "learning-rate", "grad-norm", "batch-size", "loss-scale", "params-norm", "num-zeros",
            "world-size", "mem-allocated-bytes", "iteration-time", "throughput", "lm loss validation",
            "lm loss validation ppl"} <= tags(tmp_path / "tb")  # fmt: skip
    assert (tmp_path / "ckpt" / "loss.png").read_bytes().startswith(b"\x89PNG")
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "ckpt" / "loss.jsonl").read_text().splitlines()]
    assert kinds == ["train", "train", "validation", "train", "validation", "test"]


def tags(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_log_interval_averages(tmp_path):
    single = train(f"{TINY} --data-cache-path {tmp_path}").lines
    (line,) = train(f"{TINY} --log-interval 3 --data-cache-path {tmp_path}").lines
    mean = sum(float(one["loss"]) for one in single) / 3
    assert float(line["loss"]) == pytest.approx(mean, rel=1e-6)
    assert line["norm"] == single[-1]["norm"]


def test_host_line_is_understood_and_a_changed_one_is_not():
    host = (
        " [2026-11-24 14:45:42] iteration        1/       6 | consumed samples:            4 | elapsed time per iteration (ms): 325.5 |"
        " throughput per GPU (TFLOP/s/GPU): 0.0 | learning rate: 1.866025E-04 | global batch size:     4 | lm loss: 9.054199E+00 |"
        " loss scale: 1.0 | grad norm: 3.795 | num zeros: 45.0 | params norm: 42.089 | number of skipped iterations:   0 |"
        " number of nan iterations:   0 |"
    )
    assert LINE.match(host)
    assert not LINE.match(host.replace("grad norm: 3.795", "grad norm: 3.79"))


def test_history_survives_a_resume_and_a_cut_line(tmp_path):
    path = tmp_path / "loss.jsonl"
    first = History(path)
    for step in (1, 2, 3):
        first.add(step, "train", 5.0 - step, 1e-3)
    first.add(4, "train", None)
    with open(path, "a") as file:
        file.write('{"iteration": 5, "ki')
    second = History(path, start=2)
    second.add(3, "train", 7.0, 1e-3)
    assert [(point.iteration, point.loss) for point in History(path, start=9).points] == [(1, 4.0), (2, 3.0), (3, 7.0)]


def test_nothing_to_draw(tmp_path):
    assert loss_curve(History(), tmp_path / "x.png") is None


def test_curve_with_validation(tmp_path):
    history = History()
    for step in range(1, 60):
        history.add(step, "train", 10 / step, 1e-3 * step)
    history.add(30, "validation", 1.0)
    history.add(59, "test", 0.9)
    assert loss_curve(history, tmp_path / "sub" / "x.png", "a title").stat().st_size > 10_000


def test_status_line(capsys):
    from mindspeed.training.progress import Progress

    progress = Progress(2, 10)
    progress.update(3, {}, 100)
    progress.close()
    assert progress._bars.tasks[0].completed == 3 and "tokens/s" in progress._bars.tasks[0].fields["speed"]


def test_profile_of_one_step(tmp_path):
    run = train(
        f"{TINY} --data-cache-path {tmp_path}/cache --tensorboard-dir {tmp_path} --profile --use-pytorch-profiler "
        "--profile-step-start 1 --profile-step-end 2"
    )
    trace = json.loads((tmp_path / "profile_rank0.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert names.count("Optimizer.step#Adam.step") + names.count("Optimizer.step#AdamW.step") <= 1
    assert any("aten::" in name for name in names) and len(run.curve) == 3
