"""The networks against diffusers and transformers on random weights, and what they promise about caches and LoRA."""

import dataclasses
import re

import pytest
import torch

from model import (
    CONFIGS,
    UMT5,
    DiTConfig,
    UMT5Config,
    UserError,
    VAEConfig,
    WanDiT,
    WanVAE,
    add_lora,
    load_weights,
    lora_disabled,
    merge_lora,
    save_lora,
    write_safetensors,
)  # fmt: skip

SMALL = DiTConfig(
    dim=96,
    ffn_dim=160,
    num_heads=3,
    num_layers=2,
    in_dim=12,
    out_dim=12,
    freq_dim=32,
    text_dim=40,
    text_len=16,
)


def randomise(module, scale=0.3):
    """Random values everywhere, also where training starts at zero."""
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data = p.data + scale / p.shape[-1] ** 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module


DIT_NAMES = [
    (r"\.self_attn\.", ".attn1."), (r"\.cross_attn\.", ".attn2."), (r"(attn\d)\.(q|k|v)\.", r"\1.to_\2."),
    (r"(attn\d)\.o\.", r"\1.to_out.0."), (r"\.norm3\.", ".norm2."), (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."), (r"modulation", "scale_shift_table"), (r"^head\.head\.", "proj_out."),
    (r"^head\.", ""), (r"^(text|time)_embedding\.0", r"condition_embedder.\1_embedder.linear_1"),
    (r"^(text|time)_embedding\.2", r"condition_embedder.\1_embedder.linear_2"),
    (r"^time_projection\.1", "condition_embedder.time_proj"),
]  # fmt: skip


def renamed(state, rules):
    out = {}
    for key, value in state.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        out[key] = value
    return out


def reference_dit(cfg):
    WanTransformer3DModel = pytest.importorskip("diffusers").WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=cfg.patch_size, num_attention_heads=cfg.num_heads, attention_head_dim=cfg.dim // cfg.num_heads,
        in_channels=cfg.in_dim, out_channels=cfg.out_dim, text_dim=cfg.text_dim, freq_dim=cfg.freq_dim,
        ffn_dim=cfg.ffn_dim, num_layers=cfg.num_layers, cross_attn_norm=True, eps=cfg.eps, rope_max_seq_len=64,
    )  # fmt: skip


