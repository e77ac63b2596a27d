"""`mindspeed.enable` on another megatron-core than the supported one."""

import subprocess
import sys
from pathlib import Path

import pytest

import mindspeed


@pytest.fixture(scope="module")
def copied_host(tmp_path_factory):
    """A megatron-core whose files are links, so that single ones can be edited."""
    import megatron.core

    source, root = Path(next(iter(megatron.core.__path__))), tmp_path_factory.mktemp("host")
    for path in source.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            target = root / "megatron" / "core" / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    return root


def run_on(root, edits, again_strictly=False):
    """Enable no-op layers on an edited copy in a fresh interpreter; (exit status, output)."""
    originals = {}
    for name, (old, new) in edits.items():
        path = root / "megatron" / "core" / name
        originals[path] = path.resolve()
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.unlink()
        path.write_text(text.replace(old, new), encoding="utf-8")
    code = "import os, mindspeed\nmindspeed.enable(noop_layers='0', num_layers=4)\nprint('enabled')\n"
    if again_strictly:
        code += f"mindspeed.revert()\nos.environ['MINDSPEED_STRICT_HOST'] = '1'\n{code}"
    env = {
        "PYTHONPATH": f"{root}:{Path(mindspeed.__file__).parents[1]}",
        "OMP_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**env, "PATH": "/usr/bin:/bin", "MINDSPEED_PLATFORM": "cpu"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        for path, source in originals.items():
            path.unlink()
            path.symlink_to(source)
    return done.returncode, done.stdout + done.stderr


def test_removed_targets_are_all_named_with_versions(copied_host):
    status, output = run_on(
        copied_host,
        {
            "transformer/transformer_block.py": ("def _build_layers", "def _make_layers"),
            "transformer/moe/moe_utils.py": ("def track_moe_metrics", "def track_all_metrics"),
        },
    )
    assert status != 0 and "enabled" not in output
    for words in (
        "feature 'noop-layers' (--noop-layers 0)",
        "TransformerBlock._build_layers",
        "track_moe_metrics",
        str(copied_host),
        "0.12.1",
    ):
        assert words in output, output


def test_edited_body_warns_and_trains_on_or_stops_when_strict(copied_host):
    edit = {"transformer/transformer_block.py": ("def _build_layers(self):", "def _build_layers(self):\n        edited = True")}
    status, output = run_on(copied_host, edit, again_strictly=True)
    assert status != 0 and output.count("enabled") == 1 and output.count("differs from the supported version") == 1
    assert "TransformerBlock._build_layers has another body" in output
