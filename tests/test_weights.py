"""Checkpoints in every layout, against files that diffusers and transformers wrote; wrong files; LoRAs; sampling."""

import copy
import dataclasses
import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import data
import eval as evaluation
import model
import sample
import train
import weights
from cli import UserError
from model import (
    CONFIGS,
    DiTConfig,
    UMT5Config,
    VAEConfig,
    WanDiT,
    WanVAE,
    add_lora,
    lora_layers,
    tokenize,
)
from reward import TEMPLATE, FaceDetector, FaceReward, Faces
from sample import condition, guided, rollout, sigmas, unipc
from weights import Lora, Wan, attach_lora, load_weights, merge_lora, parse_loras, save_lora

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

# fmt: off
DIT5 = DiTConfig(dim=48, ffn_dim=80, num_heads=2, num_layers=2, in_dim=6, out_dim=6, freq_dim=32, text_dim=40,
                 text_len=12)
DIT14 = dataclasses.replace(DIT5, dim=72, in_dim=14, out_dim=5, num_heads=3)
SCALE = [dict(mean=tuple(k / 10 for k in range(z)), std=tuple(1 + k / 10 for k in range(z))) for z in (6, 5)]
VAE22 = VAEConfig(dim=8, dec_dim=12, z_dim=6, num_res_blocks=1, **SCALE[0])
VAE21 = VAEConfig(dim=8, dec_dim=8, z_dim=5, num_res_blocks=2, patch_size=1, **SCALE[1])
TEXT = UMT5Config(dim=40, dim_attn=32, dim_ffn=64, num_heads=4, num_layers=2, vocab_size=64)
# fmt: on


def random_values(module):
    """Random values everywhere, also where training starts at zero, and small enough that all stays finite."""
    for p in module.parameters():
        p.data = p.data + 0.3 / p.shape[-1] ** 0.5 * torch.randn_like(p)
    return module.eval().requires_grad_(False)


def diffusers_dit(cfg):
    return random_values(diffusers.WanTransformer3DModel(
        patch_size=cfg.patch_size, num_attention_heads=cfg.num_heads, attention_head_dim=cfg.dim // cfg.num_heads,
        in_channels=cfg.in_dim, out_channels=cfg.out_dim, text_dim=cfg.text_dim, freq_dim=cfg.freq_dim,
        ffn_dim=cfg.ffn_dim, num_layers=cfg.num_layers, cross_attn_norm=True, eps=cfg.eps, rope_max_seq_len=64,
    ))  # fmt: skip


def diffusers_vae(cfg):
    extra = {} if cfg.patch_size == 1 else dict(
        is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16,
        decoder_base_dim=cfg.dec_dim,
    )  # fmt: skip
    return random_values(diffusers.AutoencoderKLWan(
        base_dim=cfg.dim, z_dim=cfg.z_dim, dim_mult=list(cfg.dim_mult), num_res_blocks=cfg.num_res_blocks,
        temperal_downsample=list(cfg.temporal_downsample), latents_mean=list(cfg.mean), latents_std=list(cfg.std),
        **extra,
    ))  # fmt: skip


def transformers_umt5(cfg):
    return random_values(transformers.UMT5EncoderModel(transformers.UMT5Config(
        vocab_size=cfg.vocab_size, d_model=cfg.dim, d_kv=cfg.dim_attn // cfg.num_heads, d_ff=cfg.dim_ffn,
        num_heads=cfg.num_heads, num_layers=cfg.num_layers, feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )))  # fmt: skip


def write_tokenizer(path):
    words = ["<pad>", "</s>", "<unk>", "a", "man", "woman", "turns", "left", "smiles", "'", '"']
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def write_shards(state, folder, count=3, stem="diffusion_pytorch_model"):
    """The released layout: shards and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{stem}-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    where = {key: names[i % count] for i, key in enumerate(state)}
    for name in names:
        save_file({k: v.contiguous() for k, v in state.items() if where[k] == name}, folder / name)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Both models, small: as diffusers and transformers write them, and the same weights native and for ComfyUI."""
    root, patch = tmp_path_factory.mktemp("checkpoints"), pytest.MonkeyPatch()
    small = dict(text=TEXT, frames=9, size=(64, 64), steps=4)
    patch.setitem(CONFIGS, "wan5b", dataclasses.replace(CONFIGS["wan5b"], dit=DIT5, vae=VAE22, **small))
    patch.setitem(CONFIGS, "wan14b", dataclasses.replace(CONFIGS["wan14b"], dit=DIT14, vae=VAE21, **small))
    torch.manual_seed(0)
    theirs = {
        "wan5b": dict(transformer=diffusers_dit(DIT5), vae=diffusers_vae(VAE22)),
        "wan14b": dict(transformer=diffusers_dit(DIT14), transformer_2=diffusers_dit(DIT14), vae=diffusers_vae(VAE21)),
    }
    for name, parts in theirs.items():
        parts["text_encoder"] = transformers_umt5(TEXT)
        folder = root / f"diffusers-{name}"
        for part, module in parts.items():
            module.save_pretrained(folder / part, max_shard_size="60KB" if "transformer" in part else "5GB")
        write_tokenizer(folder / "tokenizer/tokenizer.json")
        wan = Wan(name, folder, dtype=torch.float32)
        state = {"vae": wan.vae.state_dict(), "text": wan.text.state_dict()}
        dits = {"": wan.dit} if name == "wan5b" else {n: wan.dit.expert(n) for n in ("high", "low")}
        native, comfy = root / f"native-{name}", root / f"comfy-{name}"
        for expert, dit in dits.items():
            write_shards(dit.state_dict(), native / f"{expert}_noise_model" if expert else native)
            file = comfy / f"diffusion_models/wan2.2_{expert or 'ti2v'}_noise_fp16.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"model.diffusion_model." + k: v for k, v in dit.state_dict().items()}, file)
        torch.save(state["vae"], native / ("Wan2.2_VAE.pth" if name == "wan5b" else "Wan2.1_VAE.pth"))
        torch.save(state["text"], native / "models_t5_umt5-xxl-enc-bf16.pth")
        write_tokenizer(native / "google/umt5-xxl/tokenizer.json")
        for part, sub in (("vae", "vae"), ("text", "text_encoders")):
            (comfy / sub).mkdir()
            save_file(state[part], comfy / sub / f"some_{part}_name.safetensors")
        write_tokenizer(comfy / "tokenizer.json")
    yield root, theirs
    patch.undo()


@pytest.fixture
def tmp_native(world, tmp_path):
    """A copy of the native wan5b folder, to damage."""
    return shutil.copytree(world[0] / "native-wan5b", tmp_path / "ckpt")


PICTURE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)


def test_others_may_read_what_is_written_as_far_as_the_umask_lets_them(tmp_path):
    weights.write_safetensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("name", ["wan5b", "wan14b"])