@pytest.mark.parametrize("size", [(3, 4, 6), (1, 10, 2), (5, 2, 8)])
def test_dit_equals_diffusers_with_per_frame_timesteps_and_input_gradients(size):
    ours = randomise(WanDiT(SMALL))
    theirs = reference_dit(SMALL)
    theirs.load_state_dict(renamed(ours.state_dict(), DIT_NAMES))
    x = torch.randn(2, 12, *size, requires_grad=True)
    x_ref = x.detach().clone().requires_grad_()
    context = torch.randn(2, 16, 40)
    t = torch.tensor([[0.0] + [875.0] * (size[0] - 1), [0.0] + [417.3] * (size[0] - 1)])
    v = ours(x, t, context)
    per_token = t.repeat_interleave(size[1] * size[2] // 4, 1)
    v_ref = theirs(x_ref, per_token, context, return_dict=False)[0]
    assert (v - v_ref).abs().max() < 1e-4  # fp32; the reference rotates q and k in fp64
    probe = torch.randn_like(v)
    (v * probe).sum().backward()
    (v_ref * probe).sum().backward()
    assert (x.grad - x_ref.grad).abs().max() < 1e-4


def test_dit_pads_the_context_with_zeros_and_takes_one_timestep_a_sample():
    dit = randomise(WanDiT(SMALL)).double()
    x, context = torch.randn(2, 12, 2, 4, 4).double(), torch.randn(2, 5, 40).double()
    padded = torch.cat([context, torch.zeros(2, 11, 40).double()], 1)
    a = dit(x, torch.tensor([300.0, 20.0]), context)
    b = dit(x, torch.tensor([[300.0, 300.0], [20.0, 20.0]]), padded)
    assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_dit_names_a_wrong_size():
    with pytest.raises(ValueError, match="12, F', h, w"):
        WanDiT(SMALL)(torch.zeros(1, 12, 2, 5, 4), torch.zeros(1), torch.zeros(1, 4, 40))
    with pytest.raises(ValueError, match="context"):
        WanDiT(SMALL)(torch.zeros(1, 12, 2, 4, 4), torch.zeros(1), torch.zeros(1, 17, 40))


VAE_SMALL = VAEConfig(dim=8, dec_dim=12, z_dim=6, num_res_blocks=1)
BLOCK = [
    (r"residual\.0\.", "norm1."), (r"residual\.2\.", "conv1."), (r"residual\.3\.", "norm2."),
    (r"residual\.6\.", "conv2."), (r"\.shortcut\.", ".conv_shortcut."),
]  # fmt: skip


def reference_vae(ours, cfg):
    """diffusers' autoencoder with our weights; its modules are listed in the same order as ours."""
    AutoencoderKLWan = pytest.importorskip("diffusers").AutoencoderKLWan

    theirs = AutoencoderKLWan(
        base_dim=cfg.dim, decoder_base_dim=cfg.dec_dim, z_dim=cfg.z_dim, dim_mult=list(cfg.dim_mult),
        num_res_blocks=cfg.num_res_blocks, temperal_downsample=list(cfg.temporal_downsample), is_residual=True,
        in_channels=3 * cfg.patch_size**2, out_channels=3 * cfg.patch_size**2, patch_size=cfg.patch_size,
        latents_mean=[0.0] * cfg.z_dim, latents_std=[1.0] * cfg.z_dim,
    )  # fmt: skip
    last = cfg.num_res_blocks
    rules = [
        (r"^conv1\.", "quant_conv."), (r"^conv2\.", "post_quant_conv."), (r"coder\.conv1\.", "coder.conv_in."),
        (r"coder\.head\.0\.", "coder.norm_out."), (r"coder\.head\.2\.", "coder.conv_out."),
        (r"\.middle\.0\.", ".mid_block.resnets.0."), (r"\.middle\.2\.", ".mid_block.resnets.1."),
        (r"\.middle\.1\.", ".mid_block.attentions.0."),
        (rf"\.downsamples\.(\d+)\.downsamples\.{last}\.", r".down_blocks.\1.downsampler."),
        (r"\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
        (rf"\.upsamples\.(\d+)\.upsamples\.{last + 1}\.", r".up_blocks.\1.upsampler."),
        (r"\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r".up_blocks.\1.resnets.\2."), *BLOCK,
    ]  # fmt: skip
    theirs.load_state_dict(renamed(ours.state_dict(), rules))
    return theirs


@pytest.mark.parametrize("frames, size", [(1, (32, 48)), (5, (16, 32)), (13, (48, 16))])
def test_vae_equals_diffusers_in_values_and_input_gradients(frames, size):
    ours = randomise(WanVAE(VAE_SMALL), 0.1)
    theirs = reference_vae(ours, VAE_SMALL)
    video = torch.rand(1, 3, frames, *size) * 2 - 1
    latent = ours.encode(video)
    assert latent.shape == (1, 6, (frames - 1) // 4 + 1, size[0] // 16, size[1] // 16)
    assert (latent - theirs.encode(video).latent_dist.mode()).abs().max() < 1e-4  # fp32
    a, b = (torch.randn_like(latent).mul_(0).add_(latent.detach()).requires_grad_() for _ in range(2))
    out, ref = ours.decode(a), theirs.decode(b).sample
    inside = ref.detach().abs() < 0.999  # the reference clamps its output to [-1, 1], ours does not
    assert inside.float().mean() > 0.5
    assert ((out - ref) * inside).abs().max() < 1e-4
    probe = torch.randn_like(out) * inside
    (out * probe).sum().backward()
    (ref * probe).sum().backward()
    assert (a.grad - b.grad).abs().max() < 1e-3 * b.grad.abs().max()


@pytest.mark.parametrize("cuts", [(1, 1, 1, 1), (2, 2), (1, 3), (3, 1)])
def test_vae_decodes_the_same_in_any_chunks(cuts):
    vae = randomise(WanVAE(VAE_SMALL), 0.1).double()
    latent = torch.randn(2, 6, 4, 2, 3).double()
    caches, parts = None, []
    for chunk in latent.split(cuts, 2):
        part, caches = vae.decode_chunk(chunk, caches)
        parts.append(part)
    assert torch.allclose(torch.cat(parts, 2), vae.decode(latent), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frames", [1, 2])
def test_decoding_in_recomputed_chunks_has_the_same_values_and_gradient(frames):
    vae = randomise(WanVAE(VAE_SMALL), 0.1).double().requires_grad_(False)
    a, b = (torch.randn(1, 6, 4, 2, 3, generator=torch.Generator().manual_seed(0)).double() for _ in range(2))
    whole, parts = vae.decode(a.requires_grad_()), vae.decode(b.requires_grad_(), frames)
    assert torch.allclose(whole, parts, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(whole)
    (whole * probe).sum().backward()
    (parts * probe).sum().backward()
    assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_checkpointed_blocks_have_the_same_gradient():
    dit = randomise(WanDiT(SMALL)).double()
    x, t, context = torch.randn(1, 12, 2, 4, 4).double(), torch.tensor([300.0]), torch.randn(1, 5, 40).double()
    grads = []
    for dit.checkpointing in (False, True):
        dit.zero_grad()
        dit(x, t, context).square().sum().backward()
        grads.append([p.grad.clone() for p in dit.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*grads))


def test_vae_is_causal_and_holds_no_state():
    vae = randomise(WanVAE(VAE_SMALL), 0.1).double()
    before = {k: id(v) for k, v in vars(vae.decoder).items()}
    latent = torch.randn(1, 6, 3, 2, 2).double()
    changed = latent.clone()
    changed[:, :, 2] += 1
    a, b = vae.decode(latent), vae.decode(changed)
    assert torch.equal(a[:, :, :5], b[:, :, :5]) and not torch.equal(a[:, :, 5:], b[:, :, 5:])
    assert {k: id(v) for k, v in vars(vae.decoder).items()} == before


def test_vae_scale_normalises_and_is_undone():
    scaled = dataclasses.replace(VAE_SMALL, mean=(0.5,) * 6, std=(2.0,) * 6)
    plain, vae = randomise(WanVAE(VAE_SMALL)), WanVAE(scaled)
    vae.load_state_dict(plain.state_dict())
    video = torch.rand(1, 3, 5, 16, 16)
    assert torch.allclose(vae.encode(video) * 2 + 0.5, plain.encode(video), atol=1e-5)
    latent = torch.randn(1, 6, 2, 1, 1)
    assert torch.allclose(vae.decode(latent), plain.decode(latent * 2 + 0.5), atol=1e-5)


def test_vae_names_a_wrong_frame_count():
    with pytest.raises(ValueError, match="4n\\+1"):
        WanVAE(VAE_SMALL).encode(torch.zeros(1, 3, 4, 16, 16))


def test_umt5_equals_transformers():
    transformers = pytest.importorskip("transformers")
    cfg = UMT5Config(dim=48, dim_attn=32, dim_ffn=80, num_heads=4, num_layers=3, vocab_size=100)
    theirs = transformers.UMT5EncoderModel(transformers.UMT5Config(
        vocab_size=100, d_model=48, d_kv=8, d_ff=80, num_heads=4, num_layers=3, feed_forward_proj="gated-gelu",
        dropout_rate=0.0, relative_attention_num_buckets=32, relative_attention_max_distance=128,
    )).eval()  # fmt: skip
    ours = randomise(UMT5(cfg), 1.0)
    rules = [
        (r"^token_embedding", "shared"), (r"^blocks\.(\d+)\.norm1", r"encoder.block.\1.layer.0.layer_norm"),
        (r"^blocks\.(\d+)\.norm2", r"encoder.block.\1.layer.1.layer_norm"),
        (r"^blocks\.(\d+)\.pos_embedding\.embedding", r"blocks.\1.attn.relative_attention_bias"),
        (r"^blocks\.(\d+)\.attn", r"encoder.block.\1.layer.0.SelfAttention"),
        (r"^blocks\.(\d+)\.ffn\.gate\.0", r"encoder.block.\1.layer.1.DenseReluDense.wi_0"),
        (r"^blocks\.(\d+)\.ffn\.fc1", r"encoder.block.\1.layer.1.DenseReluDense.wi_1"),
        (r"^blocks\.(\d+)\.ffn\.fc2", r"encoder.block.\1.layer.1.DenseReluDense.wo"),
        (r"^norm\.", "encoder.final_layer_norm."),
    ]  # fmt: skip
    state = renamed(ours.state_dict(), rules)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    theirs.load_state_dict(state)
    ids = torch.randint(0, 100, (2, 150))
    mask = (torch.arange(150) < torch.tensor([[150], [37]])).long()
    reference = theirs(ids, mask).last_hidden_state * mask[..., None]
    assert (ours(ids, mask) - reference).abs().max() < 1e-4  # fp32


def test_lora_starts_at_the_reference_is_switched_off_saved_and_merged(tmp_path):
    dit, plain = (randomise(WanDiT(SMALL)).double() for _ in range(2))
    plain.load_state_dict(dit.state_dict())
    x, t, context = (
        torch.randn(1, 12, 2, 4, 4).double(),
        torch.tensor([500.0]),
        torch.randn(1, 6, 40).double(),
    )
    base = dit(x, t, context)
    names = set(dit.state_dict())
    parameters = add_lora(dit, 4, alpha=8)
    assert len(parameters) == 2 * 2 * 10 and all(p.requires_grad for p in parameters)
    assert sum(p.requires_grad for p in dit.parameters()) == len(parameters)
    assert names <= set(dit.state_dict())
    assert torch.equal(dit(x, t, context), base)
    for p in parameters:
        p.data = p.data + 0.1 * torch.randn_like(p)
    tuned = dit(x, t, context)
    assert (tuned - base).abs().max() > 1e-3
    with lora_disabled(dit):
        assert torch.equal(dit(x, t, context), base)
    save_lora(dit, tmp_path / "lora.safetensors")
    assert merge_lora(plain, tmp_path / "lora.safetensors") == (20, [])
    assert (plain(x, t, context) - tuned).abs().max() < 1e-6  # the file is fp32


def test_a_lora_of_another_model_is_refused(tmp_path):
    dit = WanDiT(SMALL)
    add_lora(dit, 2)
    save_lora(dit, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="ffn|attn"):
        merge_lora(WanDiT(dataclasses.replace(SMALL, dim=48)), tmp_path / "lora.safetensors")
    write_safetensors({"something.else": torch.zeros(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="nothing to merge"):
        merge_lora(WanDiT(SMALL), tmp_path / "odd.safetensors")


def test_loading_names_missing_unexpected_and_misshaped_keys(tmp_path):
    state = WanDiT(SMALL).state_dict()
    del state["head.modulation"]
    state["extra"] = torch.zeros(1)
    state["head.head.bias"] = torch.zeros(7)
    write_safetensors(state, tmp_path / "dit.safetensors")
    with pytest.raises(UserError) as error:
        load_weights(WanDiT(SMALL), tmp_path / "dit.safetensors")
    for words in ("1 missing (head.modulation)", "1 unexpected (extra)", "head.head.bias [7], wanted [48]"):
        assert words in str(error.value)
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "dit.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="torn.safetensors"):
        load_weights(WanDiT(SMALL), tmp_path / "torn.safetensors")


def test_the_released_sizes():
    """Parameter counts of the released checkpoints (facts of Wan 2.2): 5.0 B and 14.3 B an expert."""
    with torch.device("meta"):
        count = {n: sum(p.numel() for p in WanDiT(CONFIGS[n].dit).parameters()) / 1e9 for n in ("wan5b", "wan14b")}
        vae = sum(p.numel() for p in WanVAE(CONFIGS["wan5b"].vae).parameters()) / 1e6
    assert count["wan5b"] == pytest.approx(5.0, abs=0.01) and count["wan14b"] == pytest.approx(14.29, abs=0.01)
    assert vae == pytest.approx(704.7, abs=0.1)  # 2.8 GB in fp32
