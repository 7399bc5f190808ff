"""The networks of Wan 2.2 image-to-video, by hand: DiT, causal VAE, UMT5 encoder, LoRA, presets, checkpoints.

What is unusual in them:
- DiT: one timestep per latent frame (the given first frame sits at t = 0 among noisy ones), so modulations
  are [B, F', 6, dim] and broadcast over a frame's tokens; q/k RMS-norm over the whole width; affine norm
  before cross-attention; 3-D rotary embedding; modulation, norms and the residual stream in fp32.
- VAE: causal in time; the first frame is coded alone, then four frames to a latent frame. A module keeps no
  state: what a causal convolution must remember of the last chunk goes in and out as a list of tensors, so any
  chunking of a clip gives the same values and checkpointing is safe.
- UMT5: a relative position bias in every layer, no scaling of q.

Attribute names are the released checkpoints' native ones, so `state_dict()` is the native layout. The behaviour
is that of github.com/Wan-Video/Wan2.2 (wan/modules); `tiny` differs from `wan5b` in numbers only.
"""

import contextlib
import functools
import html
import json
import math
import pickle
import re
import typing
import weakref
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

ASSETS = Path(__file__).parent / "assets"


class UserError(Exception):
    """A mistake that the person at the terminal can mend; the programs print its one line and exit with 2."""


# ---------------------------------------------------------------------------------------------------------------
# Configurations. Field names are those of the released config.json.


@dataclass(frozen=True)
class DiTConfig:
    dim: int = 3072
    ffn_dim: int = 14336
    num_heads: int = 24
    num_layers: int = 30
    in_dim: int = 48
    out_dim: int = 48
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    dim: int = 160
    dec_dim: int = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: int = 2  # of pixels; 1: Wan 2.1's VAE, which has neither patches nor averaging shortcuts
    mean: tuple[float, ...] = field(default=(), repr=False)  # per latent channel; empty: 0
    std: tuple[float, ...] = field(default=(), repr=False)  # per latent channel; empty: 1

    @property
    def stride(self):
        """Pixels to a latent cell: (time, height, width)."""
        side = self.patch_size * 2 ** len(self.temporal_downsample)
        return 2 ** sum(self.temporal_downsample), side, side


@dataclass(frozen=True)
class UMT5Config:
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    vocab_size: int = 256384


@dataclass(frozen=True)
class Preset:
    """A model's three networks and how it is sampled by default."""

    dit: DiTConfig
    vae: VAEConfig
    text: UMT5Config
    fps: int
    frames: int  # 4n + 1
    size: tuple[int, int]  # height, width
    shift: float  # of the noise schedule
    steps: int
    cfg: float  # classifier-free guidance; 1 = off
    boundary: float | None = None  # sigma at which the low-noise expert takes over (A14B)
    folder: Path | None = None  # where its weights are, if they ship with the repo


# fmt: off
WAN22_MEAN = (
    -.2289, -.0052, -.1323, -.2339, -.2799,  .0174,  .1838,  .1557, -.1382,  .0542,  .2813,  .0891,
     .1570, -.0098,  .0375, -.1825, -.2246, -.1207, -.0698,  .5109,  .2665, -.2108, -.2158,  .2502,
    -.2055, -.0322,  .1109,  .1567, -.0729,  .0899, -.2799, -.1230, -.0313, -.1649,  .0117,  .0723,
    -.2839, -.2083, -.0520,  .3748,  .0152,  .1957,  .1433, -.2944,  .3573, -.0548, -.1681, -.0667)
WAN22_STD = (
     .4765, 1.0364,  .4514, 1.1677,  .5313,  .4990,  .4818,  .5013,  .8158, 1.0344,  .5894, 1.0901,
     .6885,  .6165,  .8454,  .4978,  .5759,  .3523,  .7135,  .6804,  .5833, 1.4146,  .8986,  .5659,
     .7069,  .5338,  .4889,  .4917,  .4069,  .4999,  .6866,  .4093,  .5709,  .6065,  .6415,  .4944,
     .5726, 1.2042,  .5458, 1.6887,  .3971, 1.0600,  .3943,  .5537,  .5444,  .4089,  .7468,  .7744)
WAN21_MEAN = (
    -.7571, -.7089, -.9113,  .1075, -.1745,  .9653, -.1517, 1.5508,
     .4134, -.0715,  .5517, -.3632, -.1922, -.9497,  .2503, -.2921)
WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on

CONFIGS = {
    "tiny": Preset(
        dit=DiTConfig(dim=384, ffn_dim=1024, num_heads=6, num_layers=6, freq_dim=128, text_dim=128, text_len=48),
        vae=VAEConfig(dim=24, dec_dim=32, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True)),
        text=UMT5Config(dim=128, dim_attn=128, dim_ffn=256, num_heads=4, num_layers=2, vocab_size=512),
        fps=16, frames=17, size=(128, 128), steps=8, cfg=1.0, folder=ASSETS,
        shift=20.0,  # Wan's is 5; at 20 the last four of eight steps begin at sigma 0.95
    ),
    "wan5b": Preset(
        dit=DiTConfig(), vae=VAEConfig(mean=WAN22_MEAN, std=WAN22_STD), text=UMT5Config(),
        fps=24, frames=121, size=(704, 1280), shift=5.0, steps=50, cfg=5.0,
    ),
    "wan14b": Preset(
        dit=DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=36, out_dim=16),
        vae=VAEConfig(dim=96, dec_dim=96, z_dim=16, temporal_downsample=(False, True, True), patch_size=1,
                      mean=WAN21_MEAN, std=WAN21_STD),
        text=UMT5Config(),
        fps=16, frames=81, size=(480, 832), shift=5.0, steps=40, cfg=3.5, boundary=0.9,
    ),
}  # fmt: skip


def full_precision(x):
    """fp32 from half types; fp32 and fp64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# ---------------------------------------------------------------------------------------------------------------
# UMT5 encoder


class T5LayerNorm(nn.Module):
    """RMS-norm, computed in fp32."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * scale).type_as(self.weight)


class T5RelativeEmbedding(nn.Module):
    """The bias that a layer adds to its attention logits, by the distance of two tokens."""

    def __init__(self, num_buckets, num_heads, max_distance=128):
        super().__init__()
        self.embedding = nn.Embedding(num_buckets, num_heads)
        self.num_buckets, self.max_distance = num_buckets, max_distance

    def forward(self, length):
        position = torch.arange(length, device=self.embedding.weight.device)
        offset = position[None] - position[:, None]
        half = self.num_buckets // 2  # one half for tokens before, one for tokens after
        exact = half // 2  # near distances have a bucket each, far ones share them logarithmically
        distance = offset.abs()
        far = (distance.clamp(min=1) / exact).log() / math.log(self.max_distance / exact) * (half - exact)
        bucket = torch.where(distance < exact, distance, (exact + far.long()).clamp(max=half - 1))
        bucket = bucket + (offset > 0) * half
        return self.embedding(bucket).permute(2, 0, 1)[None]  # [1, heads, L, L]


class T5Attention(nn.Module):
    def __init__(self, dim, dim_attn, num_heads):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, dim_attn, bias=False) for _ in range(3))
        self.o = nn.Linear(dim_attn, dim, bias=False)
        self.num_heads = num_heads

    def forward(self, x, bias):
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.type_as(q), scale=1.0)
        return self.o(x.transpose(1, 2).flatten(2))


class T5FeedForward(nn.Module):
    def __init__(self, dim, dim_ffn):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, dim_ffn, bias=False), nn.GELU("tanh"))
        self.fc1 = nn.Linear(dim, dim_ffn, bias=False)
        self.fc2 = nn.Linear(dim_ffn, dim, bias=False)

    def forward(self, x):
        return self.fc2(self.fc1(x) * self.gate(x))


class T5Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1 = T5LayerNorm(cfg.dim)
        self.attn = T5Attention(cfg.dim, cfg.dim_attn, cfg.num_heads)
        self.norm2 = T5LayerNorm(cfg.dim)
        self.ffn = T5FeedForward(cfg.dim, cfg.dim_ffn)
        self.pos_embedding = T5RelativeEmbedding(cfg.num_buckets, cfg.num_heads)

    def forward(self, x, mask):
        x = x + self.attn(self.norm1(x), self.pos_embedding(x.shape[1]) + mask)
        return x + self.ffn(self.norm2(x))


class UMT5(nn.Module):
    """Text encoder: `ids` [B, L] and `mask` [B, L] (1 = token, 0 = padding) to a context [B, L, dim], padding zero.

    Initial weights follow T5 (unit-variance logits without a scale on q). Source: wan/modules/t5.py.
    """

    def __init__(self, cfg):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(T5Block(cfg) for _ in range(cfg.num_layers))
        self.norm = T5LayerNorm(cfg.dim)
        for block in self.blocks:
            nn.init.normal_(block.attn.q.weight, std=(cfg.dim * cfg.dim_attn) ** -0.5)
            for layer in (block.attn.k, block.attn.v, block.ffn.gate[0], block.ffn.fc1):
                nn.init.normal_(layer.weight, std=cfg.dim**-0.5)
            nn.init.normal_(block.attn.o.weight, std=cfg.dim_attn**-0.5)
            nn.init.normal_(block.ffn.fc2.weight, std=cfg.dim_ffn**-0.5)
            nn.init.normal_(block.pos_embedding.embedding.weight, std=(2 * cfg.num_buckets * cfg.num_heads) ** -0.5)

    def forward(self, ids, mask):
        x = self.token_embedding(ids)
        blocked = (mask[:, None, None] == 0).type_as(x) * torch.finfo(x.dtype).min  # [B, 1, 1, L]
        for block in self.blocks:
            x = block(x, blocked)
        return self.norm(x) * mask[..., None].type_as(x)