def test_a_sample_from_files_equals_diffusers_image_to_video_pipeline(name, world):
    """Files, conditioning, expert switch, guidance and schedule at once: 4 Euler steps from the same noise."""
    root, theirs = world
    parts, preset = theirs[name], CONFIGS[name]
    wan = Wan(name, root / f"diffusers-{name}", dtype=torch.float32)
    prompt, null = wan.encode_text(["a man turns left"]), wan.encode_text(["a woman"])
    noise = torch.randn(1, preset.vae.z_dim, 3, *(64 // s for s in preset.vae.stride[1:]))
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=parts["vae"], transformer=parts["transformer"],
        transformer_2=parts.get("transformer_2"), boundary_ratio=preset.boundary, expand_timesteps=name == "wan5b",
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    # the scheduler's own last noise level is not 0's neighbour in an even spacing; give it ours
    pipe.scheduler.set_timesteps = lambda steps, device=None, f=pipe.scheduler.set_timesteps: f(
        sigmas=np.linspace(1, 0, steps + 1)[:-1], device=device
    )
    reference = pipe(
        image=Image.fromarray(PICTURE), prompt_embeds=prompt, negative_prompt_embeds=null, height=64, width=64,
        num_frames=9, num_inference_steps=4, guidance_scale=3.5, latents=noise, output_type="latent",
    ).frames  # fmt: skip
    first, y = condition(wan, PICTURE, 9)
    ours = rollout(guided(wan.dit, null, 3.5), noise, first, prompt, sigmas(4, 5.0), y=y)[0]
    assert (ours - reference).abs().max() < 1e-4 * reference.abs().max()  # fp32
    video = sample.decode(wan.vae, ours)
    shift, scale = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (preset.vae.mean, preset.vae.std))
    expected = parts["vae"].decode(reference * scale + shift).sample
    assert np.abs(video.astype(int) - sample.to_frames(expected).astype(int)).max() <= 1


def test_prompts_are_encoded_as_transformers_does(world):
    root, theirs = world
    wan = Wan("wan5b", root / "diffusers-wan5b", dtype=torch.float32)
    context = wan.encode_text(["a man  turns&amp;amp;\n left"])
    ids = torch.tensor([[3, 4, 6, 2, 7] + [0] * 7])  # & is unknown
    mask = (torch.arange(12) < 5).long()[None]
    reference = theirs["wan5b"]["text_encoder"](ids, mask).last_hidden_state * mask[..., None]
    assert (context - reference).abs().max() < 1e-4
    assert (context[0, 5:] == 0).all()
    half = Wan("wan5b", root / "diffusers-wan5b", dtype=torch.bfloat16).encode_text(["a man turns left"])
    ids, mask = torch.tensor([[3, 4, 6, 7] + [0] * 8]), (torch.arange(12) < 4).long()[None]
    encoders = [f(theirs["wan5b"]["text_encoder"]) for f in (lambda m: m, lambda m: copy.deepcopy(m).bfloat16())]
    exact, rounded = (m(ids, mask).last_hidden_state.float() * mask[..., None] for m in encoders)
    assert 0 < (half - exact).abs().mean() <= 1.1 * (rounded - exact).abs().mean()


def test_prompts_are_cleaned_and_the_tokenizers_own_padding_and_cutting_are_off(world, tmp_path):
    folder = shutil.copytree(world[0] / "native-wan5b", tmp_path / "ckpt")
    file = folder / "google/umt5-xxl/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_padding(length=9)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(file))
    tokenizer = Wan("wan5b", folder).tokenizer
    ids, mask = tokenize(["man\u3000 turns\n left &amp;lt; a", "it\u2019s \u201ca man\u201d"], tokenizer, 12)
    assert ids[0].tolist() == [4, 6, 7, 2, 3] + [0] * 7 and mask[0].tolist() == [1] * 5 + [0] * 7
    assert ids[1, [1, 3, 6]].tolist() == [9, 10, 10]
    straight, _ = tokenize(['it\'s "a man"'], tokenizer, 12)
    assert torch.equal(ids[1:], straight)
    with pytest.raises(UserError, match="13 tokens, the model reads 12"):
        tokenize(["man " * 13], tokenizer, 12)


@pytest.mark.parametrize("name", ["wan5b", "wan14b"])
def test_every_layout_loads_to_the_same_tensors_and_the_same_clip(name, world, tmp_path):
    clips = []
    for layout in ("diffusers", "native", "comfy"):
        wan = Wan(name, world[0] / f"{layout}-{name}", dtype=torch.float32)
        dits = [wan.dit] if name == "wan5b" else [wan.dit.expert("high"), wan.dit.expert("low")]
        clips.append([m.state_dict() for m in (*dits, wan.vae, wan.text)] + [wan.vae.mean, wan.vae.std])
    for other in clips[1:]:
        for a, b in zip(clips[0], other):
            if isinstance(a, dict):
                assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
            else:
                assert torch.equal(a, b)


@pytest.mark.parametrize("name, layout, how", [
    ("wan5b", "native", ()), ("wan5b", "native", ("--solver", "renoise", "--cfg", 1)),
    ("wan14b", "comfy", ("--solver", "euler")),
])  # fmt: skip
def test_sample_writes_a_clip_from_a_released_layout(name, layout, how, world, tmp_path, monkeypatch, capsys):
    Image.fromarray(PICTURE).save(tmp_path / "face.png")
    out = tmp_path / "clip.mp4"
    arguments = ["--image", tmp_path / "face.png", "--prompt", "a man smiles", "--out", out, "--model", name,
                 "--ckpt", world[0] / f"{layout}-{name}", *how]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["sample.py", *map(str, arguments)])
    prompts = []
    monkeypatch.setattr(weights, "tokenize", lambda p, *rest: prompts.extend(p) or tokenize(["a man"] * len(p), *rest))
    sample.main()
    assert prompts == ["a man smiles", *([] if "--cfg" in how else [sample.NEGATIVE])]  # both presets have guidance on
    frames, fps = sample.read_video(out)
    assert frames.shape == (9, 64, 64, 3) and fps == CONFIGS[name].fps
    assert f"{out}: 9 frames of 64x64" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["wan5b", "wan14b"])
