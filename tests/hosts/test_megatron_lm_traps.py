"""What used to go wrong without a word: each ends in an error that names the remedy, or works."""

import os
import shutil
import subprocess
import sys

import pytest

from mindspeed.checkpoint.layout import saving_name
from tests.hosts.launcher import IMPORT_LINE, tiny_gpt

# The host refuses to resume with another number of steps unless it is told to; its flag mixes dashes and underscores.
ANOTHER_LENGTH = {"override-opt_param-scheduler": True}
pytestmark = [pytest.mark.megatron_lm, pytest.mark.timeout(600)]


def refused(run, *words):
    """Every rank ended with status 2, the first one said why, and nobody printed a traceback."""
    assert set(run.codes) == {2}, run.tail()
    assert "Traceback" not in run.log, run.tail()
    assert all(word in run.logs[0] for word in words), run.tail()
    assert all("mindspeed: " not in log for log in run.logs[1:])


def test_all_problems_are_told_at_once_by_the_first_rank(runs, matrix):
    run = runs(
        *tiny_gpt(
            matrix.corpus,
            transformer_impl="transformer_engine",
            load="/no/such/place",
            fp8_format="hybrid",
            enable_recompute_layers_per_pp_rank=True,
        ),
        world=2,
    )
    refused(
        run,
        "4 problems",
        "--transformer-impl transformer_engine: Transformer Engine needs a CUDA device. Use --transformer-impl local.",
        "--load /no/such/place: there is no such directory",
        "--fp8-format hybrid",
        "--recompute-method block (given none)",
    )


def test_vocabulary_too_small_for_mock_data(runs, matrix):
    run = runs(*tiny_gpt(matrix.corpus, data_path=None, mock_data=True, vocab_size=1000))
    refused(run, "--vocab-size 1000: --mock-data makes token ids up to 4095. Use --vocab-size 4096 or more.")