def tokenize(prompts, tokenizer, text_len):
    """Prompts (a list of strings) to `ids` and `mask`, both [B, text_len].

    Cleaned as the reference does (HTML entities, white space, typographic quotes; text of a broken encoding, which
    the reference's ftfy also repairs, is not). Raises UserError where a prompt is longer than `text_len` tokens:
    cutting it silently would drop what it says last.
    """
    ids, mask = torch.zeros(2, len(prompts), text_len, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        clean = html.unescape(html.unescape(prompt))
        clean = re.sub("[\u201c-\u201f]", '"', re.sub("[\u02bc\u2018-\u201b]", "'", clean))
        clean = re.sub(r"\s+", " ", clean).strip()
        tokens = tokenizer.encode(clean).ids
        if len(tokens) > text_len:
            raise UserError(f"prompt is {len(tokens)} tokens, the model reads {text_len}; shorten: {clean[:60]!r}...")
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


# ---------------------------------------------------------------------------------------------------------------
# VAE: causal 3-D convolutions. `Carry` holds what each causal layer remembers between two chunks of a clip.


class Carry:
    """Walks the list of caches through a network: layers take theirs in order and leave the next chunk's.

    `old` is None at the clip's first chunk. The network returns `new`, a plain list of tensors. `see`, if given, is
    shown the attention's keys and values [B T, H W, C] and their (H, W), and says which to use.
    """

    def __init__(self, old, see=None):
        self.first, self.old, self.new, self.see = old is None, iter(old or ()), [], see

    def step(self, x, length):
        """The last `length` frames before x (None at the start); keeps those before the next chunk."""
        past = None if self.first else next(self.old)
        seen = x if past is None or x.shape[2] >= length else torch.cat([past, x], 2)
        tail = seen[:, :, -length:]
        self.new.append(F.pad(tail, (0, 0, 0, 0, length - tail.shape[2], 0)))
        return past


def without_onednn(x):
    """Does torch on a CPU give the clip x [B, C, T, H, W] to its own fp32 kernel, where oneDNN is ten times as fast?"""
    small = x.dim() == 5 and len(x) == 1 and x[..., 0].numel() <= 20480  # its rule: use_mkldnn in Convolution.cpp
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return small and plain and torch.backends.mkldnn.is_available()


def convolve_small(x, weight, bias, padding):
    """conv3d of a clip that torch would keep from oneDNN: a tiny clip decodes 2.5 times as fast."""
    return torch.mkldnn_convolution(x.contiguous(), weight.contiguous(), bias, padding, (1, 1, 1), (1, 1, 1), 1)


def convolve(x, weight, bias, padding):
    if without_onednn(x):
        return convolve_small(x, weight, bias, padding)
    return (F.conv2d if x.dim() == 4 else F.conv3d)(x, weight, bias, padding=padding)


class FrozenConv(torch.autograd.Function):
    """`convolve` with constant weights, which the gradient needs; autograd would keep the input as well."""

    @staticmethod
    def forward(ctx, x, weight, bias, padding):
        ctx.save_for_backward(weight)
        ctx.size, ctx.dtype, ctx.padding, ctx.small = x.shape, x.dtype, padding, without_onednn(x)
        return convolve(x, weight, bias, padding)

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.saved_tensors[0].type_as(grad)
        if ctx.small:  # a convolution's transpose is one with the mirrored kernel
            padding = [k - 1 - p for k, p in zip(weight.shape[2:], ctx.padding)]
            grad = convolve_small(grad, weight.transpose(0, 1).flip(2, 3, 4), None, padding)
        else:
            backward = nn.grad.conv2d_input if grad.dim() == 4 else nn.grad.conv3d_input
            grad = backward(ctx.size, weight, grad, padding=ctx.padding)
        return grad.to(ctx.dtype), None, None, None


def conv(x, weight, bias, padding):
    """A stride-1 convolution of frames [B, C, H, W] or clips [B, C, T, H, W]."""
    return (FrozenConv.apply if x.requires_grad and not weight.requires_grad else convolve)(x, weight, bias, padding)


class CausalConv3d(nn.Conv3d):
    """3-D convolution that sees no future: x [B, C, T, H, W], `past` its last kernel-1 frames or None (zeros)."""

    def forward(self, x, past=None):
        kernel_t = self.kernel_size[0]
        pad = (self.kernel_size[2] // 2,) * 2 + (self.kernel_size[1] // 2,) * 2
        if x.shape[2] == 1 and past is None:  # before the first frame all is zero: only the last tap counts (3x)
            return conv(x[:, :, 0], self.weight[:, :, -1], self.bias, pad[::2][::-1])[:, :, None]
        if past is not None:
            x = torch.cat([past.type_as(x), x], 2)
        elif kernel_t > 1:
            x = F.pad(x, (0, 0, 0, 0, kernel_t - 1, 0))
        return conv(x, self.weight, self.bias, (0, *pad[::2][::-1]))


class RMS_norm(nn.Module):
    def __init__(self, dim, images=True):
        super().__init__()
        self.scale, self.gamma = dim**0.5, nn.Parameter(torch.ones(dim, 1, 1, *([] if images else [1])))

    def forward(self, x):
        scale = full_precision(x).square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt()  # 3x F.normalize's speed
        return x * scale.type_as(x) * (self.scale * self.gamma).type_as(x)


class NormSiLU(torch.autograd.Function):
    """RMS_norm with constant weights, then SiLU: keeps x only, where autograd keeps two more tensors of its size."""

    @staticmethod
    def forward(ctx, x, weight):
        scale = full_precision(x).square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt()
        ctx.save_for_backward(x, scale, weight)
        return F.silu(x * scale.type_as(x) * weight)

    @staticmethod
    def backward(ctx, grad):
        x, scale, weight = ctx.saved_tensors
        grad = torch.ops.aten.silu_backward(grad, x * scale.type_as(x) * weight) * weight
        along = (full_precision(grad) * x).sum(1, keepdim=True) * scale**3
        return grad * scale.type_as(x) - x * along.type_as(x), None


class ResidualBlock(nn.Module):
    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.residual = nn.Sequential(
            RMS_norm(in_dim, images=False), nn.SiLU(), CausalConv3d(in_dim, out_dim, 3),
            RMS_norm(out_dim, images=False), nn.SiLU(), nn.Dropout(0.0), CausalConv3d(out_dim, out_dim, 3),
        )  # fmt: skip
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x, carry):
        return self.shortcut(x) + causal(self.residual, x, carry)


def causal(layers, x, carry):
    """Run norms, each with the SiLU after it, and convolutions, which take their past from `carry`."""
    for layer in layers:
        if isinstance(layer, CausalConv3d):
            x = layer(x, carry.step(x, 2))
        elif isinstance(layer, RMS_norm) and x.requires_grad and not layer.gamma.requires_grad:
            x = NormSiLU.apply(x, (layer.scale * layer.gamma).type_as(x))
        elif isinstance(layer, RMS_norm):
            x = F.silu(layer(x))
    return x


class AttentionBlock(nn.Module):
    """Single-head self-attention within each frame."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.to_qkv, self.proj = RMS_norm(dim), nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x, carry):
        B, C, T, H, W = x.shape
        y = self.to_qkv(self.norm(x.transpose(1, 2).flatten(0, 1)))  # [B T, 3 C, H, W]
        q, k, v = y.flatten(2).transpose(1, 2).chunk(3, -1)
        if carry.see is not None:
            k, v = carry.see(k, v, (H, W))
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]  # [B T, H W, C]
        y = self.proj(y.transpose(1, 2).reshape(B * T, C, H, W))
        return x + y.unflatten(0, (B, T)).transpose(1, 2)


class Resample(nn.Module):
    """Halve or double height and width, and time too in the `3d` modes (never the clip's first frame)."""

    def __init__(self, dim, out_dim, mode):
        super().__init__()
        self.mode = mode
        if mode.startswith("up"):
            self.resample = nn.Sequential(
                nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, out_dim, 3, padding=1)
            )
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, out_dim, 3, stride=2))
        if mode == "upsample3d":
            self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1))
        elif mode == "downsample3d":
            self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x, carry):
        if self.mode == "upsample3d":
            first, rest = (x[:, :, :1], x[:, :, 1:]) if carry.first else (x[:, :, :0], x)
            past = carry.step(rest, 2)  # the first frame is left out: to the time convolution it is zero
            if rest.shape[2]:
                rest = self.time_conv(rest, past).unflatten(1, (2, -1))  # [B, 2, C, T, H, W]
                rest = rest.movedim(1, 3).flatten(2, 3)  # a frame's two halves become neighbours in time
            x = torch.cat([first, rest], 2)
        B, T = x.shape[0], x.shape[2]
        x = x.transpose(1, 2).flatten(0, 1)
        if self.mode.startswith("up"):
            layer = self.resample[1]
            x = conv(self.resample[0](x), layer.weight, layer.bias, layer.padding)
        else:
            x = self.resample(x)
        x = x.unflatten(0, (B, T)).transpose(1, 2)
        if self.mode == "downsample3d":
            past = carry.step(x, 1)
            first = x[:, :, :1] if past is None else x[:, :, :0]
            rest = x if past is None else torch.cat([past, x], 2)
            if rest.shape[2] > 1:
                layer = self.time_conv
                first = torch.cat([first, F.conv3d(rest, layer.weight, layer.bias, layer.stride)], 2)
            x = first
        return x


