"""The programs as a person runs them: mistakes are one line and exit status 2, nothing half-written."""

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cli
import data
import eval as evaluation
import plan
import sample
import train
from model import CONFIGS, WanDiT, add_lora
from weights import save_lora

REPO = Path(__file__).parent.parent


def run(program, *arguments, cwd):
    return subprocess.run(
        [sys.executable, str(REPO / program), *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )


LONG = "a man " + "who turns left and turns right " * 30
MISTAKES = [
    ("sample.py", [], "--image"),
    ("sample.py", ["--image", "none.png"], "none.png: no such file"),
    ("sample.py", ["--image", "text.png"], "text.png: not a readable picture"),
    ("sample.py", ["--image", "grey.png", "--prompt", LONG], "tokens"),
    ("sample.py", ["--image", "grey.png", "--frames", "16"], "nearest is 17"),
    ("sample.py", ["--image", "grey.png", "--size", "100x128"], "multiples of 16"),
    ("sample.py", ["--image", "grey.png", "--model", "wan9"], "unknown preset"),
    ("sample.py", ["--image", "grey.png", "--model", "wan5b"], "hf download Wan-AI/Wan2.2-TI2V-5B"),
    ("sample.py", ["--image", "grey.png", "--out", "nowhere/a.mp4"], "folder that exists"),
    ("sample.py", ["--image", "grey.png", "--lora", "none.safetensors"], "none.safetensors: no such file"),
    ("sample.py", ["--image", "grey.png", "--size", "128"], "not HxW"),
    ("sample.py", ["--image", "grey.png", "--size", "16000x16000"], "at most 4093 frames of 16777216 pixels"),
    ("sample.py", ["--image", "grey.png", "--frames", "1000000001"], "at most 4093 frames"),
    ("sample.py", ["--image", "grey.png", "--out", "folder.mp4"], "cannot be written there"),
    ("sample.py", ["--image", "dot.png"], "1x1 pixels; at least 16 a side"),
    ("sample.py", ["--image", "line.png"], "5000x20 pixels; at least 16 a side and at most 16 times"),
    ("sample.py", ["--image", "huge.png"], "huge.png: not a readable picture"),
    ("sample.py", ["--image", "grey.png", "--shift", "nan"], "must be a finite number"),
    ("sample.py", ["--image", "grey.png", "--cfg", "inf"], "must be a finite number"),
    ("sample.py", ["--colour", "red"], "--colour"),
    ("train.py", ["--steps", "many"], "--steps"),
    ("train.py", ["--model", "wan9"], "unknown preset"),
    ("train.py", ["--model", "wan14b"], "hf download Wan-AI/Wan2.2-I2V-A14B"),
    ("train.py", ["--window", "9"], "more than the 8 sampling steps"),
    ("train.py", ["--fsm", "best"], "choose from pool, first, aligned"),
    ("train.py", ["--seed", "-1"], "at least 0"),
    ("train.py", ["--sampling_steps", "1000000000"], "at most 1000"),
    ("train.py", ["--eval_clips", "0"], "at least 1"),
    ("train.py", ["--lr", "nan"], "must be a finite number"),
    ("train.py", ["--shift", "-1"], "at least 0"),
    ("train.py", ["--decay", "2"], "at most 1"),
    ("train.py", ["--moving", "1.5"], "at most 1"),
    ("train.py", ["--frames", "81"], "--frames"),
    ("train.py", ["--lora_rank", "1000000"], "more than the model's width"),
    ("train.py", ["--steps", "1000000000"], "at most 999999"),
    ("train.py", ["--batch", "1000000", "--micro_batch", "1000000"], "takes 69632 GB at least, this machine has"),
    ("data.py", ["clips", "--out", "made", "--workers", "1000000"], "--workers 1000000: at most 1024"),
    ("train.py", ["--out", "broken", "--resume"], "options.json: not readable"),
    ("train.py", ["--out", "listed", "--resume"], "options.json: not readable"),
    ("train.py", ["--out", "foreign", "--resume"], "another version of train.py, it has colour"),
    ("train.py", ["--data", "torn"], "index.jsonl: line 1 is not JSON"),
    ("train.py", ["--data", "short"], "index.jsonl: line 1 lacks cache, caption, frames, size, split"),
    ("train.py", ["--batch", "0"], "at least 1"),
    ("plan.py", ["--frames", "80"], "nearest is 81"),
    ("plan.py", ["--frames", "0"], "at least 1"),
    ("plan.py", ["--model", "tiny9"], "choose from tiny, wan5b, wan14b"),
    ("train.py", ["--reward_weight", "0", "--kl_weight", "0"], "nothing is left to optimise"),
    ("train.py", ["--data", "empty"], "index.jsonl"),
    ("train.py", ["--people", "all"], "data.py --people 2"),
    ("train.py", ["--out", "full"], "--resume"),
    ("train.py", ["--out", "full", "--resume"], "holds no run"),
    ("train.py", ["--out", "grey.png/run"], "grey.png; name another folder"),
    ("data.py", ["empty", "--out", "made"], "no video in it"),
    ("data.py", ["empty", "--out", "full"], "not empty"),
    ("data.py", ["nowhere", "--out", "made"], "nowhere: no such folder or file"),
    ("data.py", ["empty", "--out", "grey.png/set"], "grey.png; name another folder"),
    ("data.py", ["empty", "--out", "made", "--people", "0"], "at least 1"),
    ("data.py", ["empty", "--out", "made", "--split", "nan"], "must be a finite number"),
    ("data.py", ["empty", "--out", "made", "--coverage", "2"], "at most 1"),
    ("eval.py", [], "python train.py"),
    ("eval.py", ["--lora", "none.safetensors"], "none.safetensors: no such file"),
    ("eval.py", ["--out", "grey.png/run"], "grey.png; name another folder"),
    ("eval.py", ["--out", "full"], "is no evaluation"),
    ("eval.py", ["--person", "("], "not a regular expression"),
    ("eval.py", ["--vbench", "empty"], "no bin/vbench"),
    ("eval.py", ["--vbench_weights", "none"], "no such folder"),
    ("eval.py", ["--tally", "empty"], "study_key.json"),
    ("eval.py", ["--seeds", "0"], "at least 1"),
    ("eval.py", ["--people", "some"], "choose from largest, all"),
]
PROGRAMS = {"sample.py": sample, "train.py": train, "plan.py": plan, "data.py": data, "eval.py": evaluation}


@pytest.mark.parametrize("program, arguments, told", MISTAKES, ids=[" ".join([m[0], *m[1]])[:60] for m in MISTAKES])
def test_a_mistake_is_one_line_that_says_what_to_do(program, arguments, told, tmp_path, monkeypatch, capfd):
    """In this process, which has read torch already: the same main() under the same cli.run."""
    Image.fromarray(np.full((100, 120, 3), 128, np.uint8)).save(tmp_path / "grey.png")
    (tmp_path / "text.png").write_text("hello")
    for name in ("empty", "full", "broken", "listed", "foreign", "torn", "short", "folder.mp4"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken/options.json").write_text("{")
    (tmp_path / "listed/options.json").write_text("[1]")
    (tmp_path / "foreign/options.json").write_text('{"colour": "red"}')
    (tmp_path / "torn/index.jsonl").write_bytes(b'\xff{"clip": "a", "cac')
    (tmp_path / "short/index.jsonl").write_text('{"clip": "a"}')
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (5000, 20)).save(tmp_path / "line.png")
    if "huge.png" in arguments:
        Image.new("1", (20000, 20000)).save(tmp_path / "huge.png")
    (tmp_path / "full/something").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.run(PROGRAMS[program].main)
    message = capfd.readouterr().err
    assert end.value.code == 2, message
    assert len(message.strip().splitlines()) == 1 and told in message, message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mistake_of_a_process_is_its_exit_status(tmp_path):
    for program, arguments, told in (
        ("sample.py", ["--image", "none.png"], "sample.py: none.png: no such file"),
        ("train.py", ["--window", "9"], "train.py: --window 9: more than the 8 sampling steps"),
        ("data.py", ["nowhere", "--out", "made"], "data.py: nowhere: no such folder or file"),
        ("eval.py", ["--seeds", "0"], "eval.py: --seeds 0: at least 1"),
        ("plan.py", ["--frames", "0"], "plan.py: --frames 0: at least 1"),
        ("assets/build.py", ["everything"], "stages are: clips, more"),
    ):
        done = run(program, *arguments, cwd=tmp_path)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and told in done.stderr, done.stderr
        assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp's setting")
@pytest.mark.parametrize("program", ["sample.py", "data.py", "train.py", "eval.py"])
def test_threads_that_wait_do_not_spin_unless_the_person_says_so(program, tmp_path):
    """libgomp says what it was told; 14 s a step instead of 100 beside a busy process."""
    for given, told in ({}, "1000"), (dict(GOMP_SPINCOUNT="77"), "77"):
        env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | dict(OMP_DISPLAY_ENV="verbose") | given
        command = [sys.executable, REPO / program, "--none"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert f"GOMP_SPINCOUNT = '{told}'" in done.stderr, done.stderr


def test_help_lists_every_option_with_its_default(tmp_path):
    for program, options in (
        ("sample.py", sample.SampleOptions), ("data.py", data.DataOptions), ("train.py", train.TrainOptions),
        ("eval.py", evaluation.EvalOptions), ("plan.py", plan.PlanOptions),
    ):  # fmt: skip
        done = run(program, "--help", cwd=tmp_path)
        told = "".join(done.stdout.split())
        assert done.returncode == 0
        for f in dataclasses.fields(options):
            shown = f.name if program == "data.py" and f.name == "clips" else f"--{f.name}"
            assert shown in told
            if f.default not in (None, ""):
                assert "".join(f"(default: {f.default}".split()) in told


def test_help_says_what_a_recipe_and_the_tiny_model_take_instead(tmp_path):
    told = " ".join(run("train.py", "--help", cwd=tmp_path).stdout.split())
    assert "(default: 64; roll: 8; tiny: 3)" in told and "(default: True; roll: False)" in told


TRAINED = ["--steps", "2", "--batch", "1", "--sampling_steps", "2", "--window", "1", "--eval_clips", "1"]
FULL = [  # program, its arguments, KB of a disk that fills while it writes, what must be told
    ("sample.py", ["--image", REPO / "assets/face.png", "--prompt", "he nods", "--sampling_steps", "1"], 8, "clip.mp4"),
    ("data.py", ["clips"], 24, "safetensors"),
    ("data.py", ["clips"], 48, "No space left on device"),  # at the end
    ("eval.py", ["--clips", "1", "--sampling_steps", "1"], 60, "mp4"),
    ("train.py", TRAINED, 4, "No space left on device"),  # at once
    ("train.py", TRAINED, 3000, "checkpoints/step-000002: not written"),
]


@pytest.mark.parametrize("program, arguments, room, told", FULL, ids=[f"{case[0]} {case[2]} KB" for case in FULL])
def test_a_disk_that_fills_is_one_line_and_with_room_all_goes_on(program, arguments, room, told, tmp_path):
    """In a mount namespace of its own, on a tmpfs."""
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "x", tmp_path], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    if program == "eval.py":
        dit = WanDiT(CONFIGS["tiny"].dit)
        add_lora(dit, 2)
        save_lora(dit, tmp_path / "lora.safetensors")
        arguments = [*arguments, "--lora", tmp_path / "lora.safetensors"]
    (tmp_path / "clips").mkdir()
    for name in ("0000_0", "0001_0"):
        for suffix in (".mp4", ".txt"):
            shutil.copy(REPO / "assets/clips/train" / f"{name}{suffix}", tmp_path / "clips")
    (tmp_path / "disk").mkdir()
    out = tmp_path / "disk" / ("clip.mp4" if program == "sample.py" else "out")
    command = shlex.join(map(str, [sys.executable, REPO / program, *arguments, "--out", out]))
    more = "--resume" if program == "train.py" and room > 100 else ""
    script = f"""cd {tmp_path}; mount -t tmpfs -o size={room}k x disk
                 {command} 2> first; echo $?; find disk -name '*.part*' | wc -l
                 mount -o remount,size=1g disk; {command} {more} 2> second; echo $?"""
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True)
    first, second = ((tmp_path / name).read_text() for name in ("first", "second"))
    codes = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert codes == ["2", "0", "0"], (done.stdout, first, second)
    assert "Traceback" not in first and told in first.splitlines()[-1], first


def test_two_evaluations_in_one_folder_are_refused(tmp_path, monkeypatch, capfd):
    dit = WanDiT(CONFIGS["tiny"].dit)
    add_lora(dit, 2)
    save_lora(dit, tmp_path / "lora.safetensors")
    lock = cli.lock_folder(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["eval.py", "--lora", str(tmp_path / "lora.safetensors"), "--out", lock.name[:-5]])
    with pytest.raises(SystemExit) as end:
        cli.run(evaluation.main)
    assert end.value.code == 2 and f"process {os.getpid()} on" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lock"]
    lock.close()  # as where that process has died
    cli.lock_folder(tmp_path / "out")


def test_torchrun_reports_the_mistake_as_its_cause(tmp_path):
    launch = f"-m torch.distributed.run --standalone --nproc_per_node 2 {REPO / 'train.py'} --batch 3".split()
    done = subprocess.run([sys.executable, *launch], cwd=tmp_path, capture_output=True, text=True)
    line = "train.py: --batch 3 is no multiple of"
    assert done.returncode == 1 and sum(text.startswith(line) for text in done.stderr.splitlines()) == 1
    assert line in done.stderr[done.stderr.index("Root Cause") :] and not list(tmp_path.iterdir())
