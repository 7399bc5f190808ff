"""The whole of Wan2.2-TI2V-5B, with random weights, from files to a clip: time and memory, on any machine.

    python tests/bench_wan5b.py FOLDER --size 256x256 --frames 5 --sampling_steps 2

Writes the released layout into FOLDER, which must be empty and have 25 GB free: three bf16 shards with their index,
Wan2.2_VAE.pth (fp32), models_t5_umt5-xxl-enc-bf16.pth and a word tokenizer, and two LoRAs, base.safetensors (rank 64,
alpha 8, as a distilled one) and tuned.safetensors (rank 32). Then it runs sample.py on all of it as a person would
(further options are passed on) and reports what the kernel counted; on a busy machine read the CPU seconds of all
cores, not the clock. Also checks one A14B expert's header: shards of the right names and shapes whose data is a hole
in the file. Delete FOLDER afterwards.
"""

import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from model import CONFIGS  # noqa: E402
from weights import Checkpoint, blank, expected, match  # noqa: E402


def random_tensors(module, dtype, scale=1.0):
    """A network's names with random values (four million of them, repeated) that keep activations finite."""
    noise = torch.randn(2**22).to(dtype)
    for name, p in module.state_dict().items():
        if p.dim() < 2 or "norm" in name or "gamma" in name:
            yield name, torch.full(p.shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
        else:
            block = noise * (scale / p[0].numel() ** 0.5)
            yield name, block.repeat(-(-p.numel() // len(block)))[: p.numel()].view(p.shape).clone()


def shards(module, count):
    """Native shard names and, of each, its tensors' names: a run of consecutive ones of about equal size."""
    state = module.state_dict()
    total, seen, where = sum(p.numel() for p in state.values()), 0, {}
    for name, p in state.items():
        k = min(count - 1, seen * count // total)
        where[name] = f"diffusion_pytorch_model-{k + 1:05d}-of-{count:05d}.safetensors"
        seen += p.numel()
    return where


def write_index(folder, where):
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))


def write_5b(folder):
    preset = CONFIGS["wan5b"]
    where, part = shards(blank(preset, "dit"), 3), {}
    tensors = random_tensors(blank(preset, "dit"), torch.bfloat16)
    for name, value in tensors:
        if part and where[name] != where[next(reversed(part))]:
            save_file(part, folder / where[next(reversed(part))])
            part = {}
        part[name] = value
    save_file(part, folder / where[name])
    write_index(folder, where)
    del part
    torch.save(dict(random_tensors(blank(preset, "vae"), torch.float32)), folder / "Wan2.2_VAE.pth")
    torch.save(
        dict(random_tensors(blank(preset, "text"), torch.bfloat16, 0.5)), folder / "models_t5_umt5-xxl-enc-bf16.pth"
    )
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate("? a man woman smiles".split())}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder / "google/umt5-xxl").mkdir(parents=True)
    tokenizer.save(str(folder / "google/umt5-xxl/tokenizer.json"))


def write_lora(path, rank, alpha, names):
    """A LoRA of the 5B's blocks with random values, of `names` = (down, up)."""
    tensors = {}
    for name, p in blank(CONFIGS["wan5b"], "dit").named_parameters():
        if name.startswith("blocks.") and p.dim() == 2 and name.endswith(".weight"):
            module = "diffusion_model." + name.removesuffix(".weight")
            for side, shape in zip(names, ((rank, p.shape[1]), (p.shape[0], rank))):
                tensors[f"{module}.{side}.weight"] = (0.01 * torch.randn(shape)).bfloat16()
            tensors[f"{module}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path)


def write_a14b_headers(folder):
    """An expert's six shards: whole headers, and data that takes no disk."""
    folder.mkdir()
    expert = blank(CONFIGS["wan14b"], "high")
    where = shards(expert, 6)
    for file in sorted(set(where.values())):
        header, offset = {}, 0
        for name, p in expert.state_dict().items():
            if where[name] == file:
                end = offset + 4 * p.numel()
                header[name] = {"dtype": "F32", "shape": list(p.shape), "data_offsets": [offset, end]}
                offset = end
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + offset)
    write_index(folder, where)


def main():
    folder, options = Path(sys.argv[1]).resolve(), sys.argv[2:]
    if folder.is_relative_to(ROOT):
        sys.exit(f"{folder}: 25 GB of random weights do not belong into the repository")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "Wan2.2_VAE.pth").exists():
        start = time.time()
        write_5b(folder)
        print(f"wrote {folder} in {time.time() - start:.0f} s")
    if not (folder / "base.safetensors").exists():
        write_lora(folder / "base.safetensors", 64, 8, ("lora_down", "lora_up"))
        write_lora(folder / "tuned.safetensors", 32, 32, ("lora_A", "lora_B"))
    if not (folder / "high_noise_model").exists():
        write_a14b_headers(folder / "high_noise_model")

    start = time.time()
    checkpoint = Checkpoint(folder / "high_noise_model")
    names, layout = match(blank(CONFIGS["wan14b"], "high"), checkpoint, expected(CONFIGS["wan14b"], "high"))
    print(f"A14B's high-noise expert: {len(names)} names and shapes fit, {layout}, {time.time() - start:.1f} s")

    Image.new("RGB", (320, 300), "grey").save(folder / "face.png")
    command = [sys.executable, "-u", ROOT / "sample.py", "--model", "wan5b", "--ckpt", folder, "--image",
               folder / "face.png", "--prompt", "a man smiles", "--out", folder / "clip.mp4", "--base_lora",
               folder / "base.safetensors", "--lora", folder / "tuned.safetensors", *options]  # fmt: skip
    start, most, last = time.time(), {"RssAnon": 0, "RssFile": 0, "both": 0}, ""
    with open(folder / "sample.log", "w") as log:
        child = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT)
        while child.poll() is None:
            try:
                status = Path(f"/proc/{child.pid}/status").read_text()
                now = {k: int(re.search(rf"{k}:\s+(\d+)", status)[1]) / 2**20 for k in ("RssAnon", "RssFile")}
                now["both"] = sum(now.values())
                most = {k: max(v, now[k]) for k, v in most.items()}
                high = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20
                ticks = sum(map(int, Path(f"/proc/{child.pid}/stat").read_text().split()[13:15]))
            except (OSError, TypeError):  # it ended between the two lines
                break
            text = re.split(r"[\r\n]", (folder / "sample.log").read_text().strip())[-1]
            if text != last:
                memory = f"anonymous {now['RssAnon']:5.1f} GB  mapped {now['RssFile']:5.1f} GB"
                cpu = ticks / os.sysconf("SC_CLK_TCK")
                print(f"{time.time() - start:6.0f} s  {cpu:6.0f} CPU s  {memory}  {text}", flush=True)
                last = text
            time.sleep(0.2)
    print(f"exit {child.wait()} after {time.time() - start:.0f} s; peak {high:.2f} GB resident (the kernel's VmHWM)")
    print(f"anonymous memory at most {most['RssAnon']:.2f} GB, mapped files at most {most['RssFile']:.2f} GB")
    print((folder / "sample.log").read_text().replace("\r", "\n"))


if __name__ == "__main__":
    main()