def average_down(x, out_dim, ft, fs):
    """Space-time to channels, then the mean of neighbouring ones; [B, C, T, H, W] to [B, out, T/ft, H/fs, W/fs]."""
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % ft, 0))
    B, C, T, H, W = x.shape
    x = x.view(B, C, T // ft, ft, H // fs, fs, W // fs, fs).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(B, out_dim, -1, T // ft, H // fs, W // fs).mean(2)


def duplicate_up(x, out_dim, ft, fs, first):
    """Repeat channels, then channels to space-time; the clip's first frame is not doubled in time."""
    x = x.repeat_interleave(out_dim * ft * fs * fs // x.shape[1], 1)
    x = x.unflatten(1, (out_dim, ft, fs, fs)).permute(0, 1, 5, 2, 6, 3, 7, 4)  # [B, out, T, ft, H, fs, W, fs]
    x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return x[:, :, ft - 1 :] if first else x


class Down_ResidualBlock(nn.Module):
    def __init__(self, in_dim, out_dim, num_res_blocks, down, down_time):
        super().__init__()
        self.factors = out_dim, 1 + down_time, 1 + down
        blocks = [ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(num_res_blocks)]
        if down:
            blocks.append(Resample(out_dim, out_dim, "downsample3d" if down_time else "downsample2d"))
        self.downsamples = nn.Sequential(*blocks)

    def forward(self, x, carry):
        shortcut = average_down(x, *self.factors)
        for block in self.downsamples:
            x = block(x, carry)
        return x + shortcut


class Up_ResidualBlock(nn.Module):
    def __init__(self, in_dim, out_dim, num_res_blocks, up, up_time, halve=False):
        super().__init__()
        self.factors = (out_dim, 1 + up_time, 2) if up else None
        blocks = [ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(num_res_blocks + 1)]
        if up:
            mode = "upsample3d" if up_time else "upsample2d"
            blocks.append(Resample(out_dim, out_dim // 2 if halve else out_dim, mode))
        self.upsamples = nn.Sequential(*blocks)

    def forward(self, x, carry):
        shortcut = duplicate_up(x, *self.factors, carry.first) if self.factors else 0
        for block in self.upsamples:
            x = block(x, carry)
        return x + shortcut


class Encoder3d(nn.Module):
    """Patchified pixels [B, 3 p², F, H/p, W/p] and caches to (mean, log-variance) [B, 2 z, F', h, w] and caches."""

    def __init__(self, cfg):
        super().__init__()
        dims = [cfg.dim * m for m in (1, *cfg.dim_mult)]
        down = len(cfg.temporal_downsample)
        self.conv1 = CausalConv3d(3 * cfg.patch_size**2, dims[0], 3)
        stages = [
            Down_ResidualBlock(a, b, cfg.num_res_blocks, i < down, i < down and cfg.temporal_downsample[i])
            for i, (a, b) in enumerate(pairwise(dims))
        ]
        if cfg.patch_size == 1:  # Wan 2.1: the same blocks in one row
            stages = [block for stage in stages for block in stage.downsamples]
        self.downsamples = nn.Sequential(*stages)
        self.middle = nn.Sequential(
            ResidualBlock(dims[-1], dims[-1]), AttentionBlock(dims[-1]), ResidualBlock(dims[-1], dims[-1])
        )
        self.head = nn.Sequential(RMS_norm(dims[-1], images=False), nn.SiLU(), CausalConv3d(dims[-1], 2 * cfg.z_dim, 3))

    def forward(self, x, caches=None):
        carry = Carry(caches)
        x = causal([self.conv1], x, carry)
        for block in (*self.downsamples, *self.middle):
            x = block(x, carry)
        return causal(self.head, x, carry), carry.new


class Decoder3d(nn.Module):
    """Latents [B, z, F', h, w] and caches to patchified pixels [B, 3 p², F, H/p, W/p] and caches."""

    def __init__(self, cfg):
        super().__init__()
        dims = [cfg.dec_dim * m for m in (cfg.dim_mult[-1], *cfg.dim_mult[::-1])]
        up_time = cfg.temporal_downsample[::-1]
        self.conv1 = CausalConv3d(cfg.z_dim, dims[0], 3)
        self.middle = nn.Sequential(
            ResidualBlock(dims[0], dims[0]), AttentionBlock(dims[0]), ResidualBlock(dims[0], dims[0])
        )
        wan21, up = cfg.patch_size == 1, len(up_time)
        stages = [
            Up_ResidualBlock(a // 2 if wan21 and i else a, b, cfg.num_res_blocks, i < up, i < up and up_time[i], wan21)
            for i, (a, b) in enumerate(pairwise(dims))
        ]
        if wan21:
            stages = [block for stage in stages for block in stage.upsamples]
        self.upsamples = nn.Sequential(*stages)
        self.head = nn.Sequential(
            RMS_norm(dims[-1], images=False), nn.SiLU(), CausalConv3d(dims[-1], 3 * cfg.patch_size**2, 3)
        )

    def forward(self, x, caches=None, see=None):
        carry = Carry(caches, see)
        x = causal([self.conv1], x, carry)
        for block in (*self.middle, *self.upsamples):
            x = block(x, carry)
        return causal(self.head, x, carry), carry.new


class WanVAE(nn.Module):
    """Wan's causal video autoencoder, 2.2's or (patch_size 1) 2.1's. Source: wan/modules/vae2_2.py, vae2_1.py.

    `encode`: video [B, 3, F, H, W] in [-1, 1], F = 4n+1, to the latent's mean [B, z, 1+n, H/s, W/s], normalised
    by the config's `mean` and `std`. `decode` inverts it; values are not clamped, so that gradients pass.
    Raises ValueError where F is not 4n+1 or H, W are no multiples of the stride.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder3d(cfg)
        self.conv1 = CausalConv3d(2 * cfg.z_dim, 2 * cfg.z_dim, 1)
        self.conv2 = CausalConv3d(cfg.z_dim, cfg.z_dim, 1)
        self.decoder = Decoder3d(cfg)
        self.set_scale(cfg.mean or [0.0] * cfg.z_dim, cfg.std or [1.0] * cfg.z_dim)

    def set_scale(self, mean, std):
        """The latents' mean and deviation per channel; constants, not in the state_dict (as released)."""
        for name, value in (("mean", mean), ("std", std)):
            value = torch.as_tensor(value, dtype=torch.float32).view(-1, 1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def moments(self, video, frames=None):
        """Mean and log-variance of the unnormalised latent, both [B, z, F', h, w].

        `frames`: how many are in work at a time after the first, a multiple of the stride (None: all of them).
        """
        ft, fh, fw = self.cfg.stride
        B, C, T, H, W = video.shape
        if C != 3 or (T - 1) % ft or H % fh or W % fw:
            raise ValueError(f"video must be [B, 3, {ft}n+1, {fh}a, {fw}b], got {tuple(video.shape)}")
        p = self.cfg.patch_size
        x = video.view(B, 3, T, H // p, p, W // p, p).permute(0, 1, 6, 4, 2, 3, 5)
        x = x.reshape(B, 3 * p * p, T, H // p, W // p).type_as(self.conv1.weight)
        caches, latents = None, []
        for chunk in [x] if frames is None or T == 1 else [x[:, :, :1], *x[:, :, 1:].split(frames, 2)]:
            latent, caches = self.encoder(chunk, caches)
            latents.append(latent)
        return self.conv1(torch.cat(latents, 2)).chunk(2, 1)

    def encode(self, video):
        return (full_precision(self.moments(video, self.cfg.stride[0])[0]) - self.mean) / self.std

    def decode_chunk(self, latent, caches=None, see=None):
        """Decode latent frames [B, z, n, h, w] that follow those in `caches`; returns pixels and the new caches."""
        x, caches = self.decoder(self.conv2((latent * self.std + self.mean).type_as(self.conv2.weight)), caches, see)
        p = self.cfg.patch_size
        x = x.unflatten(1, (3, p, p)).permute(0, 1, 4, 5, 3, 6, 2)  # [B, 3, F, H/p, p, W/p, p]
        return x.flatten(5, 6).flatten(3, 4), caches

    def decode_frames(self, latent, caches=None, see=None):
        """`decode_chunk` of one latent frame after the other, with `see` of each: a frame's activations are in work."""
        video = []
        for part, look in zip(latent.split(1, 2), see or [None] * latent.shape[2], strict=True):
            pixels, caches = self.decode_chunk(part, caches, look)
            video.append(pixels)
        return torch.cat(video, 2), caches

    def decode(self, latent, frames=None, margin=None):
        """Pixels [B, 3, F, H, W] of a latent [B, z, F', h, w].

        One latent frame after the other: on a CPU, at 256x256, 0.7 of the time of all in one pass. With `frames`, one
        frame's graph at a time, from caches kept every so many latent frames (None: all graphs at once); `margin`:
        latent cells around the faces that the gradient is kept in (None: all). With either, the weights are constants:
        see the two classes below.
        """
        if margin is not None:
            return WindowedDecode.apply(latent, self, frames, margin)
        return self.decode_frames(latent)[0] if frames is None else StreamedDecode.apply(latent, self, frames)


class StreamedDecode(torch.autograd.Function):
    """WanVAE.decode with one latent frame's graph alive at a time; exactly its gradient.

    Forward keeps the caches where groups of `frames` latent frames meet. Backward takes the groups from last to first:
    decodes one again for the caches between its frames, then each frame, last to first, with its graph: (gradient at
    its pixels, at the caches it leaves) to (gradient at its latent, at the caches it found). Of F' frames' caches, F' /
    frames + frames are in memory, each half of what a frame's graph is; sqrt(F') is best.
    """

    @staticmethod
    def forward(ctx, latent, vae, frames, see=None):
        ctx.vae, ctx.groups, caches, video = vae, [], None, []
        ctx.autocast = torch.get_autocast_dtype(latent.device.type), torch.is_autocast_enabled(latent.device.type)
        for start in range(0, latent.shape[2], frames):
            group = latent[:, :, start : start + frames], caches, see and see[start : start + frames]
            if ctx.needs_input_grad[0]:
                ctx.groups.append(group)
            pixels, caches = vae.decode_frames(*group)
            video.append(pixels)
        return torch.cat(video, 2)

    @staticmethod
    def backward(ctx, grad):
        found, carried = [], []
        with torch.autocast(grad.device.type, *ctx.autocast):
            while ctx.groups:
                latent, caches, see = ctx.groups.pop()
                frames = list(zip(latent.split(1, 2), see or [None] * latent.shape[2]))
                before = [caches]  # of each frame, from here on the group's own
                for x, look in frames[:-1]:
                    before.append(ctx.vae.decode_chunk(x, before[-1], look)[1])
                del caches
                for x, look in reversed(frames):
                    with torch.enable_grad():
                        inputs = [y.detach().requires_grad_() for y in (x, *(before.pop() or ()))]
                        pixels, left = ctx.vae.decode_chunk(inputs[0], inputs[1:] or None, look)
                    grad, here = grad.split([grad.shape[2] - pixels.shape[2], pixels.shape[2]], 2)
                    pairs = zip([pixels, *left], [here, *carried])
                    ends, into = zip(*[(y, g) for y, g in pairs if y.requires_grad])
                    x, *carried = torch.autograd.grad(ends, inputs, into, materialize_grads=True)
                    found.insert(0, x)
                    del inputs, pixels, left, pairs, ends
        return torch.cat(found, 2), None, None, None


class WindowedDecode(torch.autograd.Function):
    """WanVAE.decode whose gradient passes through the latent window under the pixels' non-zero gradient only.

    A face reward's gradient at the pixels is zero outside the faces' crops. The window is one box around all of them,
    in every frame and clip, `margin` cells larger on each side, decoded again as a clip of its own. Only the decoder's
    attention looks further than a margin: its keys and values outside the window are those of the first pass.
    """

    @staticmethod
    def forward(ctx, latent, vae, frames, margin):
        ctx.save_for_backward(latent)
        ctx.vae, ctx.frames, ctx.margin, ctx.seen = vae, frames, margin, []
        ctx.autocast = torch.get_autocast_dtype(latent.device.type), torch.is_autocast_enabled(latent.device.type)

        def keep(k, v, size):
            ctx.seen.append((k.clone(), v.clone()))  # views would keep the queries too
            return k, v

        return vae.decode_frames(latent, see=[keep] * latent.shape[2])[0]

    @staticmethod
    def backward(ctx, grad):
        (latent,) = ctx.saved_tensors
        found = torch.zeros_like(latent)
        window = latent_window(grad, ctx.vae.cfg.stride, ctx.margin)
        if window is None:
            return found, None, None, None
        (t, y, x), (fh, fw) = window, ctx.vae.cfg.stride[1:]
        see = [functools.partial(paste, pair, latent.shape[3:], (y, x), min(ctx.margin, 3)) for pair in ctx.seen[t]]
        with torch.enable_grad(), torch.autocast(grad.device.type, *ctx.autocast):
            part = latent[:, :, t, y, x].detach().requires_grad_()
            if ctx.frames:
                video = StreamedDecode.apply(part, ctx.vae, ctx.frames, see)
            else:
                video = ctx.vae.decode_frames(part, see=see)[0]
        grad = grad[:, :, : video.shape[2], y.start * fh : y.stop * fh, x.start * fw : x.stop * fw]
        found[:, :, t, y, x] = torch.autograd.grad(video, part, grad)[0]
        return found, None, None, None


def paste(seen, frame, window, halo, k, v, size):
    """A window's keys and values [B, cells, C] (and its size) set into those `seen` of the whole frame.

    Not its outermost `halo` cells: the three convolutions before the attention saw the window's border there, not the
    frame. At the frame's own border there are none.
    """
    inner = [slice(halo * (s.start > 0), n - halo * (s.stop < whole)) for s, n, whole in zip(window, size, frame)]
    rows, columns = (slice(s.start + i.start, s.start + i.stop) for s, i in zip(window, inner))
    out = []
    for whole, part in zip(seen, (k, v)):
        whole = whole.unflatten(1, frame).clone()
        whole[:, rows, columns] = part.unflatten(1, size)[:, inner[0], inner[1]]
        out.append(whole.flatten(1, 2))
    return out


def latent_window(grad, stride, margin):
    """Slices (time, rows, columns) of the latent cells under a gradient at the pixels, [B, 3, F, H, W]; None if zero.

    Rows and columns are `margin` cells larger on each side; time starts at 0, the decoder being causal.
    """
    places = (grad != 0).any(1).any(0).nonzero()  # of [F, H, W]
    if not len(places):
        return None
    (_, last), *spans = torch.stack(places.aminmax(dim=0), 1).tolist()
    cells = [slice(max(0, a // s - margin), b // s + 1 + margin) for (a, b), s in zip(spans, stride[1:])]
    return slice(0, (last + stride[0] - 1) // stride[0] + 1), *cells


# ---------------------------------------------------------------------------------------------------------------
# DiT


class Linear32(nn.Linear):
    """A linear layer that computes in fp32 whatever the model's precision is, inside autocast too."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(full_precision(x), full_precision(self.weight), full_precision(self.bias))


class WanRMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(full_precision(x), self.weight.shape, full_precision(self.weight), self.eps)


class WanLayerNorm(nn.LayerNorm):
    def forward(self, x):
        y = full_precision(x)
        weight, bias = (None, None) if self.weight is None else (self.weight.type_as(y), self.bias.type_as(y))
        return F.layer_norm(y, self.normalized_shape, weight, bias, self.eps)


def rope_table(grid, head_dim, device):
    """The rotations (cos, sin) [F'·h·w, 1, head_dim/2, 2] by (time, height, width), in fp64."""
    c = head_dim // 2
    axes = []
    for i, (n, part) in enumerate(zip(grid, (c - 2 * (c // 3), c // 3, c // 3))):
        rate = 10000.0 ** -(torch.arange(part, dtype=torch.float64, device=device) / part)
        angle = torch.arange(n, dtype=torch.float64, device=device)[:, None] * rate
        shape = [1, 1, 1, part]
        shape[i] = n
        axes.append(angle.view(shape).expand(*grid, part))
    angle = torch.cat(axes, -1).flatten(0, 2)[:, None]
    return torch.stack([angle.cos(), angle.sin()], -1)


def rope_apply(x, table):
    """Rotate neighbouring pairs of x [B, L, heads, head_dim], which the norm before left in fp32 or fp64."""
    x = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # Inductor generates no code for complex numbers
        (a, b), (cos, sin) = x.unbind(-1), table.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(table)).flatten(-2)


class WanAttention(nn.Module):
    """Self-attention (rope given), or attention to the text, whose keys and values are given."""

    def __init__(self, dim, num_heads, eps):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = WanRMSNorm(dim, eps), WanRMSNorm(dim, eps)

    def keys(self, x, rope=None):
        """Keys and values of x, both [B, L, heads, head_dim]."""
        k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (self.norm_k(self.k(x)), self.v(x)))
        return (k if rope is None else rope_apply(k, rope)).to(v.dtype), v

    def forward(self, x, rope=None, text=None):
        k, v = text or self.keys(x, rope)
        q = self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))
        q = (q if rope is None else rope_apply(q, rope)).to(v.dtype)
        y = F.scaled_dot_product_attention(*(y.expand(len(x), -1, -1, -1).transpose(1, 2) for y in (q, k, v)))
        return self.o(y.transpose(1, 2).flatten(2))


class WanAttentionBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        dim = cfg.dim
        self.norm1 = WanLayerNorm(dim, cfg.eps, elementwise_affine=False)
        self.self_attn = WanAttention(dim, cfg.num_heads, cfg.eps)
        self.norm3 = WanLayerNorm(dim, cfg.eps)
        self.cross_attn = WanAttention(dim, cfg.num_heads, cfg.eps)
        self.norm2 = WanLayerNorm(dim, cfg.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, cfg.ffn_dim), nn.GELU("tanh"), nn.Linear(cfg.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x, e, rope, context, text=None):
        """x [B, L, dim] in fp32; e [B, F', 6, dim] in fp32; context [B, text_len, dim], or the block's `text` of it.

        Returns the next x, and `text`: the context's keys and values.
        """
        text = text or self.cross_attn.keys(context)
        dtype, frames = text[1].dtype, e.shape[1]
        e = (self.modulation + e)[:, :, :, None].unbind(2)  # six of [B, F', 1, dim]

        def per_frame(y):
            return y.unflatten(1, (frames, -1))  # [B, F', tokens of a frame, dim]

        y = torch.addcmul(e[0], per_frame(self.norm1(x)), 1 + e[1])
        y = self.self_attn(y.flatten(1, 2).to(dtype), rope=rope)
        x = torch.addcmul(per_frame(x), per_frame(y), e[2]).flatten(1, 2)
        x = x + self.cross_attn(self.norm3(x).to(dtype), text=text)
        y = torch.addcmul(e[3], per_frame(self.norm2(x)), 1 + e[4])
        y = self.feed_forward(y.flatten(1, 2).to(dtype))
        return torch.addcmul(per_frame(x), per_frame(y), e[5]).flatten(1, 2), text

    def feed_forward(self, x):
        """`ffn`; the graph keeps the wide layer once, before the GELU, which is applied again in the backward pass: a
        sixth less memory of a block, and a step takes as long (tests/bench_step.py)."""
        x = self.ffn[0](x)
        trained = any(p.requires_grad for p in self.ffn[2].parameters())  # a frozen layer's input is not kept anyway
        if not (trained and torch.is_grad_enabled()):
            return self.ffn[1:](x)
        return checkpoint(lambda x: self.ffn[2](self.ffn[1](x)), x, use_reentrant=False, preserve_rng_state=False)


class Head(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm = WanLayerNorm(cfg.dim, cfg.eps, elementwise_affine=False)
        self.head = Linear32(cfg.dim, math.prod(cfg.patch_size) * cfg.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim**0.5)

    def forward(self, x, e):
        """x [B, L, dim], e [B, F', dim], both fp32."""
        shift, scale = (self.modulation + e[:, :, None])[:, :, :, None].unbind(2)
        y = self.norm(x).unflatten(1, (e.shape[1], -1)) * (1 + scale) + shift
        return self.head(y.flatten(1, 2))


class CachedContext:
    """A context [B or 1, L, text_dim] for many calls without gradient while the weights stay.

    A transformer's blocks compute its keys and values in the first call and find them here in the others: at the tiny
    size 4 % of the sampler's time. A transformer that is let go takes its own along.
    """

    def __init__(self, context):
        self.context, self.texts = context, weakref.WeakKeyDictionary()


class WanDiT(nn.Module):
    """Wan 2.2's diffusion transformer: the velocity of a noisy latent. Source: wan/modules/model.py.

    x [B, C, F', h, w]; t [B] or [B, F'], 1000·sigma; context [B or 1, L ≤ text_len, text_dim], zero-padded here to
    text_len, or a CachedContext; y [B, C_y, F', h, w], joined to x on channels (A14B). Gives the velocity
    [B, out_dim, F', h, w] in fp32 (fp64 for an fp64 model). Raises ValueError where a size does not fit the config,
    and for a CachedContext where a gradient is wanted.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.checkpointing = False  # keep each block's input only, and compute the block again in the backward pass
        self.offload = False  # keep those inputs on the host
        dim = cfg.dim
        self.patch_embedding = nn.Conv3d(cfg.in_dim, dim, cfg.patch_size, stride=cfg.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(cfg.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear32(cfg.freq_dim, dim), nn.SiLU(), Linear32(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanAttentionBlock(cfg) for _ in range(cfg.num_layers))
        self.head = Head(cfg)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for layer in (
            self.text_embedding[0],
            self.text_embedding[2],
            self.time_embedding[0],
            self.time_embedding[2],
        ):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def embed_time(self, t, frames):
        """The time embedding [B, F', dim] and the six modulations [B, F', 6, dim] of t [B] or [B, F']."""
        t = t[:, None].expand(-1, frames) if t.dim() == 1 else t
        half = self.cfg.freq_dim // 2
        rate = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
        angle = t.double()[..., None] * rate
        weight = full_precision(self.time_embedding[0].weight)
        e = self.time_embedding(torch.cat([angle.cos(), angle.sin()], -1).type_as(weight))
        return e, self.time_projection(e).unflatten(-1, (6, -1))

    def forward(self, x, t, context, y=None):
        cfg, p = self.cfg, self.cfg.patch_size
        x = x if y is None else torch.cat([x, y], 1)
        texts = [None] * cfg.num_layers
        if isinstance(context, CachedContext):
            if torch.is_grad_enabled():
                raise ValueError("a CachedContext passes no gradient on: give the context itself")
            context, texts = context.context, context.texts.setdefault(self, texts)
        B, C, *size = x.shape
        if C != cfg.in_dim or any(n % k for n, k in zip(size, p)):
            raise ValueError(f"latent must be [B, {cfg.in_dim}, F', h, w] in multiples of {p}, got {tuple(x.shape)}")
        if context.shape[1] > cfg.text_len or context.shape[2] != cfg.text_dim:
            raise ValueError(f"context must be [B, at most {cfg.text_len}, {cfg.text_dim}], got {tuple(context.shape)}")
        grid = [n // k for n, k in zip(size, p)]
        e, modulation = self.embed_time(t, grid[0])
        dtype = self.patch_embedding.weight.dtype
        x = self.patch_embedding(x.to(dtype)).flatten(2).transpose(1, 2).type_as(modulation)  # [B, L, dim]
        if texts[0] is None:
            context = self.text_embedding(F.pad(context.to(dtype), (0, 0, 0, cfg.text_len - context.shape[1])))
        rope = rope_table(grid, cfg.dim // cfg.num_heads, x.device).to(x.dtype)
        for i, block in enumerate(self.blocks):
            if self.checkpointing and torch.is_grad_enabled():
                with torch.autograd.graph.save_on_cpu(pin_memory=True) if self.offload else contextlib.nullcontext():
                    # of the arguments only x, the block's own, is saved by way of the hook
                    x, _ = checkpoint(block, x, e=modulation, rope=rope, context=context, use_reentrant=False)
            else:
                x, texts[i] = block(x, modulation, rope, context, texts[i])
        x = self.head(x, e).view(B, *grid, *p, cfg.out_dim)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(B, cfg.out_dim, *size)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints: native folders, Diffusers folders and single ComfyUI files. Names, shapes and types are checked
# against the headers before any data moves; then one tensor at a time goes to where it belongs.

# (pattern, replacement), native to Diffusers or, for UMT5, transformers
DIT_NAMES = (
    (r"\.self_attn\.", ".attn1."), (r"\.cross_attn\.", ".attn2."), (r"(attn\d)\.(q|k|v)\.", r"\1.to_\2."),
    (r"(attn\d)\.o\.", r"\1.to_out.0."), (r"\.norm3\.", ".norm2."), (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."), (r"modulation$", "scale_shift_table"), (r"^head\.head\.", "proj_out."),
    (r"^head\.", ""), (r"^(text|time)_embedding\.0\.", r"condition_embedder.\1_embedder.linear_1."),
    (r"^(text|time)_embedding\.2\.", r"condition_embedder.\1_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
)  # fmt: skip
UMT5_NAMES = (
    (r"^token_embedding\.", "shared."), (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm([12])\.", lambda m: f"encoder.block.{m[1]}.layer.{int(m[2]) - 1}.layer_norm."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.", r"blocks.\1.attn.relative_attention_bias."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (r"^blocks\.(\d+)\.ffn\.", r"encoder.block.\1.layer.1.DenseReluDense."),
    (r"\.gate\.0\.", ".wi_0."), (r"\.fc1\.", ".wi_1."), (r"\.fc2\.", ".wo."),
)  # fmt: skip
VAE_NAMES = (
    (r"^conv1\.", "quant_conv."), (r"^conv2\.", "post_quant_conv."), (r"coder\.conv1\.", "coder.conv_in."),
    (r"coder\.head\.0\.", "coder.norm_out."), (r"coder\.head\.2\.", "coder.conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."), (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."), (r"residual\.0\.", "norm1."), (r"residual\.2\.", "conv1."),
    (r"residual\.3\.", "norm2."), (r"residual\.6\.", "conv2."), (r"\.shortcut\.", ".conv_shortcut."),
)  # fmt: skip
PREFIX = re.compile(r"^(?:(?:base_model|model|diffusion_model|transformer|transformer_2|unet)\.)+")
PRECISIONS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
PRECISIONS |= {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
PRECISIONS |= {torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8"}
KEPT_FP32 = re.compile(r"norm|modulation|time_|head\.")  # of a transformer in half precision
MAPPED = 2**30
SCALES = (".scale_weight", ".weight_scale")  # ComfyUI's fp8_scaled: weight = fp8 value times this, beside `.weight`
BESIDE = re.compile(  # what such files hold beside the weights; nothing of it is needed here
    r"(^|\.)(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale|comfy_quant)$"
    r"|^spiece_model$|^(encoder\.embed_tokens|shared)\.weight$"
)


def vae_names(cfg):
    """VAE_NAMES, and the stages: nested in Wan 2.2, one row of blocks in 2.1."""
    n = cfg.num_res_blocks

    def flat(match):
        stage, block = divmod(int(match[1]), n + 2)
        return f".up_blocks.{stage}." + (f"resnets.{block}." if block <= n else "upsamplers.0.")

    if cfg.patch_size == 1:
        return (*VAE_NAMES, (r"\.downsamples\.(\d+)\.", r".down_blocks.\1."), (r"\.upsamples\.(\d+)\.", flat))
    return (
        *VAE_NAMES, (rf"\.downsamples\.(\d+)\.downsamples\.{n}\.", r".down_blocks.\1.downsampler."),
        (r"\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
        (rf"\.upsamples\.(\d+)\.upsamples\.{n + 1}\.", r".up_blocks.\1.upsampler."),
        (r"\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
    )  # fmt: skip


def diffusers_names(module, names):
    """The Diffusers (of a UMT5: transformers) name of each of a network's native tensor names, as a dict."""
    if isinstance(module, WanDiT):
        rules = DIT_NAMES
    else:
        rules = UMT5_NAMES if isinstance(module, UMT5) else vae_names(module.cfg)
    out = {}
    for name in names:
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        out[name] = new
    return out


def write_safetensors(tensors, path, metadata=None):
    """Write a safetensors file whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, metadata)
    except Exception:
        part.unlink(missing_ok=True)
        raise
    part.replace(path)


def open_safetensors(path):
    """Open a safetensors file; a missing or broken one is a UserError that names it."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        return safe_open(path, "pt")
    except Exception as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); download or build it again") from None


def open_pickle(path):
    """The tensors of a .pth file by name, memory-mapped where the file allows it; no code in it is ever run."""
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file of before torch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{path}: holds more than tensors, which could run code, so it was not read ({reason})"
        ) from None
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: not a readable checkpoint ({reason}); download it again") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path}: not a dictionary of tensors")
    return state


def is_shard(path):
    return re.search(r"-\d+-of-\d+$", path.stem) is not None


def shard_files(path):
    """The files of a checkpoint: one file, or what the index in a folder names. UserError where one is missing."""
    path = Path(path)
    if path.is_file() and not path.name.endswith(".index.json"):
        return [path]
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    indices = [path] if path.is_file() else sorted(path.glob("*.index.json"))
    if len(indices) > 1:
        raise UserError(f"{path}: {len(indices)} indices in one folder; keep one: {', '.join(i.name for i in indices)}")
    if indices:
        try:
            names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{indices[0]}: not an index of shards ({error!r}); download it again") from None
        files = [indices[0].parent / name for name in names]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise UserError(f"{indices[0]}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing)}")
        return files
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pth"))
    if len(files) == 1 and not is_shard(files[0]):
        return files
    if files and all(map(is_shard, files)):
        raise UserError(f"{path}: {len(files)} shard(s) but no *.index.json beside them; download it too")
    names = ", ".join(f.name for f in files[:4])
    raise UserError(f"{path}: " + (f"several checkpoints ({names}); keep one" if files else "no *.safetensors in it"))


class Checkpoint:
    """A checkpoint's tensors by name: `shapes` and `precisions` from the headers; `read` moves the data."""

    def __init__(self, path):
        self.path, self.files = Path(path), shard_files(path)
        self.shapes, self.precisions, self.metadata, self.names = {}, {}, {}, {}
        for file in self.files:
            if file.suffix == ".safetensors":
                handle = open_safetensors(file)
                parts = {k: handle.get_slice(k) for k in handle.keys()}
                about = {k: (tuple(p.get_shape()), p.get_dtype()) for k, p in parts.items()}
                self.metadata |= handle.metadata() or {}
            else:
                about = {k: (tuple(v.shape), v.dtype) for k, v in open_pickle(file).items()}
            twice = next((k for k in about if k in self.shapes), None)
            if twice:
                raise UserError(f"{file}: {twice} is in another shard too; download the folder again")
            self.names[file] = list(about)
            self.shapes |= {k: shape for k, (shape, _) in about.items()}
            self.precisions |= {k: PRECISIONS.get(kind, str(kind)) for k, (_, kind) in about.items()}

    def scale(self, name):
        """The name of what an fp8 tensor is to be multiplied by, or None."""
        return next((k for s in SCALES if (k := name.removesuffix(".weight") + s) in self.shapes), None)

    def read(self, wanted, rows=None):
        """Yield (name, tensor) of the names in `wanted`, in the files' order; fp8 comes multiplied out, in fp32.

        rows: by name, a slice of a tensor's rows where not all are wanted: only their bytes are read.

        Files are memory-mapped, and a page once read counts as this process's until its file is let go. So a file is
        opened anew after every MAPPED bytes: peak memory is the model and 2 GB, also where one file holds all of it.
        """
        for file in self.files:
            get, seen = None, 0
            for name in self.names[file]:
                if name not in wanted:
                    continue
                if get is None or seen > MAPPED:
                    get = slice_of = f = tensor = None
                    if file.suffix == ".safetensors":
                        get, slice_of = (f := open_safetensors(file)).get_tensor, f.get_slice
                    else:
                        get = slice_of = open_pickle(file).__getitem__
                    seen = 0
                part = (rows or {}).get(name)
                whole = part is None or self.precisions[name] == "fp8"
                tensor = get(name) if whole else slice_of(name)[part]
                seen += tensor.nbytes
                if self.precisions[name] == "fp8":
                    tensor = tensor.float()
                    if self.scale(name):
                        ((_, scale),) = self.read({self.scale(name)})
                        tensor *= scale.float().view(-1, *[1] * (tensor.dim() - 1))  # of the tensor, or of each row
                    tensor = tensor if part is None else tensor[part]
                yield name, tensor


def describe(shapes, path=""):
    """What network the tensors of these names and shapes are, in words; `path` tells A14B's experts apart."""
    bare = {PREFIX.sub("", k): v for k, v in shapes.items()}
    if any(".lora_" in k for k in bare):
        return "a LoRA (it goes with --lora)"
    if "patch_embedding.weight" in bare:
        dim, channels = bare["patch_embedding.weight"][:2]
        layers = 1 + max((int(m[1]) for k in bare if (m := re.match(r"blocks\.(\d+)\.", k))), default=-1)
        for name, preset in CONFIGS.items():
            if (dim, channels, layers) == (preset.dit.dim, preset.dit.in_dim, preset.dit.num_layers):
                if preset.boundary is None:
                    return f"{name}'s transformer"
                place = Path(path).name.lower()
                if "high" in place or place == "transformer":
                    return "A14B's high-noise expert"
                low = re.search(r"(?<![a-z])low|low.?noise", place)  # not "slow", "flow"
                return "A14B's low-noise expert" if low or place == "transformer_2" else "one of A14B's experts"
        return f"a Wan transformer of width {dim} with {layers} layers and {channels} input channels"
    for key in ("token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight"):
        if key in bare:
            return f"a UMT5 encoder of width {bare[key][1]}"
    for key in ("decoder.conv1.weight", "decoder.conv_in.weight"):
        if key in bare:
            width, z = bare[key][:2]
            known = {(16, 384): "Wan 2.1's VAE", (48, 1024): "Wan 2.2's VAE"}
            return known.get((z, width), f"a Wan VAE of {z} latent channels and decoder width {width}")
    return "no network of Wan's"


def scale_fits(checkpoint, name):
    """False for an fp8 tensor whose scale is lost, or is one for blocks of it, which is not read here."""
    if checkpoint.precisions.get(name) != "fp8":
        return True
    scale = checkpoint.scale(name)
    if scale is None:  # a file of plain fp8 values has no scales at all
        return not any(k.endswith((*SCALES, "scaled_fp8")) for k in checkpoint.shapes)
    return math.prod(checkpoint.shapes[scale]) in (1, checkpoint.shapes[name][0])


def match(module, checkpoint, asked):
    """({native name: name in the checkpoint}, layout); UserError where names, shapes or types do not fit."""
    want = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    native, theirs = {k: k for k in want}, diffusers_names(module, want)
    if "shared.weight" not in checkpoint.shapes:
        theirs = {k: v.replace("shared.weight", "encoder.embed_tokens.weight") for k, v in theirs.items()}
    readings = [("native", native), ("Diffusers", theirs)]
    for prefix in ("model.diffusion_model.", "diffusion_model."):
        readings.append((f"ComfyUI ({prefix})", {k: prefix + k for k in want}))
    layout, names = max(readings, key=lambda r: sum(n in checkpoint.shapes for n in r[1].values()))
    shapes, used = checkpoint.shapes, set(names.values())
    faults = [
        ("missing", [n for n in names.values() if n not in shapes]),
        ("unexpected", [n for n in shapes if n not in used and not BESIDE.search(n)]),
        ("mis-shaped", [f"{n} {list(shapes[n])}, wanted {list(want[k])}"
                        for k, n in names.items() if shapes.get(n, want[k]) != want[k]]),
        ("of another type", [f"{n} {checkpoint.precisions[n]}" for n in names.values()
                             if n in shapes and checkpoint.precisions[n] not in PRECISIONS.values()]),
        ("without a scale that fits", [n for n in names.values() if not scale_fits(checkpoint, n)]),
    ]  # fmt: skip
    if any(found for _, found in faults):
        told = [f"{len(f)} {what} ({', '.join(f[:3])}{', ...' if len(f) > 3 else ''})" for what, f in faults if f]
        is_it, wanted = describe(shapes, checkpoint.path), asked or describe(want)
        this = f"this is {is_it}, {wanted} was asked for" if is_it != wanted else f"not quite {wanted}"
        raise UserError(f"{checkpoint.path}: {this}; read in the {layout} layout: {'; '.join(told)}")
    return names, layout


class Loaded(typing.NamedTuple):
    """What `load_weights` did."""

    layout: str
    files: list
    tensors: int
    precision: str
    metadata: dict


def own_rows(weight):
    """The rows that this rank holds of a weight that FSDP2 shards, as a slice; None of any other weight."""
    if not hasattr(weight, "device_mesh"):
        return None
    count, mesh = weight.shape[0], weight.device_mesh
    each = -(-count // mesh.size())
    start = min(count, each * mesh.get_local_rank())
    return slice(start, min(count, start + each))


def load_weights(module, path, device=None, dtype=None, asked=""):
    """Load a checkpoint of any layout into a network; returns `Loaded`.

    path: a .safetensors or .pth file, or a folder with one or with shards and their index. A network on the meta
    device gets its weights on `device` in `dtype` (default: the file's); another keeps its own device and types.
    A WanDiT in half precision keeps norms, modulations, time embedding and head in fp32, as the reference computes
    them. Of weights that FSDP2 shards, each rank reads its own rows only. Raises UserError, before any weight
    changes, with every missing, unexpected and mis-shaped key.
    """
    checkpoint = Checkpoint(path)
    names, layout = match(module, checkpoint, asked)
    native = {v: k for k, v in names.items()}
    rows = {v: own_rows(module.get_parameter(k)) for v, k in native.items()}
    wanted = {v for v in native if rows[v] is None or rows[v].start < rows[v].stop}
    for name, tensor in checkpoint.read(wanted, rows):
        parent, _, leaf = native[name].rpartition(".")
        parent = module.get_submodule(parent)
        old = getattr(parent, leaf)
        if old.is_meta:
            kind = dtype or tensor.dtype
            if isinstance(module, WanDiT) and KEPT_FP32.search(native[name]):
                kind = torch.promote_types(kind, torch.float32)
            value = torch.empty(tensor.shape, dtype=kind, device=device).copy_(tensor)  # never the file's own pages
            parent.register_parameter(leaf, nn.Parameter(value, old.requires_grad))
        else:
            (old.data if rows[name] is None else old.detach().to_local()).copy_(tensor)
    kinds = {checkpoint.precisions[n] for n in native}
    return Loaded(layout, checkpoint.files, len(names), "+".join(sorted(kinds)), checkpoint.metadata)


# ---------------------------------------------------------------------------------------------------------------
# LoRA: the tuned weights of a frozen network.

LORA_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")


class LoRALinear(nn.Linear):
    """A frozen linear layer plus a low-rank update: W x + (alpha/rank) B A x; B starts at zero.

    Source: arXiv 2106.09685. `weight` and `bias` keep their names, so a state_dict holds the native ones.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.enabled = alpha / rank, True
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        exact = x.dtype == self.weight.dtype == self.lora_A.dtype and not torch.is_autocast_enabled(x.device.type)
        if exact and not torch.is_grad_enabled():  # a fifth of the sampler's time less; bf16 would round B A away
            return F.linear(x, torch.addmm(self.weight, self.lora_B, self.lora_A, alpha=self.scale), self.bias)
        low = self.scale * F.linear(x, self.lora_A.type_as(x))
        # the wide product last: a checkpoint computes again only as far as the backward pass needs a tensor
        return F.linear(low, self.lora_B.type_as(x)).add_(F.linear(x, self.weight, self.bias))


def lora_layers(model):
    """The LoRA layers of a model by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def add_lora(model, rank, alpha=None, targets=LORA_TARGETS):
    """Freeze a model and put a LoRA on every linear layer of its blocks whose name ends in one of `targets`.

    `alpha` defaults to `rank` (scale 1). Returns the new parameters, fp32. Raises ValueError if nothing matches.
    """
    model.requires_grad_(False)
    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith("blocks.") and any(name.endswith("." + t) for t in targets)
    ]
    if not names:
        raise ValueError(f"no linear layer of {type(model).__name__}'s blocks is called {' or '.join(targets)}")
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = LoRALinear(model.get_submodule(name), rank, rank if alpha is None else alpha)
        setattr(model.get_submodule(parent), leaf, layer)
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


@contextlib.contextmanager
def lora_disabled(model):
    """Inside, the model is the untuned reference: v_ref costs no second copy of the weights."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def untuned(model):
    """The model with its LoRA off, as a function: the reference."""

    def forward(*inputs):
        with lora_disabled(model):
            return model(*inputs)

    return forward


def save_lora(model, path, metadata=None):
    """Write the LoRA as safetensors: `diffusion_model.<module>.lora_A.weight` [rank, in] and `.lora_B.weight`.

    The scale alpha/rank is multiplied into B, so readers that know no alpha, or assume alpha = rank, are right.
    """
    tensors = {}
    for name, layer in lora_layers(model).items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = layer.lora_A.detach().float().cpu().contiguous()
        tensors[f"diffusion_model.{name}.lora_B.weight"] = (layer.lora_B.detach().float() * layer.scale).cpu()
    write_safetensors(tensors, path, metadata)


class Merge(typing.NamedTuple):
    """What `merge_lora` did: layers changed, and the file's module names that the model has nothing for."""

    merged: int
    unmatched: list


LORA_KEY = re.compile(
    r"^(?P<module>.+?)\.(?:(?P<kind>lora_A|lora_B|lora_down|lora_up)(?:\.\w+)?\.weight"
    r"|(?P<other>alpha|diff|diff_b))$"
)
LORA_KINDS = {"lora_A": "down", "lora_B": "up", "lora_down": "down", "lora_up": "up"}


def lora_alpha(checkpoint):
    """The alpha that PEFT keeps in an adapter_config.json beside its file, and Diffusers in the header; else None."""
    beside, config = checkpoint.path.with_name("adapter_config.json"), {}
    if checkpoint.path.name.startswith("adapter_model") and beside.is_file():
        config = json.loads(beside.read_text())
    elif "lora_adapter_metadata" in checkpoint.metadata:
        config = json.loads(checkpoint.metadata["lora_adapter_metadata"])
        config = {k.removeprefix("transformer."): v for k, v in config.items()}
    odd = [k for k in ("alpha_pattern", "use_rslora", "use_dora") if config.get(k)]
    if odd:
        raise UserError(f"{checkpoint.path}: a LoRA with {', '.join(odd)} cannot be merged; merge it with PEFT first")
    return config.get("lora_alpha")


def merge_lora(model, path, strength=1.0):
    """Add a LoRA file's update to a WanDiT's weights, computed in fp32; returns `Merge`.

    Reads PEFT (`lora_A`/`lora_B`, also `.default`), `lora_down`/`lora_up`, both with `alpha` (absent: `lora_alpha`'s,
    or the rank), and `diff`/`diff_b`/`diff_m` (whole differences of weight, bias and modulation), under native,
    Diffusers or kohya module names with any usual prefix. Raises UserError, and changes nothing, if a shape does not
    fit, half of a pair is missing, a layer's update is of another kind (DoRA, LoKr), or nothing at all matches.
    """
    checkpoint = Checkpoint(path)
    alpha = lora_alpha(checkpoint)
    modules = {n: m for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)}
    weights = {n: m.weight for n, m in modules.items()}
    weights |= {n: p for n, p in model.named_parameters() if n.endswith("modulation")}
    spelled = {n.removesuffix(".weight"): k.removesuffix(".weight")
               for k, n in diffusers_names(model, [m + ".weight" for m in modules]).items()}  # fmt: skip
    spelled |= {n: n for n in weights} | {"lora_unet_" + n.replace(".", "_"): n for n in modules}
    groups, unmatched = {}, set()
    for key in checkpoint.shapes:
        bare = PREFIX.sub("", key)
        found = LORA_KEY.match(bare.replace(".diff_m", ".modulation.diff"))
        name = spelled.get(found["module"]) if found else None
        if name is not None:
            groups.setdefault(name, {})[LORA_KINDS.get(found["kind"], found["other"])] = key
        elif found or not any(bare.startswith(n + ".") for n in spelled):
            unmatched.add(found["module"] if found else bare)
        else:
            raise UserError(f"{path}: {key} is no kind of update that can be merged; without it the rest means little")
    if not groups:
        has, wants = next(iter(checkpoint.shapes), "no tensor"), next(iter(modules))
        raise UserError(f"{path}: nothing to merge, no name fits this model; the file has {has}, the model {wants}")
    for name, keys in groups.items():
        if ("down" in keys) != ("up" in keys) or not keys.keys() - {"alpha"}:
            raise UserError(f"{path}: {name} has only {', '.join(keys)}, half of its update; download the file again")
        sizes = {kind: checkpoint.shapes[key] for kind, key in keys.items()}
        out, *inner = weights[name].shape
        fits = sizes.get("diff", (out, *inner)) == (out, *inner) and sizes.get("diff_b", (out,)) == (out,)
        if "down" in sizes:
            fits = fits and sizes["up"][:2] == (out, sizes["down"][0]) and sizes["down"][1] == inner[0]
        if not fits or ("diff_b" in keys and getattr(modules.get(name), "bias", None) is None):
            raise UserError(
                f"{path}: {name} is {sizes}, the model's weight is {(out, *inner)}: a LoRA of another model"
            )
    tensors = dict(checkpoint.read({key for keys in groups.values() for key in keys.values()}))
    with torch.no_grad():
        for name, keys in groups.items():
            weight, get = weights[name], {kind: tensors[key].float() for kind, key in keys.items()}
            update = get["diff"].clone() if "diff" in get else torch.zeros(weight.shape)
            if "down" in get:
                rank = len(get["down"])
                scale = (float(get["alpha"]) if "alpha" in get else rank if alpha is None else alpha) / rank
                update += scale * (get["up"].flatten(1) @ get["down"].flatten(1)).view(weight.shape)
            weight.copy_(weight.float() + strength * update.to(weight.device))
            if "diff_b" in get:
                bias = modules[name].bias
                bias.copy_(bias.float() + strength * get["diff_b"].to(bias.device))
    return Merge(len(groups), sorted(unmatched))


# ---------------------------------------------------------------------------------------------------------------
# A preset's networks, found in a folder and loaded


def sharded(network):
    """Does FSDP2 hold a part of it on every rank? Then it stays on the devices."""
    return any(hasattr(p, "full_tensor") for p in network.parameters())


def move_frozen(network, device):
    """Move a network's frozen weights. (A trained one that changes its device loses what DDP has hooked to it.)"""
    for p in network.parameters():
        if not p.requires_grad:
            p.data = p.data.to(device)


@contextlib.contextmanager
def resting(network, rest=True):
    """While this lasts, a network that is not at work has its frozen weights on the host, unless it is sharded.

    rest=False leaves them.
    """
    if not rest or sharded(network):
        yield
        return
    places = [(p, p.device) for p in network.parameters() if not p.requires_grad]
    move_frozen(network, "cpu")
    try:
        yield
    finally:
        for p, place in places:
            p.data = p.data.to(place)


class Experts(nn.Module):
    """I2V-A14B's two transformers as one: timesteps from 1000·boundary up go to `high`, the others to `low`.

    `load(name)` gives an expert when it is first needed; unless `keep`, the other one is let go first. With `offload`
    the one that is not at work waits on the host, unless they are sharded.
    """

    def __init__(self, cfg, boundary, load, keep=True):
        super().__init__()
        self.cfg, self.boundary, self.load, self.keep, self.offload = cfg, boundary, load, keep, False

    def expert(self, name):
        if name not in self._modules:
            if not self.keep:
                self._modules.clear()
            self.add_module(name, self.load(name))
        return self._modules[name]

    def forward(self, x, t, context, y=None):
        expert = self.expert("high" if float(t.max()) >= 1000 * self.boundary else "low")
        if self.offload and not sharded(self):
            for module in self.children():
                move_frozen(module, x.device if module is expert else "cpu")
        return expert(x, t, context, y)


# part: where it may lie in a folder: this repository's names, native, Diffusers, ComfyUI
PLACES = {
    "dit": ("dit.safetensors", "transformer", "."),
    "high": ("high_noise_model", "transformer"),
    "low": ("low_noise_model", "transformer_2"),
    "vae": ("vae.safetensors", "Wan2.2_VAE.pth", "Wan2.2_VAE.safetensors", "Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors",
            "vae"),
    "text": ("text.safetensors", "models_t5_umt5-xxl-enc-bf16.safetensors", "models_t5_umt5-xxl-enc-bf16.pth",
             "text_encoder"),
    "tokenizer": ("tokenizer.json", "google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json"),
}  # fmt: skip
DOWNLOAD = {
    "tiny": "the tiny model's weights ship with the repository, or come from: python assets/build.py",
    "wan5b": "diffusion_pytorch_model*.safetensors with their index, Wan2.2_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth "
    "and google/umt5-xxl/tokenizer.json; get them with: hf download Wan-AI/Wan2.2-TI2V-5B --local-dir DIR",
    "wan14b": "high_noise_model/, low_noise_model/, Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth "
    "and google/umt5-xxl/tokenizer.json (single files: with high or low in the experts' names); "
    "get them with: hf download Wan-AI/Wan2.2-I2V-A14B --local-dir DIR",
}


NAMES = dict(dit="transformer", high="high-noise expert", low="low-noise expert", vae="VAE", text="text encoder")


def blank(preset, part):
    """A preset's network on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        if part == "vae":
            return WanVAE(preset.vae)
        return UMT5(preset.text) if part == "text" else WanDiT(preset.dit)


def find_parts(name, folder):
    """The path of each of a preset's networks and of its tokenizer in a folder.

    Known places first; then any single .safetensors file below the folder whose tensors are the network's. UserError
    names what is missing, and which networks the folder has instead.
    """
    preset, folder = CONFIGS[name], Path(folder)
    if not folder.is_dir():
        raise UserError(f"--ckpt {folder}: no such folder; --model {name} needs {DOWNLOAD[name]}")

    def holds(path):
        files = [*path.glob("*.safetensors")]
        alone = len(files) == 1 and path != folder  # in the folder itself a single file may be any network
        return path.is_file() or any(path.glob("*.index.json")) or alone or any(map(is_shard, files))

    wanted = ["dit"] if preset.boundary is None else ["high", "low"]
    wanted += ["vae", "text", "tokenizer"]
    parts = {p: next((folder / place for place in PLACES[p] if holds(folder / place)), None) for p in wanted}
    lost = {p: expected(preset, p) if p in NAMES else "" for p in wanted if parts[p] is None}
    found = {}
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.safetensors.index.json")]) if lost else ():
        if is_shard(path):
            continue
        path = path if path.suffix == ".safetensors" else path.parent
        found[path] = describe(Checkpoint(path).shapes, path.resolve())
        for part in lost:
            if path.is_file() and found[path] == lost[part]:
                if parts[part] is not None:
                    both = f"{parts[part].name} and {path.name}"
                    raise UserError(f"--ckpt {folder}: {both} are both {lost[part]}; keep one")
                parts[part] = path
    lost = [NAMES.get(p, "tokenizer.json") for p in wanted if parts[p] is None]
    if lost:
        has = ", ".join(f"{is_it} ({path.relative_to(folder)})" for path, is_it in found.items())
        has = f" (this is {has})" if has else ""
        raise UserError(f"--ckpt {folder}: no {', no '.join(lost)} in it{has}; --model {name} needs {DOWNLOAD[name]}")
    return parts


def expected(preset, part):
    """What `describe` says of a preset's network."""
    if part in ("high", "low"):
        return f"A14B's {part}-noise expert"
    return describe({k: tuple(v.shape) for k, v in blank(preset, part).state_dict().items()})


class Wan:
    """A preset's networks `dit`, `vae` and `text`, frozen and in eval mode, each read when it is first asked for.

    Every file's header is checked at once. `dit` and `text` are in `dtype`, the VAE in fp32 as the reference has
    it. With keep=False only one network is in memory: asking for another lets the last one go (sampling); what
    was changed in it is lost, so `loras`, (part, path) pairs, are merged whenever their transformer is read.
    shard(module), if given, distributes a transformer over ranks before its weights are read (FSDP2).
    """

    def __init__(self, name, preset, ckpt=None, device="cpu", dtype=torch.float32, keep=True, loras=(), shard=None):
        from tokenizers import Tokenizer

        self.name, self.preset, self.device, self.dtype = name, preset, torch.device(device), dtype
        self.keep, self.loras, self.shard, self.networks = keep, list(loras), shard, {}
        self.paths = find_parts(name, ckpt or self.preset.folder)
        for part, path in self.paths.items():
            if part in NAMES:
                match(blank(self.preset, part), Checkpoint(path), expected(self.preset, part))
        if "high" in self.paths:
            check_experts(self.paths["high"], self.paths["low"])
        self.tokenizer = Tokenizer.from_file(str(self.paths["tokenizer"]))
        self.tokenizer.no_padding()  # `tokenize` pads, and refuses what it would have to cut
        self.tokenizer.no_truncation()

    def network(self, part):
        if part not in self.networks:
            if not self.keep:
                self.networks.clear()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            self.networks[part] = self.load(part)
        return self.networks[part]

    dit = property(lambda self: self.network("dit"))
    vae = property(lambda self: self.network("vae"))
    text = property(lambda self: self.network("text"))

    def load(self, part):
        if part == "dit" and "high" in self.paths:
            return Experts(self.preset.dit, self.preset.boundary, self.load, self.keep)
        module = blank(self.preset, part)
        dtype = torch.float32 if part == "vae" else self.dtype
        if self.shard and part not in ("vae", "text"):
            self.shard(module)
            module.to_empty(device=self.device)
        done = load_weights(module, self.paths[part], self.device, dtype)
        if part == "vae":
            scale = {k: json.loads(done.metadata[k]) for k in ("mean", "std") if k in done.metadata}
            module.set_scale(**(dict(mean=self.preset.vae.mean, std=self.preset.vae.std) | scale))
            module.to(self.device)
        if self.preset.folder is None:
            print(
                f"{NAMES[part]}: {done.tensors} tensors, {done.precision}, {done.layout}: {self.paths[part]}",
                flush=True,
            )
        for path in [path for target, path in self.loras if target == part]:
            merged, unmatched = merge_lora(module, path)
            print(
                f"{path}: merged into {merged} layers of the {NAMES[part]}, {len(unmatched)} names unmatched",
                flush=True,
            )
        return module.eval().requires_grad_(False)

    @torch.no_grad()
    def encode_text(self, prompts):
        """Prompts to the context [B, text_len, text_dim], fp32, padding zero."""
        ids, mask = tokenize(prompts, self.tokenizer, self.preset.dit.text_len)
        return self.text(ids.to(self.device), mask.to(self.device)).float()


def check_experts(high, low):
    """A14B's two experts have the same names and shapes, so only their place and their values tell them apart."""
    for path, other in ((high, "low_noise"), (low, "high_noise")):
        if other in path.resolve().name:
            raise UserError(f"{path}: is {path.resolve().name}, the other expert; the two are swapped")
    probe = "patch_embedding.bias"
    values = []
    for file in (Checkpoint(high), Checkpoint(low)):
        name = next((k for k in file.shapes if k.endswith(probe)), None)
        values.append(dict(file.read({name})).get(name))
    if values[0] is not None and torch.equal(*values):
        raise UserError(f"{high} and {low} hold the same weights: one expert was downloaded or copied twice")


def find_preset(name, ckpt=None, shift=None):
    """The preset of that name, its noise schedule's shift replaced where one is given.

    UserError where there is none, or where its weights neither ship nor are given.
    """
    if name not in CONFIGS:
        raise UserError(f"--model {name}: unknown preset; choose from {', '.join(CONFIGS)}")
    if not ckpt and CONFIGS[name].folder is None:
        raise UserError(f"--model {name} needs --ckpt DIR, a folder with {DOWNLOAD[name]}")
    return replace(CONFIGS[name], shift=shift) if shift else CONFIGS[name]


def load_model(name, ckpt=None, device="cpu", dtype=None, keep=True, loras=(), shard=None, shift=None):
    """A preset's networks (`Wan`); dtype defaults to fp32 for tiny and bf16 for Wan 2.2, shift to the preset's.

    Raises UserError for an unknown preset, and for missing, torn or wrong weights, before any of them is read.
    """
    preset = find_preset(name, ckpt, shift)
    if dtype is None:
        dtype = torch.float32 if preset.folder else torch.bfloat16
    return Wan(name, preset, ckpt, device, dtype, keep, loras, shard)