def test_a_released_layout_trains_from_clips_to_a_lora(name, world, tmp_path, monkeypatch, capsys):
    """data.py, train.py and --resume on a distilled base; of A14B's experts the low-noise one is tuned. eval.py then
    measures what training saw."""
    for split in ("train", "heldout"):
        (tmp_path / "clips" / split).mkdir(parents=True)
        for i in range(2):
            frames = np.random.default_rng(i).integers(0, 255, (9, 64, 64, 3), np.uint8)
            sample.write_video(tmp_path / "clips" / split / f"{i}.mp4", frames, CONFIGS[name].fps)
            (tmp_path / "clips" / split / f"{i}.txt").write_text("a man smiles")

    face = Faces(torch.tensor([[8.0, 8, 56, 56]]), torch.ones(1), 8 + TEMPLATE[None] * 48 / 112)
    # networks of random weights show none
    monkeypatch.setattr(FaceDetector, "__call__", lambda _, frames: [face] * len(frames))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    ckpt = ["--model", name, "--ckpt", world[0] / f"native-{name}"]

    def program(main, *arguments):
        monkeypatch.setattr("sys.argv", [str(a) for a in ("program", *arguments)])
        main()

    program(data.main, tmp_path / "clips", "--out", tmp_path / "set", "--max_face", 960, *ckpt)
    dit = WanDiT(CONFIGS[name].dit)
    for p in add_lora(dit, 2):
        p.data += 0.1 * torch.randn_like(p)
    file, out = tmp_path / "base=1.safetensors", ["--out", tmp_path / "run"]
    save_lora(dit, file)
    base = ["--base_lora", f"{file}:0.5" if name == "wan5b" else f"high={file},low={file}"]
    solver = "renoise" if name == "wan5b" else "euler"
    program(train.main, *ckpt, *base, "--solver", solver, "--data", tmp_path / "set", *out, "--batch", 2, "--steps", 2,
            "--sampling_steps", 4, "--window", 1, "--lr", 1e-3, "--lora_rank", 2, "--eval_clips", 2,
            "--offload")  # fmt: skip
    program(train.main, "--resume", *out, "--steps", 3)
    said, transformers_ = capsys.readouterr().out, 1 if name == "wan5b" else 2
    assert "going on from step 2" in said
    assert said.count("base=1.safetensors: merged into 20 layers") == 2 * transformers_  # by both runs
    assert f"{name}: 4 steps by {solver}, shift 5, no guidance, base LoRA {base[1]}" in said
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "held_out" not in row]
    assert [row["step"] for row in steps] == [0, 1, 2] and all(row["face_rate"] == 1 for row in steps)
    assert steps[0]["kl"] == 0 < steps[1]["kl"] and all(row["grad_norm"] > 0 for row in steps)
    lora = tmp_path / "run/lora.safetensors"
    assert any(v.any() for k, v in load_file(lora).items() if "lora_B" in k)
    tuned, plain = (Wan(name, world[0] / f"native-{name}").tuned for _ in range(2))
    assert merge_lora(tuned, lora).layers == 2 * 10  # q, k, v, o of both attentions and two layers of feed-forward
    assert not all(map(torch.equal, tuned.parameters(), plain.parameters()))
    program(evaluation.main, *ckpt, *base, "--data", tmp_path / "set", "--out", tmp_path / "report", "--lora", lora,
            "--solver", solver, "--clips", 2, "--sampling_steps", 4)  # fmt: skip
    part = "transformer" if name == "wan5b" else "low-noise expert"
    assert f"lora.safetensors: beside 20 layers of the {part}" in capsys.readouterr().out
    results = json.loads((tmp_path / "report/results.json").read_text())
    versions = {row["version"] for row in results["clips"]}
    assert len(versions - {"true", "vae", "still", "base"}) == 1 and "base" in versions
    watched = {row["step"]: row["held_out"]["facesim"] for row in rows if "held_out" in row}
    preset, clips = CONFIGS[name], data.Clips(tmp_path / "set", "heldout")
    for loras, step in (("", 0), (str(lora), 3)):  # what is loaded beside the weights is what was tuned
        wan = Wan(name, world[0] / f"native-{name}", loras=parse_loras(loras, preset),
                         base_loras=parse_loras(base[1], preset, "--base_lora"))  # fmt: skip
        reward = FaceReward.from_folder(model.ASSETS)
        metrics, _ = evaluation.sample_held_out(wan, reward, clips, [0, 1], 4, solver=solver)
        assert evaluation.mean_metrics(metrics)["facesim"] == pytest.approx(watched[step], abs=1e-5)
    assert watched[0] != watched[3]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_files_of_any_precision_load_and_half_keeps_norms_and_time_in_fp32(precision, tmp_path):
    kind = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[precision]
    state = {k: v.to(kind) for k, v in random_values(WanDiT(DIT5)).state_dict().items()}
    save_file(state, tmp_path / "dit.safetensors")
    exact = WanDiT(DIT5)
    done = load_weights(exact, tmp_path / "dit.safetensors")
    assert done.precision == precision and done.layout == "native" and done.tensors == len(state)
    assert all(torch.equal(v, state[k].float()) for k, v in exact.state_dict().items())
    with torch.device("meta"):
        half = WanDiT(DIT5)
    load_weights(half, tmp_path / "dit.safetensors", dtype=torch.bfloat16)
    for key, value in half.state_dict().items():
        full = any(word in key for word in ("norm", "modulation", "time_", "head"))
        assert value.dtype == (torch.float32 if full else torch.bfloat16), key


def test_bf16_is_as_near_to_fp32_as_diffusers_bf16_is(world):
    root, theirs = world
    reference = theirs["wan5b"]["transformer"]
    wan = Wan("wan5b", root / "diffusers-wan5b", dtype=torch.bfloat16)
    x, t, context = torch.randn(1, 6, 3, 8, 8), torch.tensor([[0.0, 700.0, 700.0]]), torch.randn(1, 12, 40)
    per_token = t.repeat_interleave(16, 1)
    exact = reference(x, per_token, context, return_dict=False)[0]
    half = diffusers.WanTransformer3DModel.from_pretrained(
        root / "diffusers-wan5b/transformer", torch_dtype=torch.bfloat16
    )
    theirs_off = (half(x.bfloat16(), per_token, context.bfloat16(), return_dict=False)[0].float() - exact).abs()
    ours_off = (wan.dit(x, t, context) - exact).abs()
    assert 0 < ours_off.mean() <= theirs_off.mean() and ours_off.max() <= 1.5 * theirs_off.max()


@pytest.mark.parametrize("suffix, shape", [("scale_weight", ()), ("weight_scale", (1,)), ("weight_scale", (80,))])
def test_fp8_scaled_files_are_dequantised(suffix, shape, tmp_path):
    source = random_values(WanDiT(DIT5)).state_dict()
    state = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for key, value in source.items():
        if key.endswith("ffn.0.weight"):
            scale = value.abs().amax(1) / 448 if shape == (80,) else (value.abs().max() / 448).view(shape)
            state[key] = (value / (scale[:, None] if shape == (80,) else scale)).to(torch.float8_e4m3fn)
            state[key.removesuffix("weight") + suffix] = scale
            state[key.removesuffix("weight") + "scale_input"] = torch.ones(1)
        else:
            state[key] = value
    save_file({"model.diffusion_model." + k: v for k, v in state.items()}, tmp_path / "fp8_scaled.safetensors")
    ours = WanDiT(DIT5)
    assert load_weights(ours, tmp_path / "fp8_scaled.safetensors").precision == "fp32+fp8"
    for key, value in ours.state_dict().items():
        error = (value - source[key]).abs()
        assert (error <= 0.07 * source[key].abs() + 1e-3).all(), key  # fp8 e4m3 has 3 bits of mantissa


def test_fp8_with_a_scale_a_block_is_dequantised(tmp_path):
    """128 x 128 weights to a scale, as DeepSeek's layout has it; the last blocks are cut off at the weight's border."""
    cfg = dataclasses.replace(DIT5, dim=144, ffn_dim=300)
    source = random_values(WanDiT(cfg)).state_dict()
    state = {}
    for key, value in source.items():
        if key.endswith("ffn.0.weight"):
            scale = torch.rand(3, 2) + 0.5
            for i, rows in enumerate(value.split(128)):
                for j, block in enumerate(rows.split(128, 1)):
                    block /= scale[i, j]
            state[key], state[key + "_scale_inv"] = value.to(torch.float8_e4m3fn), scale
            value *= scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :144]
        else:
            state[key] = value
    save_file(state, tmp_path / "fp8.safetensors")
    ours = WanDiT(cfg)
    assert load_weights(ours, tmp_path / "fp8.safetensors").precision == "fp32+fp8"
    for key, value in ours.state_dict().items():
        assert ((value - source[key]).abs() <= 0.07 * source[key].abs() + 2e-3).all(), key  # 3 bits of mantissa


@pytest.mark.parametrize("harm", ["lost", "block"])
def test_fp8_values_without_a_scale_that_fits_are_refused(harm, tmp_path):
    state = random_values(WanDiT(DIT5)).state_dict()
    for k in (0, 1):
        key = f"blocks.{k}.ffn.0.weight"
        state[key] = state[key].to(torch.float8_e4m3fn)
        state[key.replace("weight", "scale_weight")] = torch.ones(())
    if harm == "lost":
        del state["blocks.1.ffn.0.scale_weight"]
    else:
        state["blocks.1.ffn.0.scale_weight"] = torch.ones(80, 3)
    save_file(state, tmp_path / "fp8.safetensors")
    with pytest.raises(UserError, match=r"1 without a scale that fits \(blocks.1.ffn.0.weight\)"):
        load_weights(WanDiT(DIT5), tmp_path / "fp8.safetensors")
    save_file({k: v for k, v in state.items() if "scale" not in k}, tmp_path / "plain.safetensors")  # needs no scales
    assert load_weights(WanDiT(DIT5), tmp_path / "plain.safetensors").precision == "fp32+fp8"


