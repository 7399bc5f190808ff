"""One IPRO step of the whole of Wan2.2-TI2V-5B on random weights, by hand:

    python tests/bench_wan5b.py FOLDER --size 256x256 --frames 5 --sampling_steps 2
    WAN5B=FOLDER pytest -s tests/test_full_width.py

The first writes FOLDER (25 GB) and samples; the second takes minutes and 15 GB of memory.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif("WAN5B" not in os.environ, reason="by hand: WAN5B=FOLDER")]

# train.py with a detector that sees a face in the middle of every frame: random weights draw none
STEP = f"""
import sys
sys.path.insert(0, {str(REPO)!r})
import torch, cli, reward, train

class Detector:
    provider = "nothing: a face is given"
    def __call__(self, frames):
        points = 32 + (reward.TEMPLATE + 0.01) * 64 / 112
        return [reward.Faces(torch.tensor([[32.0, 32, 96, 96]]), torch.ones(1), points[None]) for _ in frames]

reward.FaceDetector = lambda *_, **__: Detector()
cli.run(train.main)
"""


def test_a_step_of_the_5b_model(tmp_path):
    for i, split in enumerate(("train", "heldout")):
        (tmp_path / "clips" / split).mkdir(parents=True)
        for file in sorted((REPO / "assets/clips/heldout").glob("*_0.*"))[3 * i : 3 * i + 3]:
            shutil.copy(file, tmp_path / "clips" / split)
    (tmp_path / "step.py").write_text(STEP)
    model = ["--model", "wan5b", "--ckpt", os.environ["WAN5B"]]
    clip = ["--frames", "5", "--size", "128x128", "--max_face", "10000", "--low_fps", "repeat"]
    data = [REPO / "data.py", tmp_path / "clips", "--out", tmp_path / "data", *clip]
    step = [
        tmp_path / "step.py", "--data", tmp_path / "data", "--out", tmp_path / "out", "--steps", "2", "--batch", "1",
            "--window", "1", "--checkpointing", "--eval_clips", "1"]  # fmt: skip
    step += ["--base_lora", Path(os.environ["WAN5B"]) / "base.safetensors"]
    for command in (data, step):
        subprocess.run([sys.executable, *map(str, command), *model], check=True)
    steps = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    first, second = (row for row in steps if "held_out" not in row)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\nsteps of {first['seconds']} and {second['seconds']} s, peak {peak:.1f} GB; {second}")
    assert first["grad_norm"] > 0 and first["kl"] == 0 < second["kl"] and not second["missing"]
    assert peak < 22 and (tmp_path / "out/lora.safetensors").stat().st_size > 2**20
