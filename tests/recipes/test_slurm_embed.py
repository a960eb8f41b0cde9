"""configs/slurm/embed.sbatch: the tasks of an array embed each shard once, into one cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from curated_data.embedding import embed_pool, resolve_embedder
from curated_data.pool import ShardPool

SCRIPT = Path(__file__).parents[2] / "configs" / "slurm" / "embed.sbatch"


@pytest.mark.long
def test_an_array_embeds_every_shard_once(write_pool, tmp_path, caplog):
    write_pool([8, 9, 10])
    pattern = str(tmp_path / "pool-*.tar")
    arguments = [
        "bash",
        str(SCRIPT),
        pattern,
        "--embedder",
        "pixels:4",
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    counts = []
    for task in (5, 6, 7, 8):  # one more than there are shards; arrays need not begin at 0
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_ARRAY_TASK_MIN": "5",
            "SLURM_ARRAY_TASK_COUNT": "4",
        }
        ended = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        counts.append(ended.stdout.split()[0])
    assert counts == ["8", "9", "10", "no"]
    caplog.set_level("INFO")
    embed_pool(ShardPool(pattern), resolve_embedder("pixels:4"), tmp_path / "cache", num_workers=0)
    assert "3 shards were cached" in caplog.text