def test_an_fp8_scale_may_lie_in_another_shard(tmp_path):
    state = random_values(WanDiT(DIT5)).state_dict()
    key, scale = "blocks.0.ffn.0.weight", torch.tensor(0.25)
    state[key] = state[key].to(torch.float8_e4m3fn)
    save_file(state, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"blocks.0.ffn.0.weight_scale": scale}, tmp_path / "model-00002-of-00002.safetensors")
    where = {k: f"model-0000{1 + ('scale' in k)}-of-00002.safetensors" for k in (*state, "blocks.0.ffn.0.weight_scale")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=where)))
    dit = WanDiT(DIT5)
    load_weights(dit, tmp_path)
    assert torch.equal(dit.state_dict()[key], state[key].float() * scale)


LOAD = """
import re, sys, torch, weights
from model import DiTConfig, WanDiT
from weights import load_weights
weights.MAPPED = 20 * 2**20
cfg = DiTConfig(dim=1024, ffn_dim=4096, num_heads=8, num_layers=6, text_dim=64)
with torch.device("meta"):
    dit = WanDiT(cfg)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
load_weights(dit, sys.argv[1], "cpu", torch.bfloat16)
print(peak() - before, sum(p.nbytes for p in dit.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_peak_memory_is_the_model_and_what_is_mapped_at_a_time(suffix, tmp_path):
    """Of ONE file that holds the whole network: resident memory must not be the model twice."""
    with torch.device("meta"):
        dit = WanDiT(DiTConfig(dim=1024, ffn_dim=4096, num_heads=8, num_layers=6, text_dim=64))
    state = {k: torch.zeros(v.shape, dtype=torch.bfloat16) for k, v in dit.state_dict().items()}
    (save_file if suffix == "safetensors" else torch.save)(state, tmp_path / f"dit.{suffix}")
    code = [sys.executable, "-c", LOAD, str(tmp_path / f"dit.{suffix}")]
    done = subprocess.run(code, cwd=Path(weights.__file__).parent, capture_output=True, text=True, check=True)
    grown, size = map(int, done.stdout.split())
    assert size < grown < size + 90e6, f"{grown / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"


def test_loading_holds_one_tensor_at_a_time_on_the_meta_device(tmp_path):
    """A network that starts on the meta device ends with its own memory, not the file's pages."""
    write_shards(random_values(WanDiT(DIT5)).state_dict(), tmp_path / "shards")
    with torch.device("meta"):
        dit = WanDiT(DIT5)
    done = load_weights(dit, tmp_path / "shards")
    assert len(done.files) == 3 and not any(p.is_meta for p in dit.parameters())
    before = {k: v.clone() for k, v in dit.state_dict().items()}
    for file in (tmp_path / "shards").glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    assert all(torch.equal(v, before[k]) for k, v in dit.state_dict().items())


# ------------------------------------------------------------------------------------------------- what is wrong