def test_sequence_that_tensor_ranks_cannot_share(runs, matrix):
    flags = {"seq_length": 63, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    run = runs(*tiny_gpt(matrix.corpus, **flags), world=2)
    refused(run, "--seq-length 63: --sequence-parallel cuts it into --tensor-model-parallel-size 2 equal parts")


def test_unknown_and_withdrawn_flags_are_explained(runs, matrix):
    run = runs(*tiny_gpt(matrix.corpus), "--recompute-granularitty", "full", "--use-nanopipe")
    assert run.codes == [2]
    assert "--recompute-granularitty: is not a flag. Did you mean --recompute-granularity" in run.log
    assert "--use-nanopipe: was withdrawn" in run.log and "--schedules-method" in run.log


def test_help_shows_the_features_flags(runs):
    run = runs("--help")
    assert run.ok and "--enable-recompute-layers-per-pp-rank" in run.log and "--optimization-level" in run.log


def test_argument_table_is_printed_once_with_final_values(runs, matrix):
    run = runs(*tiny_gpt(matrix.corpus, iterations=1, transformer_impl=None), world=2)
    assert run.ok, run.tail()
    assert run.log.count("------------------------ arguments ------------------------") == 1
    (line,) = [line for line in run.log.splitlines() if line.startswith("  transformer_impl ..")]
    assert line.endswith(" local")
    assert "--transformer-impl: 'transformer_engine' -> 'local' because Transformer Engine is not installed" in run.logs[0]
    assert "because" not in run.logs[1], "derived values are told by the first rank"


@pytest.fixture
def saved(runs, matrix, tmp_path):
    """A directory with whole checkpoints of steps 2 and 4."""
    run = runs(*tiny_gpt(matrix.corpus, save=tmp_path, save_interval=2, ckpt_format="torch"))
    assert run.ok, run.tail()
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4"
    return tmp_path


@pytest.mark.parametrize("tracker", ["", "garbage", "7"])
def test_unusable_tracker_means_the_newest_whole_checkpoint_and_one_warning(runs, matrix, saved, tracker):
    (saved / "latest_checkpointed_iteration.txt").write_text(tracker)
    run = runs(*tiny_gpt(matrix.corpus, iterations=6, load=saved, ckpt_format="torch", **ANOTHER_LENGTH))
    assert run.ok, run.tail()
    assert sorted(run.curve) == [5, 6], run.tail()
    assert sum("latest_checkpointed_iteration.txt" in line for line in run.log.splitlines() if "WARNING" in line) == 1, (
        run.tail()
    )


def test_damaged_checkpoint_is_refused_before_a_weight_is_used(runs, matrix, saved):
    (file,) = (saved / "iter_0000004").glob("mp_rank_00/model_optim_rng.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    run = runs(*tiny_gpt(matrix.corpus, iterations=6, load=saved, ckpt_format="torch"))
    assert not run.ok and not run.curve
    assert "model_optim_rng.pt" in run.log and "CheckpointError" in run.log


def test_interrupted_save_is_cleared_and_never_loaded(runs, matrix, saved):
    shutil.copytree(saved / "iter_0000004", saved / saving_name(6, "0123abcd"))
    (saved / saving_name(6, "0123abcd") / "mindspeed_manifest.json").unlink()
    flags = {"load": saved, "save": saved, "save_interval": 100, "ckpt_format": "torch", **ANOTHER_LENGTH}
    run = runs(*tiny_gpt(matrix.corpus, iterations=6, **flags))
    assert run.ok and sorted(run.curve) == [5, 6], run.tail()
    assert sorted(p.name for p in saved.iterdir() if p.name.startswith(("iter", ".saving"))) == [
        "iter_0000002",
        "iter_0000004",
        "iter_0000006",
    ]


def test_first_run_of_a_script_that_resumes_itself(runs, matrix, tmp_path):
    place = tmp_path / "new"
    run = runs(*tiny_gpt(matrix.corpus, iterations=2, load=place, save=place, save_interval=2))
    assert run.ok and sorted(run.curve) == [1, 2], run.tail()


def test_plain_megatron_reads_our_checkpoints_and_we_read_its(checkout, runs, matrix, tmp_path):
    """In 16-bit-free `torch` format with the plain optimizer, which the host can do by itself on this platform."""
    run = runs(*tiny_gpt(matrix.corpus, iterations=2, save=tmp_path, save_interval=2, ckpt_format="torch"))
    assert run.ok, run.tail()
    program = (
        "import torch, sys\n"
        f"state = torch.load({str(tmp_path / 'iter_0000002/mp_rank_00/model_optim_rng.pt')!r}, weights_only=False)\n"
        "assert not any(name.startswith('mindspeed') for name in sys.modules), 'the file must not need us'\n"
        "print(sorted(state), state['checkpoint_version'], state['iteration'])\n"
        "print(sorted(state['optimizer']['optimizer']['state'][0]) if 'optimizer' in state['optimizer'] else sorted(state['optimizer']['state'][0]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "'args'" in done.stdout and "3.0 2" in done.stdout
    assert "['exp_avg', 'exp_avg_sq', 'step']" in done.stdout, "the form of torch's AdamW, which plain Megatron uses"
    (tmp_path / "iter_0000002" / "mindspeed_manifest.json").unlink()  # as plain Megatron leaves it
    run = runs(*tiny_gpt(matrix.corpus, iterations=4, load=tmp_path, ckpt_format="torch", **ANOTHER_LENGTH))
    assert run.ok and sorted(run.curve) == [3, 4], run.tail()


@pytest.mark.parametrize("where", ["last", "twice"])
def test_import_line_may_stand_anywhere(runs, matrix, checkout, where):
    """After all imports of the script, or before and after them: the same curve."""
    text = (checkout / "pretrain_gpt.py").read_text()
    head, mark, tail = text.partition("stimer = StragglerDetector()")
    assert mark
    script = runs.directory / f"pretrain_{where}.py"
    script.write_text((IMPORT_LINE if where == "twice" else "") + head + IMPORT_LINE + mark + tail)
    start = {"load": matrix.seed(), "finetune": True, "no_load_optim": True, "no_load_rng": True}
    argv = tiny_gpt(matrix.corpus, **start, tensor_model_parallel_size=2, sequence_parallel=True)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), *argv],
        env=runs.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reference = matrix.outcome("TP2 SP")
    printed = [line for line in done.stdout.splitlines() if "lm loss:" in line]
    assert len(printed) == len(reference.curve)
    for line, (loss, norm) in zip(printed, reference.curve.values(), strict=True):
        assert f"lm loss: {loss} " in line and f"grad norm: {norm} " in line


def test_preprocess_data_gives_the_same_bytes_with_and_without_the_line(runs, checkout, tmp_path):
    source = tmp_path / "text.jsonl"
    source.write_text("".join(f'{{"text": "{number} {number + 1} {number + 2}"}}\n' for number in range(50)))
    script = tmp_path / "preprocess_data.py"
    text = (checkout / "tools" / "preprocess_data.py").read_text()
    script.write_text(
        IMPORT_LINE + text.replace("os.path.join(os.path.dirname(__file__)", f"os.path.join({str(checkout / 'tools')!r}")
    )
    outputs = []
    for name, program in (("ours", script), ("plain", checkout / "tools" / "preprocess_data.py")):
        argv = ["--input", str(source), "--output-prefix", str(tmp_path / name), "--tokenizer-type", "NullTokenizer"]
        run = runs(*argv, "--vocab-size", "100", "--append-eod", "--workers", "1", script=program)
        assert run.ok, run.tail()
        outputs.append([(tmp_path / f"{name}_text_document.{kind}").read_bytes() for kind in ("bin", "idx")])
    assert outputs[0] == outputs[1] and len(outputs[0][0]) > 50