def damage_truncate(folder):
    file = sorted(folder.glob("diffusion*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-500])
    return [file.name, "not a readable safetensors file"]


def damage_no_index(folder):
    next(folder.glob("*.index.json")).unlink()
    return ["3 shard(s) but no *.index.json"]


def damage_lost_shard(folder):
    sorted(folder.glob("diffusion*.safetensors"))[2].unlink()
    return ["1 of 3 shards are missing", "00003-of-00003"]


def damage_broken_index(folder):
    next(folder.glob("*.index.json")).write_text("{")
    return ["not an index of shards"]


def damage_index_that_leaves_the_folder(folder):
    index = next(folder.glob("*.index.json"))
    content = json.loads(index.read_text())
    file = next(iter(content["weight_map"].values()))
    (folder / file).rename(folder.parent / file)
    content["weight_map"] = {k: f"../{v}" if v == file else v for k, v in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    return [f"names ../{file}, a file outside of its folder"]


def damage_extra_keys(folder):
    file = sorted(folder.glob("diffusion*.safetensors"))[0]
    save_file(load_file(file) | {"blocks.0.adapter.weight": torch.zeros(2)}, file)
    return ["1 unexpected (blocks.0.adapter.weight)", "native layout"]


def damage_twice(folder):
    files = sorted(folder.glob("diffusion*.safetensors"))
    first = load_file(files[0])
    name = next(iter(first))
    save_file(load_file(files[1]) | {name: first[name]}, files[1])
    return [f"{name} is in another shard too", files[1].name]


def damage_types(folder):
    file = sorted(folder.glob("diffusion*.safetensors"))[0]
    state = load_file(file)
    name = next(iter(state))
    save_file(state | {name: state[name].to(torch.int8)}, file)
    return [f"1 of another type ({name} I8)"]


def damage_shape(folder):
    file = sorted(folder.glob("diffusion*.safetensors"))[0]
    state = load_file(file)
    name = next(k for k in state if state[k].dim() == 2)
    save_file(state | {name: torch.zeros(3, 4)}, file)
    return [f"1 mis-shaped ({name} [3, 4], wanted"]


class Harm:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/ipro-code-was-run",)


def damage_code(folder):
    with open(folder / "Wan2.2_VAE.pth", "wb") as file:
        pickle.dump({"encoder.conv1.weight": Harm()}, file)
    return ["Wan2.2_VAE.pth", "could run code"]


def damage_torn_pickle(folder):
    file = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    file.write_bytes(file.read_bytes()[:1000])
    return ["models_t5_umt5-xxl-enc-bf16.pth", "download it again"]


def damage_lost_tokenizer(folder):
    (folder / "google/umt5-xxl/tokenizer.json").unlink()
    return ["no tokenizer.json", "hf download Wan-AI/Wan2.2-TI2V-5B"]


def damage_wrong_vae(folder):
    torch.save(WanVAE(VAE21).state_dict(), folder / "Wan2.2_VAE.pth")
    return [
        "this is a Wan VAE of 5 latent channels",
        "a Wan VAE of 6 latent channels and decoder width 48 was asked for",
    ]


@pytest.mark.parametrize("damage", [v for k, v in list(globals().items()) if k.startswith("damage_")])
def test_a_damaged_folder_is_one_clear_error(damage, tmp_native, tmp_path):
    words = damage(tmp_native)
    with pytest.raises(UserError) as error:
        Wan("wan5b", tmp_native)
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value), error.value
    assert not Path("/tmp/ipro-code-was-run").exists()


def test_the_wrong_model_is_named_as_what_it_is(world, tmp_path):
    root, _ = world
    for path, words in (
        (
            root / "native-wan14b/high_noise_model",
            "this is A14B's high-noise expert, wan5b's transformer was asked for",
        ),
        (root / "diffusers-wan14b/transformer_2", "this is A14B's low-noise expert"),
        (root / "native-wan14b/Wan2.1_VAE.pth", "this is a Wan VAE"),
        (root / "comfy-wan5b/text_encoders", "this is a UMT5 encoder"),
    ):
        with pytest.raises(UserError, match=words):
            load_weights(WanDiT(DIT5), path)
    for name, folder, words in (
        ("wan5b", "native-wan14b", r"A14B's high-noise expert \(high_noise_model\), A14B's low-noise expert"),
        ("wan5b", "native-wan14b/high_noise_model", r"this is A14B's high-noise expert \(\.\)"),
        ("wan5b", "diffusers-wan14b", "this is A14B's high-noise expert, wan5b's transformer was asked for"),
        ("wan5b", "comfy-wan14b", r"this is A14B's high-noise expert \(diffusion_models/wan2.2_high"),
        ("wan14b", "native-wan5b", r"no low-noise expert in it \(this is wan5b's transformer"),
    ):
        with pytest.raises(UserError, match=words):
            Wan(name, root / folder)
    dit = WanDiT(DIT5)
    add_lora(dit, 2)
    save_lora(dit, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="this is a LoRA"):
        load_weights(WanDiT(DIT5), tmp_path / "lora.safetensors")


def test_a_flat_folder_of_single_files_and_an_expert_with_a_fault_are_read_by_content(world, tmp_path):
    root, _ = world
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (root / "comfy-wan5b").rglob("*.*"):
        if file.is_file():
            shutil.copy(file, flat / file.name)
    assert Wan("wan5b", flat).dit.cfg == DIT5
    (flat / "below").mkdir()
    for file in flat.glob("*.safetensors"):
        if "vae" not in file.name:  # a VAE alone in the folder is not taken for the transformer
            file.rename(flat / "below" / file.name)
    assert Wan("wan5b", flat).dit.cfg == DIT5
    folder = shutil.copytree(root / "native-wan14b", tmp_path / "fault")
    file = next((folder / "low_noise_model").glob("*.safetensors"))
    state = load_file(file)
    lost = next(iter(state))
    save_file({k: v for k, v in state.items() if k != lost}, file)
    with pytest.raises(UserError, match=rf"not quite A14B's low-noise expert; .* 1 missing \({lost}\)"):
        Wan("wan14b", folder)


def quantised_state(kind):
    """The names and types of a transformer in a format that is not read here."""
    state = WanDiT(DIT5).state_dict()
    for k in (0, 1):
        name = f"blocks.{k}.ffn.0."
        if kind == "nunchaku":
            del state[name + "weight"]
            state |= {name + "qweight": torch.zeros(80, 24, dtype=torch.int8), name + "wscales": torch.ones(1, 80),
                      name + "lora_down": torch.ones(48, 2), name + "lora_up": torch.ones(80, 2),
                      name + "smooth_factor": torch.ones(48)}  # fmt: skip
        elif kind == "bitsandbytes":
            state |= {name + "weight": torch.zeros(1920, 1, dtype=torch.uint8), name + "weight.absmax": torch.ones(60)}
        elif kind == "int8":
            state |= {name + "weight": torch.zeros(80, 48, dtype=torch.int8), name + "weight_scale": torch.ones(80)}
        else:
            state |= {name + "weight": torch.zeros(80, 48).to(torch.float8_e4m3fn),
                      name + "weight_scale": torch.zeros(80, 2, dtype=torch.uint8)}  # fmt: skip
    return state


@pytest.mark.parametrize("kind, words", [
    ("gguf", "GGUF"), ("nunchaku", "nunchaku"), ("bitsandbytes", "bitsandbytes"), ("int8", "int8 weights"),
    ("mxfp8", "mxfp8"),
])  # fmt: skip
def test_quantised_files_are_refused_by_what_they_are_with_what_to_download_instead(kind, words, tmp_native, tmp_path):
    file = tmp_path / f"wan.{'gguf' if kind == 'gguf' else 'safetensors'}"
    if kind == "gguf":
        file.write_bytes(b"GGUF\x03\0\0\0")
    else:
        save_file(quantised_state(kind), file)
    with pytest.raises(UserError, match=f"{words}.* download the same model in bf16, fp16 or fp8"):
        load_weights(WanDiT(DIT5), file)
    for shard in tmp_native.glob("diffusion_pytorch_model*"):
        shard.unlink()
    shutil.copy(file, tmp_native)
    with pytest.raises(UserError, match=f"(?s)no transformer.*{words}"):
        Wan("wan5b", tmp_native)


@pytest.mark.parametrize("layout", ["model.", "module.", "generator.model.", "nested", "model.diffusion_model."])
def test_a_transformer_in_a_pt_file_is_found_and_read(layout, tmp_native):
    """As 5B-Turbo's generator.pt, and as training programs write them."""
    state = Wan("wan5b", tmp_native, dtype=torch.float32).dit.state_dict()
    for shard in tmp_native.glob("diffusion_pytorch_model*"):
        shard.unlink()
    prefixed = {(layout if layout != "nested" else "model.") + k: v for k, v in state.items()}
    checkpoint = {"generator": prefixed, "step": 3} if layout == "nested" else prefixed
    torch.save(checkpoint, tmp_native / "generator.pt")
    torch.save({"optimizer": [1, 2]}, tmp_native / "optimizer.pt")  # is none of ours, and no harm
    found = Wan("wan5b", tmp_native, dtype=torch.float32).dit.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(v, found[k]) for k, v in state.items())


def test_files_of_the_hubs_cache_are_known_by_their_links_names(world, tmp_path):
    """There a file's name is a link to a blob, which is called by its hash."""
    snapshot, blobs = tmp_path / "snapshots/1a2b", tmp_path / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(f for f in (world[0] / "comfy-wan14b").rglob("*.*") if f.is_file())):
        shutil.copy(file, blobs / f"{i:064x}")
        link = snapshot / file.relative_to(world[0] / "comfy-wan14b")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / f"{i:064x}")
    wan, plain = (Wan("wan14b", folder, dtype=torch.float32) for folder in (snapshot, world[0] / "comfy-wan14b"))
    assert wan.paths["high"].name == "wan2.2_high_noise_fp16.safetensors"
    for name in ("high", "low"):
        assert all(map(torch.equal, wan.dit.expert(name).parameters(), plain.dit.expert(name).parameters()))


def test_swapped_and_doubled_experts_are_refused(world, tmp_path):
    folder = shutil.copytree(world[0] / "native-wan14b", tmp_path / "twice")
    shutil.rmtree(folder / "low_noise_model")
    shutil.copytree(folder / "high_noise_model", folder / "low_noise_model")
    with pytest.raises(UserError, match="the same weights"):
        Wan("wan14b", folder)
    shutil.rmtree(folder / "low_noise_model")
    (folder / "low_noise_model").symlink_to(folder / "high_noise_model")
    with pytest.raises(UserError, match="swapped"):
        Wan("wan14b", folder)
    comfy = shutil.copytree(world[0] / "comfy-wan14b", tmp_path / "comfy")
    file = comfy / "diffusion_models/wan2.2_low_noise_fp16.safetensors"
    file.rename(file.with_name("wan2.2_high_noise_copy.safetensors"))
    with pytest.raises(UserError, match="are both A14B's high-noise expert"):
        Wan("wan14b", comfy)


@pytest.mark.parametrize("name", ["wan5b", "wan14b"])
def test_networks_that_are_not_at_work_wait_on_the_host(name, world, monkeypatch):
    """With one device at hand, what is moved where is written down instead."""
    wan = Wan(name, world[0] / f"native-{name}", dtype=torch.float32)
    experts = [wan.dit] if name == "wan5b" else [wan.dit.expert("high"), wan.dit.expert("low")]
    names = dict(zip(map(id, experts), ("high", "low"))) | {id(wan.dit): "dit", id(wan.vae): "vae"}
    assert wan.tuned is experts[-1]
    moved = []
    for module in (model, weights):
        monkeypatch.setattr(module, "move_frozen", lambda m, device: moved.append((names[id(m)], str(device))))
    wan.device = "device"

    def moves(*parts):
        moved.clear()
        wan.at_work(*parts)
        return set(moved)

    assert not moves("vae") and not moves("dit")  # without offload nothing moves
    wan.offload = True
    assert moves("vae") == {("dit", "cpu"), ("vae", "device")}
    if name == "wan5b":
        assert moves("dit") == {("dit", "device"), ("vae", "cpu")}
        assert moves("dit", "vae") == {("dit", "device"), ("vae", "device")} and moves("tuned") == moves("dit")
        return
    assert moves("dit") == {("vae", "cpu")}
    assert moves("tuned") == {("low", "device"), ("high", "cpu"), ("vae", "cpu")}  # called without the sampler
    for expert in experts:
        monkeypatch.setattr(expert, "forward", lambda x, *_: x)
    for t, at_work in ((950.0, "high"), (10.0, "low")):  # by the latent's timestep
        moved.clear()
        wan.dit(torch.zeros(1, device="meta"), torch.tensor([t]), None)
        assert moved == [(p, "meta" if p == at_work else "cpu") for p in ("high", "low")]


# -------------------------------------------------------------------------------------------------------- LoRAs


@pytest.fixture
def tuned():
    """A DiT, a tuned copy of it, and a function that compares another with the tuned one."""
    torch.manual_seed(3)
    base = random_values(WanDiT(DIT5))
    dit = WanDiT(DIT5)
    dit.load_state_dict(base.state_dict())
    for p in add_lora(dit, 4, alpha=2):
        p.data += 0.1 * torch.randn_like(p)
    x, t, context = torch.randn(1, 6, 2, 4, 4), torch.tensor([300.0]), torch.randn(1, 12, 40)
    assert (dit(x, t, context) - base(x, t, context)).abs().max() > 1e-2

    def fresh():
        copy = WanDiT(DIT5)
        copy.load_state_dict(base.state_dict())
        return copy

    return fresh, dit, lambda other: float((other(x, t, context) - dit(x, t, context)).abs().max())


def spelled(layers, style):
    """A LoRA's tensors as other programs name and scale them."""
    native = {"self_attn": "attn1", "cross_attn": "attn2", "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    out = {}
    for name, layer in layers.items():
        down, up, alpha = layer.lora_A.detach(), layer.lora_B.detach(), torch.tensor(layer.scale * len(layer.lora_A))
        part = name.split(".")  # blocks.0.self_attn.q
        theirs = (
            ".".join(native.get(p, p) for p in part).replace("ffn.0", "ffn.net.0.proj").replace("ffn.2", "ffn.net.2")
        )
        if style == "PEFT":
            out |= {f"base_model.model.{theirs}.lora_A.default.weight": down,
                    f"base_model.model.{theirs}.lora_B.default.weight": up * layer.scale}  # fmt: skip
        elif style == "Diffusers":
            out |= {
                f"transformer.{theirs}.lora_A.weight": down,
                f"transformer.{theirs}.lora_B.weight": up * layer.scale,
            }
        elif style == "Lightning":
            out |= {f"diffusion_model.{name}.lora_down.weight": down, f"diffusion_model.{name}.lora_up.weight": up,
                    f"diffusion_model.{name}.alpha": alpha}  # fmt: skip
        elif style == "kohya":
            name = "lora_unet_" + name.replace(".", "_")
            out |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
        else:
            out |= {f"{name}.diff": layer.scale * up @ down, f"{name}.diff_b": torch.zeros(len(up))}
    return out


@pytest.mark.parametrize("style", ["PEFT", "Diffusers", "Lightning", "kohya", "diff"])
def test_loras_of_every_spelling_merge_to_the_same_model(style, tuned, tmp_path):
    fresh, dit, distance = tuned
    stray = {
        "diffusion_model.blocks.0.cross_attn.k_img.diff": torch.zeros(48, 48),
        "diffusion_model.img_emb.x": torch.zeros(2),
    }
    state = {k: v.contiguous() for k, v in spelled(lora_layers(dit), style).items()}
    save_file(state | stray, tmp_path / "lora.safetensors")
    merging = fresh()
    merged, unmatched = merge_lora(merging, tmp_path / "lora.safetensors")
    assert merged == 20 and unmatched == ["blocks.0.cross_attn.k_img", "img_emb.x"]
    assert distance(merging) < 1e-4


def test_a_whole_difference_reaches_norms_and_biases(tmp_path):
    dit = random_values(WanDiT(DIT5))
    old = {k: v.clone() for k, v in dit.state_dict().items()}
    state = {f"diffusion_model.blocks.1.norm3.{kind}": torch.ones(48) for kind in ("diff", "diff_b")}
    state["diffusion_model.patch_embedding.diff"] = torch.ones(48, 6, 1, 2, 2)
    save_file(state, tmp_path / "a.safetensors")
    assert merge_lora(dit, tmp_path / "a.safetensors", strength=0.5) == (2, [])
    changed = {k for k, v in dit.state_dict().items() if not torch.equal(v, old[k])}
    assert changed == {"blocks.1.norm3.weight", "blocks.1.norm3.bias", "patch_embedding.weight"}
    assert torch.allclose(dit.blocks[1].norm3.bias, old["blocks.1.norm3.bias"] + 0.5)


def test_differences_of_modulations_are_merged(tmp_path):
    dit = random_values(WanDiT(DIT5))
    old = {k: v.clone() for k, v in dit.state_dict().items()}
    state = {"diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 48), "head.modulation.diff": torch.ones(1, 2, 48)}
    save_file(state, tmp_path / "a.safetensors")
    assert merge_lora(dit, tmp_path / "a.safetensors") == (2, [])
    changed = {k: v for k, v in dit.state_dict().items() if not torch.equal(v, old[k])}
    assert changed.keys() == {"blocks.0.modulation", "head.modulation"}
    assert all(torch.allclose(v, old[k] + 1) for k, v in changed.items())


@pytest.mark.parametrize("place", ["PEFT", "Diffusers"])
def test_an_alpha_outside_the_tensors_counts(place, tuned, tmp_path):
    fresh, dit, distance = tuned  # its scale is alpha / rank = 2 / 4
    state, metadata, file = {}, {}, tmp_path / "lora.safetensors"
    for name, layer in lora_layers(dit).items():
        state |= {f"{name}.lora_A.weight": layer.lora_A.detach(), f"{name}.lora_B.weight": layer.lora_B.detach()}
    config = dict(r=4, lora_alpha=2)
    if place == "PEFT":
        file = tmp_path / "adapter_model.safetensors"
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    else:
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    save_file({f"transformer.{k}": v for k, v in state.items()}, file, metadata)
    merging = fresh()
    assert merge_lora(merging, file).layers == 20 and distance(merging) < 1e-4
    if place == "PEFT":
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
        with pytest.raises(UserError, match="use_rslora cannot be merged"):
            merge_lora(fresh(), file)


def test_half_a_pair_and_a_foreign_size_change_nothing(tuned, tmp_path):
    fresh, dit, _ = tuned
    save_lora(dit, tmp_path / "lora.safetensors")
    whole = load_file(tmp_path / "lora.safetensors")
    name = "diffusion_model.blocks.1.ffn.2.lora_B.weight"
    for state, words in (
        ({k: v for k, v in whole.items() if k != name}, "half of its update"),
        (whole | {name: torch.zeros(50, 4)}, "a LoRA of another model"),
        (
            whole | {"diffusion_model.blocks.1.ffn.2.dora_scale": torch.ones(48)},
            "dora_scale is an update of a kind",
        ),
        (
            whole | {name.replace("weight", "bias"): torch.ones(48)},
            "lora_B.bias is an update of a kind",
        ),
    ):
        save_file(state, tmp_path / "bad.safetensors")
        merging = fresh()
        before = {k: v.clone() for k, v in merging.state_dict().items()}
        with pytest.raises(UserError, match=words):
            merge_lora(merging, tmp_path / "bad.safetensors")
        assert all(torch.equal(v, before[k]) for k, v in merging.state_dict().items())


def test_diffusers_loads_what_we_save(tuned, world, tmp_path):
    """Through diffusers' own reader of ComfyUI-style names, and PEFT."""
    pytest.importorskip("peft")
    root, theirs = world
    wan = Wan("wan5b", root / "diffusers-wan5b", dtype=torch.float32)
    for p in add_lora(wan.dit, 4, alpha=2):
        p.data += 0.1 * torch.randn_like(p)
    save_lora(wan.dit, tmp_path / "lora.safetensors")
    state = diffusers.WanImageToVideoPipeline.lora_state_dict(str(tmp_path / "lora.safetensors"))
    reference = diffusers.WanTransformer3DModel.from_pretrained(root / "diffusers-wan5b/transformer")
    reference.load_lora_adapter(state, prefix="transformer")
    x, t, context = torch.randn(1, 6, 2, 4, 4), torch.tensor([[0.0, 300.0]]), torch.randn(1, 12, 40)
    with torch.no_grad():
        ours = wan.dit(x, t, context)
        expected = reference(x, t.repeat_interleave(4, 1), context, return_dict=False)[0]
        plain = theirs["wan5b"]["transformer"](x, t.repeat_interleave(4, 1), context, return_dict=False)[0]
    assert (ours - expected).abs().max() < 1e-4 and (ours - plain).abs().max() > 1e-2


@pytest.mark.parametrize("size", [6e-4, 5e-3])  # of the weights' norm: of recipe roll's updates, and of the paper's
def test_none_of_a_lora_is_lost_in_bf16_weights(size, tmp_path):
    """W + dW is summed in fp32 and rounded once, to one of its neighbours: nearest would lose two thirds of 6e-4."""
    cfg = dataclasses.replace(DIT5, dim=96, ffn_dim=512)
    torch.manual_seed(0)
    dit = WanDiT(cfg)
    add_lora(dit, 4, alpha=2, targets=("ffn.0", "ffn.2"))
    for layer in lora_layers(dit).values():
        torch.nn.init.normal_(layer.lora_B)
        layer.lora_B.data *= size * layer.weight.norm() / (layer.scale * layer.lora_B @ layer.lora_A).norm()
    save_lora(dit, tmp_path / "lora.safetensors")
    half = WanDiT(cfg)
    half.load_state_dict(dit.state_dict(), strict=False)
    half = half.bfloat16()
    base = {k: v.clone() for k, v in half.state_dict().items()}
    again = copy.deepcopy(half)
    assert all(merge_lora(m, tmp_path / "lora.safetensors") == (4, []) for m in (half, again))
    assert all(map(torch.equal, half.parameters(), again.parameters()))  # on every rank alike
    along = total = 0
    for name, layer in lora_layers(dit).items():
        update = layer.scale * (layer.lora_B @ layer.lora_A).detach()
        change = half.state_dict()[name + ".weight"].float() - base[name + ".weight"].float()
        off = (change - update).abs() / (base[name + ".weight"].float().abs() + update.abs())
        assert off.max() <= 2**-7  # a neighbour
        along, total = along + float((change * update).sum()), total + float(update.square().sum())
    # the standard error is 2.3 (0.5) times the update's norm over the square root of 196,608 weights
    assert abs(along / total - 1) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attached_lora_is_the_tuned_model_and_leaves_the_weights(dtype, tuned, tmp_path):
    fresh, dit, _ = tuned
    save_lora(dit, tmp_path / "lora.safetensors")
    for model_ in (dit, attached := fresh()):
        for key, value in model_.state_dict().items():
            if "lora" not in key and not weights.KEPT_FP32.search(key):
                model_.get_parameter(key).data = value.to(dtype)
    base = {k: v.clone() for k, v in attached.state_dict().items()}
    assert attach_lora(attached, tmp_path / "lora.safetensors") == (20, [])
    x, t, context = torch.randn(1, 6, 2, 4, 4), torch.tensor([300.0]), torch.randn(1, 12, 40)
    # fp32: alpha / rank is multiplied in another order
    tolerance = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=0, atol=0)
    assert torch.allclose(attached(x, t, context), dit(x, t, context), **tolerance)
    assert all(torch.equal(v, attached.state_dict()[k]) for k, v in base.items())
    assert not any(p.requires_grad for layer in lora_layers(attached).values() for p in (layer.lora_A, layer.lora_B))


def test_several_loras_add_up_with_their_strengths(tuned, tmp_path):
    fresh, dit, _ = tuned
    save_lora(dit, tmp_path / "a.safetensors")
    for layer in lora_layers(dit).values():
        layer.lora_A.data = torch.randn_like(layer.lora_A) / 7
    state = {k: v for k, v in spelled(lora_layers(dit), "diff").items() if "blocks.0" in k}
    state["blocks.1.modulation.diff"] = torch.ones(1, 6, 48)
    save_file(state, tmp_path / "b.safetensors")
    merged, attached = fresh(), fresh()
    for add, to in ((merge_lora, merged), (attach_lora, attached)):
        add(to, tmp_path / "a.safetensors", 0.5)
        add(to, tmp_path / "a.safetensors", -0.2)
        add(to, tmp_path / "b.safetensors", 0.7)  # whole differences have no rank: these are merged
    assert {len(layer.lora_A) for layer in lora_layers(attached).values()} == {8}
    x, t, context = torch.randn(1, 6, 2, 4, 4), torch.tensor([300.0]), torch.randn(1, 12, 40)
    assert torch.allclose(merged(x, t, context), attached(x, t, context), rtol=1e-5, atol=1e-5)
    assert (merged(x, t, context) - fresh()(x, t, context)).abs().max() > 1e-2


def test_a_lightning_lora_is_merged_by_the_official_formula(tmp_path):
    """Rank 64, alpha 8, fp32, a file an expert: W + alpha / rank up @ down, times the strength."""
    cfg = dataclasses.replace(DIT14, dim=96)
    base, state = random_values(WanDiT(cfg)), {}
    layers = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("blocks.")]
    for name in layers:
        out, inner = base.get_submodule(name).weight.shape
        state |= {f"diffusion_model.{name}.lora_down.weight": torch.randn(64, inner) / 10,
                  f"diffusion_model.{name}.lora_up.weight": torch.randn(out, 64) / 10,
                  f"diffusion_model.{name}.alpha": torch.tensor(8.0)}  # fmt: skip
    save_file(state, tmp_path / "low_noise_model.safetensors")
    merged = copy.deepcopy(base)
    assert merge_lora(merged, tmp_path / "low_noise_model.safetensors", 0.8) == (len(layers), []) and len(layers) == 20
    for name in layers:
        down, up = (state[f"diffusion_model.{name}.lora_{kind}.weight"] for kind in ("down", "up"))
        expected = base.get_submodule(name).weight + 0.8 * 8 / 64 * up @ down
        assert torch.allclose(merged.get_submodule(name).weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefix", [
    "lora_unet__", "lora_unet_", "lora_unet.", "pipe.dit.", "dit.", "module.", "diffusion_model.", "mixed",
])  # fmt: skip
def test_loras_under_every_prefix_are_read(prefix, tuned, tmp_path):
    fresh, dit, distance = tuned
    state = {}
    for key, value in spelled(lora_layers(dit), "Lightning").items():
        name, kind = re.fullmatch(r"diffusion_model\.(.+?)(\.lora_\w+\.weight|\.alpha)", key).groups()
        own = ("lora_unet_" if "blocks.0" in name else "dit.") if prefix == "mixed" else prefix
        name = name.replace(".", "_") if own.endswith("_") else name
        state[own + name + kind] = value.contiguous()
    save_file(state, tmp_path / "lora.safetensors")
    merging = fresh()
    assert merge_lora(merging, tmp_path / "lora.safetensors") == (20, []) and distance(merging) < 1e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_lora_with_a_value_that_is_not_finite_is_refused_by_name(bad, tuned, tmp_path):
    fresh, dit, _ = tuned
    dit.blocks[1].ffn[2].lora_B.data[3, 1] = bad
    save_lora(dit, tmp_path / "lora.safetensors")
    for add in (merge_lora, attach_lora):
        merging = fresh()
        before = {k: v.clone() for k, v in merging.state_dict().items()}
        with pytest.raises(UserError, match="diffusion_model.blocks.1.ffn.2.lora_B.weight holds NaN or inf"):
            add(merging, tmp_path / "lora.safetensors")
        assert all(torch.equal(v, before[k]) for k, v in merging.state_dict().items())


def test_of_a_file_with_both_experts_each_takes_its_own(world, tmp_path):
    """As Diffusers keeps A14B's LoRA: transformer. is the high-noise one, each with its alpha in the header."""
    keys = ("lora_A.weight", "lora_B.weight")
    sizes = ((2, 72), (72, 2))
    state = {f"{part}.blocks.0.attn1.to_q.{key}": torch.full(size, value) for part, value in
             (("transformer", 0.1), ("transformer_2", 0.3)) for key, size in zip(keys, sizes)}  # fmt: skip
    alphas = {"transformer.lora_alpha": 4, "transformer.r": 2, "transformer_2.lora_alpha": 8, "transformer_2.r": 2}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(state, file, {"lora_adapter_metadata": json.dumps(alphas)})
    loras = parse_loras(str(file), CONFIGS["wan14b"])
    assert [(lora.part, lora.strength) for lora in loras] == [("high", 1.0), ("low", 1.0)]
    root = world[0] / "native-wan14b"
    plain = Wan("wan14b", root, dtype=torch.float32)
    for how in ("loras", "base_loras"):
        wan = Wan("wan14b", root, dtype=torch.float32, **{how: loras})
        for part, value, alpha in (("high", 0.1, 4), ("low", 0.3, 8)):
            layer, base = (w.dit.expert(part).blocks[0].self_attn.q for w in (wan, plain))
            x = torch.randn(3, 72)
            change = 2 * value * value * alpha / 2 * x.sum(1, keepdim=True)  # of constant B A, rank 2, times alpha/rank
            assert torch.allclose(layer(x) - base(x), change.expand(-1, 72), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="LoRA of A14B's two experts"):
        merge_lora(WanDiT(DIT5), file)


def test_loras_are_placed_by_name_with_strengths_and_any_path(tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = [f"{n}.safetensors" for n in ("epoch=3-step=100", "a,b", "odd:0.5", "high=1,low=2")]
    for name in (*odd, "x_high_noise.safetensors", "x_low_noise.safetensors", "style.safetensors"):
        save_lora(tuned[1], tmp_path / name)
    save_lora(tuned[1], tmp_path / "own.safetensors", {"expert": "low"})
    five, fourteen = CONFIGS["wan5b"], CONFIGS["wan14b"]

    def parse(text, preset=fourteen):
        return [tuple(lora) for lora in parse_loras(text, preset)]

    high, low = ("high", "x_high_noise.safetensors", 1.0), ("low", "x_low_noise.safetensors", 1.0)
    assert parse("") == [] and parse("x_high_noise.safetensors,x_low_noise.safetensors") == [high, low]
    assert parse("low=x_high_noise.safetensors:0.8,own.safetensors:-1") == [
        ("low", "x_high_noise.safetensors", 0.8), ("low", "own.safetensors", -1.0)]  # fmt: skip
    for name in odd:
        assert parse(f"{name},style.safetensors:.25", five) == [("dit", name, 1.0), ("dit", "style.safetensors", 0.25)]
        assert parse(f"high={name}:2,low={name}") == [("high", name, 2.0), ("low", name, 1.0)]
    assert isinstance(parse_loras("style.safetensors", five)[0], Lora)
    for text, preset, words in (
        ("style.safetensors", fourteen, r"style.safetensors: its name does not tell .*; give high=style.safetensors"),
        ("high=style.safetensors", five, "only wan14b has experts"),
        ("style.safetensors,none.safetensors:0.5", five, "--lora none.safetensors:0.5: no such file"),
        ("mid=style.safetensors", fourteen, "--lora mid=style.safetensors: no such file"),
    ):
        with pytest.raises(UserError, match=words):
            parse_loras(text, preset)


@pytest.mark.parametrize("part", ["high", "low"])
def test_diffusers_loads_what_we_save_of_each_expert(part, world, tmp_path):
    pytest.importorskip("peft")
    folder = "transformer" if part == "high" else "transformer_2"
    wan = Wan("wan14b", world[0] / "diffusers-wan14b", dtype=torch.float32)
    dit = wan.dit.expert(part)
    for p in add_lora(dit, 4, alpha=2):
        p.data += 0.1 * torch.randn_like(p)
    save_lora(dit, tmp_path / "lora.safetensors", {"expert": part})
    reference = diffusers.WanTransformer3DModel.from_pretrained(world[0] / "diffusers-wan14b" / folder)
    state = diffusers.WanImageToVideoPipeline.lora_state_dict(str(tmp_path / "lora.safetensors"))
    reference.load_lora_adapter(state, prefix="transformer")
    x, t, context = torch.randn(1, 14, 2, 4, 4), torch.tensor([300.0]), torch.randn(1, 12, 40)
    with torch.no_grad():
        ours, expected = dit(x[:, :5], t, context, x[:, 5:]), reference(x, t, context, return_dict=False)[0]
    assert (ours - expected).abs().max() < 1e-4  # fp32


def test_unipc_and_euler_agree_in_the_limit(world):
    """Two solvers of one ODE: with many steps their clips meet (a wrong coefficient would keep them apart)."""
    root, _ = world
    wan = Wan("wan5b", root / "native-wan5b", dtype=torch.float32)
    first, y = condition(wan, PICTURE, 5)
    context, noise = wan.encode_text(["a man"]), torch.randn(1, 6, 2, 4, 4)
    fine = unipc(wan.dit, noise, first, context, 60, 5.0, y)
    few = unipc(wan.dit, noise, first, context, 15, 5.0, y)
    euler = rollout(wan.dit, noise, first, context, sigmas(240, 5.0), y=y)[0]
    span = (fine - noise).abs().mean()
    assert (fine - euler).abs().mean() < 0.02 * span
    assert (few - fine).abs().mean() < 0.05 * span
