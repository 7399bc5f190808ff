"""Released files of Wan 2.2 and of LoRAs: read in every layout that people have, checked, put into model.py's networks.

- Layouts: native folders, Diffusers folders, single files for ComfyUI. A network's `state_dict()` is the native layout;
  tables of patterns give the Diffusers name of each tensor.
- Nothing is half loaded: names, shapes and types are checked against the files' headers before any weight changes. Then
  one tensor at a time goes to where it belongs: peak memory is the model's and 2 GB.
- No file can run code: pickles are read as tensors only.
- `Wan` holds a preset's networks, reads each when it is first asked for, and moves them between host and device.

What a person can mend, as a missing shard or another model's file, is a `UserError` that names it and says what to do.
"""

import json
import math
import os
import pickle
import re
import typing
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from cli import UserError, whole_file
from model import (
    CONFIGS,
    UMT5,
    Experts,
    LoRALinear,
    WanDiT,
    WanVAE,
    full_precision,
    lora_layers,
    move_frozen,
    sharded,
    tokenize,
)

# ---------------------------------------------------------------------------------------------------------------
# Files of tensors

MAPPED = 2**30  # bytes of a file that are mapped before it is let go and opened anew
WRAPPERS = ("state_dict", "generator", "module", "model")  # under which training programs keep a network's state dict
PRECISIONS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
PRECISIONS |= {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
PRECISIONS |= {torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8"}
# fp8: weight = value times this, which stands beside `.weight`; ComfyUI's fp8_scaled, and DeepSeek's by blocks
SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
BLOCK = 128  # rows and columns of a block with a scale of its own


def write_safetensors(tensors, path, metadata=None):
    """Write a safetensors file whole or not at all."""
    with whole_file(path) as part:
        part.touch()
        mode = part.stat().st_mode  # the umask's; safetensors makes files that only their owner can read
        save_file(tensors, part, metadata)
        part.chmod(mode)


def open_safetensors(path):
    """Open a safetensors file; a missing or broken one is a UserError that names it."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        return safe_open(path, "pt")
    except Exception as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); download or build it again") from None


def open_pickle(path):
    """The tensors of a .pt or .pth file by name, memory-mapped where the file allows it; no code in it is ever run.

    Of a training checkpoint the state dict under one of `WRAPPERS`.
    """
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file of before torch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        with open(path, "rb") as file:
            pickled = file.read(2) in (b"PK", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")
        if pickled and isinstance(error, pickle.UnpicklingError):
            raise UserError(f"{path}: holds more than tensors, which could run code, so it was not read; take the same "
                            f"weights as .safetensors") from None  # fmt: skip
        raise UserError(f"{path}: not a whole checkpoint (one of Git LFS's pointers, a web page, a part?); download it "
                        f"again") from None  # fmt: skip
    state = state if isinstance(state, dict) else {}
    for wrapper in WRAPPERS:
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    if not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path}: not a dictionary of tensors")
    return state


def is_shard(path):
    """Return whether a file's name is that of one of several shards."""
    return re.search(r"-\d+-of-\d+$", path.stem) is not None


def shard_files(path):
    """The files of a checkpoint: one file, or what the index in a folder names. UserError where one is missing."""
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        raise UserError(f"{path}: GGUF, quantised weights; {INSTEAD}")
    if path.is_file() and not path.name.endswith(".index.json"):
        return [path]
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    indices = [path] if path.is_file() else sorted(path.glob("*.index.json"))
    if len(indices) > 1:
        raise UserError(f"{path}: {len(indices)} indices in one folder; keep one: {', '.join(i.name for i in indices)}")
    if indices:
        return indexed_files(indices[0])
    files = sorted(path.glob("*.safetensors")) or sorted([*path.glob("*.pth"), *path.glob("*.pt")])
    if len(files) == 1 and not is_shard(files[0]):
        return files
    if files and all(map(is_shard, files)):
        raise UserError(f"{path}: {len(files)} shard(s) but no *.index.json beside them; download it too")
    names = ", ".join(f.name for f in files[:4])
    raise UserError(
        f"{path}: " + (f"several checkpoints ({names}); keep one" if files else "no *.safetensors, *.pth or *.pt in it")
    )


def indexed_files(index):
    """The shards that an index names; UserError where one is missing or lies outside of the index's folder."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: not an index of shards ({error!r}); download it again") from None
    if outside:
        raise UserError(f"{index}: names {outside[0]}, a file outside of its folder; download it again")
    files = [index.parent / name for name in names]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise UserError(
            f"{index}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing)}; download them"
        )
    return files


class Checkpoint:
    """A checkpoint's tensors by name: `shapes` and `precisions` from the headers; `read` moves the data."""

    def __init__(self, path):
        self.path, self.files = Path(path), shard_files(path)
        self.shapes, self.precisions, self.metadata, self.names = {}, {}, {}, {}
        for file in self.files:
            if file.suffix == ".safetensors":
                handle = open_safetensors(file)
                slices = {k: handle.get_slice(k) for k in handle.keys()}
                header = {k: (tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}
                self.metadata |= handle.metadata() or {}
            else:
                header = {k: (tuple(v.shape), v.dtype) for k, v in open_pickle(file).items()}
            twice = next((k for k in header if k in self.shapes), None)
            if twice:
                raise UserError(f"{file}: {twice} is in another shard too; download the folder again")
            self.names[file] = list(header)
            self.shapes |= {k: shape for k, (shape, _) in header.items()}
            self.precisions |= {k: PRECISIONS.get(kind, str(kind)) for k, (_, kind) in header.items()}

    def scale(self, name):
        """The name of what an fp8 tensor is to be multiplied by, or None."""
        return next((k for s in SCALES if (k := name.removesuffix(".weight") + s) in self.shapes), None)

    def read(self, wanted, rows=None):
        """Yield (name, tensor) of the names in `wanted`, in the files' order; fp8 comes multiplied out, in fp32.

        rows: by name, a slice of a tensor's rows where not all are wanted: only their bytes are read.

        Files are memory-mapped, and a page once read counts as this process's until its file is let go. So a file is
        opened anew after every MAPPED bytes.
        """
        for file in self.files:
            get, read = None, 0
            for name in self.names[file]:
                if name not in wanted:
                    continue
                if get is None or read > MAPPED:
                    get = get_slice = handle = tensor = None
                    if file.suffix == ".safetensors":
                        get, get_slice = (handle := open_safetensors(file)).get_tensor, handle.get_slice
                    else:
                        get = get_slice = open_pickle(file).__getitem__
                    read = 0
                part = (rows or {}).get(name)
                whole = part is None or self.precisions[name] == "fp8"
                tensor = get(name) if whole else get_slice(name)[part]
                read += tensor.nbytes
                if self.precisions[name] == "fp8":
                    tensor = tensor.float()
                    if self.scale(name):
                        ((_, scale),) = self.read({self.scale(name)})
                        tensor *= spread_scale(scale.float(), tensor.shape)
                    tensor = tensor if part is None else tensor[part]
                yield name, tensor


def blocks_of(shape):
    """The shape of the scales of an fp8 weight [out, in] in blocks."""
    return tuple(-(-n // BLOCK) for n in shape)


def spread_scale(scale, shape):
    """An fp8 weight's scale, of the tensor, of each row or of each block, as a factor for the weight of that shape."""
    if scale.dim() == 2 and tuple(scale.shape) == blocks_of(shape):
        out, inner = shape
        return scale.repeat_interleave(BLOCK, 0)[:out].repeat_interleave(BLOCK, 1)[:, :inner]
    return scale.view(-1, *[1] * (len(shape) - 1))


def scale_fits(checkpoint, name):
    """True unless an fp8 tensor's scale is lost, or is no number a tensor, a row or a block."""
    if checkpoint.precisions.get(name) != "fp8":
        return True
    scale, shape = checkpoint.scale(name), checkpoint.shapes[name]
    if scale is None:  # a file of plain fp8 values has no scales at all
        return not any(k.endswith((*SCALES, "scaled_fp8")) for k in checkpoint.shapes)
    return math.prod(checkpoint.shapes[scale]) in (1, shape[0]) or checkpoint.shapes[scale] == blocks_of(shape)


# ---------------------------------------------------------------------------------------------------------------
# Names of the three layouts. (pattern, replacement) from native to Diffusers or, for UMT5, transformers.

DIT_NAMES = (  # of WanTransformer3DModel; its norm2 is the native norm3, its norm3 the native norm2
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
PREFIX = re.compile(r"^(?:(?:base_model|model|diffusion_model|transformer|transformer_2|unet|module|generator)\.)+")
BESIDE = re.compile(  # no weights: fp8's scales (`Checkpoint.scale` reads them), ComfyUI's marks, UMT5's second name
    r"(^|\.)(scale_weight|weight_scale|weight_scale_inv|scaled_fp8|scale_input|input_scale|comfy_quant)$"
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
        theirs = name
        for pattern, replacement in rules:
            theirs = re.sub(pattern, replacement, theirs)
        out[name] = theirs
    return out


def expert_in_name(path):
    """Which of A14B's experts a file's or folder's name tells, "high" or "low" (of a link, its own name); or None."""
    name = Path(os.path.abspath(path)).name.lower() if path else ""
    high = "high" in name or name == "transformer"
    low = re.search(r"(?<![a-z])low|low.?noise", name) or name == "transformer_2"  # not "slow", "flow"
    return None if high == bool(low) else "high" if high else "low"


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
                expert = expert_in_name(path)
                return f"A14B's {expert}-noise expert" if expert else "one of A14B's experts"
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


# what shows that weights are quantised for kernels that are not here: "name type" of their tensors
QUANTISED = (
    (r"\.(qweight|wscales|smooth_factor) ", "4-bit weights (nunchaku's SVDQuant, AWQ or GPTQ)"),
    (r"\.(absmax|quant_map|SCB|quant_state\.\w+) ", "weights quantised by bitsandbytes"),
    (r"\.weight (I8|torch\.int8)$", "int8 weights"), (r"\.weight (U8|torch\.uint8)$", "4-bit weights"),
    (r"scale\w* (U8|F8_E8M0|torch\.uint8|torch\.float8_e8m0fnu)$", "mxfp8 weights, with scales for blocks of 32"),
)  # fmt: skip
INSTEAD = "only their own kernels read them; download the same model in bf16, fp16 or fp8 (fp8_scaled), as .safetensors"


def quantisation(checkpoint):
    """What kind of quantised weights a checkpoint holds that is not read here, in words; None of one that is."""
    about = [f"{name} {kind}" for name, kind in checkpoint.precisions.items()]
    for pattern, what in QUANTISED:
        if sum(re.search(pattern, line) is not None for line in about) > 1:  # a single one is a fault of the file
            return what
    return None


def match(module, checkpoint, asked=""):
    """({native name: name in the checkpoint}, layout); UserError where names, shapes or types do not fit."""
    if quantisation(checkpoint):
        raise UserError(f"{checkpoint.path}: {quantisation(checkpoint)}; {INSTEAD}")
    want = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    native, theirs = {k: k for k in want}, diffusers_names(module, want)
    if "shared.weight" not in checkpoint.shapes:
        theirs = {k: v.replace("shared.weight", "encoder.embed_tokens.weight") for k, v in theirs.items()}
    readings = []
    for prefix in sorted({"", *(found[0] for k in checkpoint.shapes if (found := PREFIX.match(k)))}):
        under = f" under {prefix}" if prefix else ""
        readings += [(layout + under, {k: prefix + v for k, v in names.items()})
                     for layout, names in (("native", native), ("Diffusers", theirs))]  # fmt: skip
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
        listed = [f"{len(f)} {what} ({', '.join(f[:3])}{', ...' if len(f) > 3 else ''})" for what, f in faults if f]
        is_it, wanted = describe(shapes, checkpoint.path), asked or describe(want)
        this = f"this is {is_it}, {wanted} was asked for" if is_it != wanted else f"not quite {wanted}"
        raise UserError(f"{checkpoint.path}: {this}; read in the {layout} layout: {'; '.join(listed)}")
    return names, layout


# ---------------------------------------------------------------------------------------------------------------
# A checkpoint into a network

KEPT_FP32 = re.compile(r"norm|modulation|time_|head\.")  # of a transformer in half precision, as the reference computes


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


def load_weights(module, path, device=None, dtype=None):
    """Load a checkpoint of any layout into a network; returns `Loaded`.

    path: a .safetensors, .pt or .pth file, or a folder with one or with shards and their index. A network on the meta
    device gets its weights on `device` in `dtype` (default: the file's); another keeps its own device and types.
    A WanDiT in half precision keeps norms, modulations, time embedding and head in fp32, as the reference computes
    them. Of weights that FSDP2 shards, each rank reads its own rows only. Raises UserError, before any weight
    changes, with how many keys are missing, unexpected or mis-shaped, and the first of each.
    """
    checkpoint = Checkpoint(path)
    names, layout = match(module, checkpoint)
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
# LoRA files. A layer's update is dW = strength (alpha/rank) up @ down, or a whole difference `diff`. Trainers and
# programs spell the layers' names in many ways, with dots or underscores and under many prefixes.

LORA_KEY = re.compile(
    r"^(?P<module>.+?)\.(?:lora[_.](?P<kind>A|B|down|up)(?:\.\w+)?\.weight|(?P<other>alpha|diff|diff_b))$"
)
LORA_KINDS = {"A": "down", "B": "up"}
LORA_PREFIX = re.compile(
    r"^(?:(?:base_model|model|diffusion_model|transformer_2|transformer|unet|pipe|dit|module|generator|lora_unet"
    r"|lora_transformer|lycoris)_)+"
)


class Lora(typing.NamedTuple):
    """A LoRA file, the transformer that it is for ("dit", or of A14B "high" or "low"), and how much of it is added."""

    part: str
    path: str
    strength: float = 1.0


class Added(typing.NamedTuple):
    """What `merge_lora` or `attach_lora` did: layers changed, and the file's names that the model has nothing for."""

    layers: int
    unmatched: list


def save_lora(model, path, metadata=None):
    """Write the LoRA as safetensors: `diffusion_model.<module>.lora_A.weight` [rank, in] and `.lora_B.weight`.

    The scale alpha/rank is multiplied into B, so readers that know no alpha, or assume alpha = rank, are right.
    metadata: of the file's header; {"expert": "low"} tells which of A14B's experts it is for (`parse_loras`).
    """
    tensors = {}
    for name, layer in lora_layers(model).items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = layer.lora_A.detach().float().cpu().contiguous()
        tensors[f"diffusion_model.{name}.lora_B.weight"] = (layer.lora_B.detach().float() * layer.scale).cpu()
    write_safetensors(tensors, path, metadata)


def plain_name(name):
    """A module's name in the one spelling that is compared: underscores, and no prefix."""
    return LORA_PREFIX.sub("", re.sub(r"[._]+", "_", name))


def lora_alpha(checkpoint, prefix):
    """The alpha that PEFT keeps in an adapter_config.json beside its file, and Diffusers in the header under a prefix,
    "transformer" or "transformer_2"; else None."""
    beside = checkpoint.files[0].with_name("adapter_config.json")
    alone = checkpoint.files[0].name.startswith("adapter_model") and beside.is_file()
    settings = beside.read_text() if alone else checkpoint.metadata.get("lora_adapter_metadata", "{}")
    try:
        config = dict(json.loads(settings))
    except (ValueError, TypeError):
        raise UserError(f"{checkpoint.path}: its PEFT settings are not JSON; download it again") from None
    if not alone:
        config = {k.removeprefix(prefix + "."): v for k, v in config.items() if k.startswith(prefix + ".")}
    odd = [k for k in ("alpha_pattern", "use_rslora", "use_dora") if config.get(k)]
    if odd:
        raise UserError(f"{checkpoint.path}: a LoRA with {', '.join(odd)} cannot be merged; merge it with PEFT first")
    return config.get("lora_alpha")


def match_lora(model, checkpoint, part):
    """What a LoRA file holds for a WanDiT: ({module: {kind: key}}, names that the model has not, alpha or None).

    By the headers. kind: "down", "up", "alpha", "diff" or "diff_b". Of a file with both of A14B's experts, under
    `transformer.` and `transformer_2.` as Diffusers has them, `part` takes its own. UserError: see `read_lora`.
    """
    path, keys, prefix = checkpoint.path, list(checkpoint.shapes), "transformer"
    if any(k.startswith("transformer_2.") for k in keys):
        prefix = {"high": "transformer", "low": "transformer_2"}.get(part)
        if prefix is None:
            raise UserError(f"{path}: a LoRA of A14B's two experts, it goes with --model wan14b")
        keys = [k for k in keys if k.startswith(prefix + ".")]
    modules = {n: m for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)}
    weights = {n: m.weight for n, m in modules.items()}
    weights |= {n: p for n, p in model.named_parameters() if n.endswith("modulation")}
    theirs = diffusers_names(model, [n + ".weight" for n in modules])
    known = {plain_name(k.removesuffix(".weight")): n.removesuffix(".weight") for n, k in theirs.items()}
    known |= {plain_name(n): n for n in weights}
    found, unmatched = {}, set()
    for key in keys:
        parsed = LORA_KEY.match(key.replace(".diff_m", ".modulation.diff"))
        name = known.get(plain_name(parsed["module"])) if parsed else None
        if name is not None:
            found.setdefault(name, {})[LORA_KINDS.get(parsed["kind"], parsed["kind"] or parsed["other"])] = key
        elif parsed or not any(plain_name(key[: dot.start()]) in known for dot in re.finditer(r"\.", key)):
            unmatched.add(PREFIX.sub("", parsed["module"] if parsed else key))
        else:
            raise UserError(f"{path}: {key} is an update of a kind that is not read (DoRA, LoKr); take a plain LoRA")
    if not found:
        has, wants = next(iter(keys), "no tensor"), next(iter(modules))
        raise UserError(f"{path}: nothing to merge, no name fits this model; the file has {has}, the model {wants}")
    for name, kinds in found.items():
        if ("down" in kinds) != ("up" in kinds) or not kinds.keys() - {"alpha"}:
            raise UserError(f"{path}: {name} has only {', '.join(kinds)}, half of its update; download the file again")
        sizes = {kind: checkpoint.shapes[key] for kind, key in kinds.items()}
        out, *inner = weights[name].shape
        fits = sizes.get("diff", (out, *inner)) == (out, *inner) and sizes.get("diff_b", (out,)) == (out,)
        if "down" in sizes:
            (rank, *wide), (tall, *thin) = sizes["down"], sizes["up"]
            fits = fits and tall == out and math.prod(thin) == rank and math.prod(wide) == math.prod(inner)
        fits = fits and math.prod(sizes.get("alpha", ())) == 1
        if not fits or ("diff_b" in kinds and getattr(modules.get(name), "bias", None) is None):
            size = f"{name} is {sizes}, the model's weight is {(out, *inner)}"
            raise UserError(f"{path}: {size}: a LoRA of another model; take one of this model")
    return found, sorted(unmatched), lora_alpha(checkpoint, prefix)


def read_lora(model, path, strength=1.0, part="dit"):
    """A LoRA file's update of a WanDiT: ({module: {"down", "up", "diff", "diff_b"}}, names that the model has not).

    dW = up @ down + diff, and diff_b is added to the bias; all fp32, with strength and alpha/rank multiplied in. Reads
    PEFT (`lora_A`/`lora_B`, also `.default`), `lora_down`/`lora_up`, both with `alpha` (absent: `lora_alpha`'s, or the
    rank), and `diff`/`diff_b`/`diff_m` (whole differences of weight, bias and modulation), under native, Diffusers or
    kohya module names with any usual prefix; part: see `match_lora`. Raises UserError if a shape does not fit, half of
    a pair is missing, a layer's update is of another kind (DoRA, LoKr), a value is not finite, or nothing matches.
    """
    checkpoint = Checkpoint(path)
    found, unmatched, alpha = match_lora(model, checkpoint, part)
    tensors = dict(checkpoint.read({key for kinds in found.values() for key in kinds.values()}))
    bad = next((key for key, value in tensors.items() if not value.isfinite().all()), None)
    if bad:
        raise UserError(f"{path}: {bad} holds NaN or infinite values; download it again, or train it again")
    updates = {}
    for name, kinds in found.items():
        update = updates[name] = {kind: tensors[key].float() for kind, key in kinds.items()}
        own_alpha = update.pop("alpha", alpha)
        if "down" in update:
            scale = 1.0 if own_alpha is None else float(own_alpha) / len(update["down"])
            update["up"] = strength * scale * update["up"]
        for kind in update.keys() & {"diff", "diff_b"}:
            update[kind] = strength * update[kind]
    return updates, unmatched


@torch.no_grad()
def add_rounded(weight, update, name):
    """weight += update, summed in full precision and rounded once.

    A bf16 weight is rounded at random to one of its two neighbours, with the probabilities that keep the sum's mean:
    rounding to the nearest leaves a third of an update of 6e-4 of the weights' norm, this all of it. The draw depends
    on the weight's name, so that all ranks have the same weights. Of a weight that FSDP2 shards, each rank adds to its
    own rows, whose draw begins anew.
    """
    rows = own_rows(weight)
    if rows is not None:
        weight, update = weight.to_local(), update[rows]
    total = full_precision(weight) + update.to(weight.device)
    if weight.dtype == torch.bfloat16:  # which is the upper half of an fp32 number's bits
        generator, bits = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode())), total.view(torch.int32)
        bits += torch.randint(2**16, bits.shape, generator=generator, dtype=torch.int32, device=weight.device)
        bits &= -(2**16)
    weight.copy_(total)


def merge_updates(model, updates):
    """Add updates as `read_lora` gives them to a WanDiT's own weights."""
    for name, update in updates.items():
        bias = update.pop("diff_b", None)
        if bias is not None:
            add_rounded(model.get_submodule(name).bias, bias, name + ".bias")
        if update:
            weight = model.get_parameter(name if name.endswith("modulation") else name + ".weight")
            change = update.get("diff", torch.zeros(()))
            if "down" in update:
                up, down = (update[kind].flatten(1).to(weight.device) for kind in ("up", "down"))
                change = change.to(weight.device) + (up @ down).view(weight.shape)
            add_rounded(weight, change, name)


def merge_lora(model, path, strength=1.0, part="dit"):
    """Add a LoRA file's update to a WanDiT's weights; returns `Added`. UserError, before any changes: see `read_lora`.

    For the LoRA of a distilled base, which is never taken off again; what is tuned stays beside the weights
    (`attach_lora`).
    """
    updates, unmatched = read_lora(model, path, strength, part)
    merge_updates(model, updates)
    return Added(len(updates), unmatched)


def attach_lora(model, path, strength=1.0, part="dit"):
    """Put a LoRA file beside a WanDiT's weights as `LoRALinear` layers; returns `Added`. UserError: see `read_lora`.

    The model then computes as it did in training, and keeps what bf16 weights would round. A second LoRA of a layer
    adds its rank to the first one's. Whole differences, and updates of layers other than plain linear ones, are merged.
    """
    updates, unmatched = read_lora(model, path, strength, part)
    for name, update in updates.items():
        layer = None if name.endswith("modulation") else model.get_submodule(name)
        if "down" in update and type(layer) in (nn.Linear, LoRALinear):
            down, up = (update.pop(kind).to(layer.weight.device) for kind in ("down", "up"))
            if isinstance(layer, LoRALinear):
                down = torch.cat([layer.lora_A.detach(), down])
                up = torch.cat([layer.scale * layer.lora_B.detach(), up], 1)
            rank = len(down)
            layer = LoRALinear(layer, rank, alpha=rank).requires_grad_(False)
            layer.lora_A.data, layer.lora_B.data = down, up
            model.set_submodule(name, layer)
    merge_updates(model, {name: update for name, update in updates.items() if update})
    return Added(len(updates), unmatched)


def parse_loras(text, preset, option="--lora"):
    """'[high=|low=]FILE[:STRENGTH],...' to a list of `Lora`.

    A path may itself hold commas, colons and equals signs: what names a file is one. Of A14B a LoRA without an expert
    goes to both if it holds both, or to the one that its header or its name tells. UserError for a file that is not
    there, and where nothing tells the expert.
    """
    loras, pieces = [], text.split(",")
    while pieces:
        counts = range(1, len(pieces) + 1)
        count, item = next(((n, item) for n in counts if (item := lora_item(",".join(pieces[:n])))), (1, None))
        if item is not None:
            loras += assign_expert(*item, preset, option)
        elif pieces[0]:
            raise UserError(f"{option} {pieces[0]}: no such file; it is [high=|low=]FILE[:STRENGTH], comma-separated")
        del pieces[:count]
    return loras


def lora_item(text):
    """(expert or "", path, strength) of '[high=|low=]FILE[:STRENGTH]', None where no such file is there."""
    expert = re.match(r"(high|low)=", text)
    for part, file in (("", text), *([(expert[1], text[expert.end() :])] if expert else [])):
        strength = re.fullmatch(r"(.+):([-+]?\d*\.?\d+)", file)
        for path, number in ((file, 1.0), *([(strength[1], float(strength[2]))] if strength else [])):
            if path and Path(path).exists():
                return part, path, number
    return None


def assign_expert(part, path, strength, preset, option):
    """The `Lora`s of one file, by the expert that was given, or that the file's names, header or own name tell."""
    if preset.boundary is None:
        if part:
            raise UserError(f"{option} {part}={path}: only wan14b has experts, high and low; give the file alone")
        return [Lora("dit", path, strength)]
    checkpoint = Checkpoint(path)
    prefixes = {key.split(".")[0] for key in checkpoint.shapes}
    if "transformer_2" in prefixes and not part:  # as Diffusers has both experts in one file
        high = [Lora("high", path, strength)] if "transformer" in prefixes else []
        return [*high, Lora("low", path, strength)]
    part = part or checkpoint.metadata.get("expert") or expert_in_name(path)
    if part not in ("high", "low"):
        which = "its name does not tell whether it is for A14B's high-noise or its low-noise expert"
        raise UserError(f"{option} {path}: {which}; give high={path} or low={path}")
    return [Lora(part, path, strength)]


# ---------------------------------------------------------------------------------------------------------------
# A preset's networks, found in a folder and loaded

# network: where it may lie in a folder, by the names of this repository, native, Diffusers' and ComfyUI's
PATHS = {
    "dit": ("dit.safetensors", "transformer", "."),
    "high": ("high_noise_model", "transformer"),
    "low": ("low_noise_model", "transformer_2"),
    "vae": ("vae.safetensors", "Wan2.2_VAE.pth", "Wan2.2_VAE.safetensors", "Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors",
            "vae"),
    "text": ("text.safetensors", "models_t5_umt5-xxl-enc-bf16.safetensors", "models_t5_umt5-xxl-enc-bf16.pth",
             "text_encoder"),
    "tokenizer": ("tokenizer.json", "google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json"),
}  # fmt: skip
TITLES = dict(dit="transformer", high="high-noise expert", low="low-noise expert", vae="VAE", text="text encoder")
DOWNLOAD = {
    "tiny": "the tiny model's weights ship with the repository, or come from: python assets/build.py",
    "wan5b": "diffusion_pytorch_model*.safetensors with their index, Wan2.2_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth "
    "and google/umt5-xxl/tokenizer.json; get them with: hf download Wan-AI/Wan2.2-TI2V-5B --local-dir DIR",
    "wan14b": "high_noise_model/, low_noise_model/, Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth "
    "and google/umt5-xxl/tokenizer.json (single files: with high or low in the experts' names); "
    "get them with: hf download Wan-AI/Wan2.2-I2V-A14B --local-dir DIR",
}


def blank(preset, part):
    """A preset's network on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        if part == "vae":
            return WanVAE(preset.vae)
        return UMT5(preset.text) if part == "text" else WanDiT(preset.dit)


def expected(preset, part):
    """What `describe` says of a preset's network."""
    if part in ("high", "low"):
        return f"A14B's {part}-noise expert"
    return describe({k: tuple(v.shape) for k, v in blank(preset, part).state_dict().items()})


FILES = ("*.safetensors", "*.safetensors.index.json", "*.pt", "*.pth", "*.gguf")


def identify(path):
    """What a file, or a folder with shards and their index, holds, in words."""
    if path.suffix == ".gguf":
        return "GGUF, which is not read here"
    try:
        checkpoint = Checkpoint(path)
    except UserError:
        if path.suffix in (".pt", ".pth"):  # any program's file may be called so
            return "no network of Wan's"
        raise
    return quantisation(checkpoint) or describe(checkpoint.shapes, path)


def find_parts(name, folder):
    """The path of each of a preset's networks and of its tokenizer in a folder.

    Known places first; then any single file below the folder whose tensors are the network's. UserError
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
    parts = {p: next((folder / place for place in PATHS[p] if holds(folder / place)), None) for p in wanted}
    lost = {p: expected(preset, p) if p in TITLES else "" for p in wanted if parts[p] is None}
    found = {}
    for path in sorted(path for kind in FILES for path in folder.rglob(kind)) if lost else ():
        if is_shard(path) or path in parts.values():
            continue
        path = path.parent if path.suffix == ".json" else path
        found[path] = identify(path)
        for part in lost:
            if path.is_file() and found[path] == lost[part]:
                if parts[part] is not None:
                    both = f"{parts[part].name} and {path.name}"
                    raise UserError(f"--ckpt {folder}: {both} are both {lost[part]}; keep one")
                parts[part] = path
    lost = [TITLES.get(p, "tokenizer.json") for p in wanted if parts[p] is None]
    if lost:
        has = ", ".join(f"{is_it} ({path.relative_to(folder)})" for path, is_it in found.items())
        has = f" (this is {has})" if has else ""
        raise UserError(f"--ckpt {folder}: no {', no '.join(lost)} in it{has}; --model {name} needs {DOWNLOAD[name]}")
    return parts


def check_experts(high, low):
    """UserError where A14B's experts are swapped or one file twice: their names and shapes cannot tell."""
    for path, other in ((high, "low_noise"), (low, "high_noise")):
        if other in path.resolve().name:
            raise UserError(f"{path}: is {path.resolve().name}, the other expert; exchange the two")
    values = []
    for file in (Checkpoint(high), Checkpoint(low)):
        name = next((k for k in file.shapes if k.endswith("patch_embedding.bias")), None)
        values.append(dict(file.read({name})).get(name))
    if values[0] is not None and torch.equal(*values):
        raise UserError(f"{high} and {low} hold the same weights: one expert was downloaded or copied twice")


def add_own_loras(module, part, loras, add):
    """Add those of some LoRAs that are for this transformer, and say so; add: `merge_lora` or `attach_lora`."""
    for lora in loras:
        if lora.part == part:
            layers, unmatched = add(module, lora.path, lora.strength, part)
            how = "merged into" if add is merge_lora else "beside"
            found = f"{how} {layers} layers of the {TITLES[part]}, strength {lora.strength:g}"
            print(f"{lora.path}: {found}; {len(unmatched)} names unmatched", flush=True)


class Wan:
    """A preset's networks `dit`, `vae` and `text`, frozen and in eval mode, each read when it is first asked for.

    Every file's header is checked at once. `dit` and `text` are in `dtype`, the VAE in fp32 as the reference has it;
    `dit` and `vae` compute in `compute_dtype` (None: in their own). With keep=False only one network is in memory:
    asking for another lets the last one go (sampling). Whenever a transformer is read, those of `base_loras` that are
    its own are merged into it, as of a distilled base, and those of `loras` (both `parse_loras`'s) are put beside its
    weights. shard(module), if given, distributes a transformer over ranks before its weights are read (FSDP2). dtype
    defaults to fp32 for tiny and bf16 for Wan 2.2, shift to the preset's. offload, set before anything is at work: see
    `at_work`. Raises UserError for an unknown preset, and for missing, torn or wrong weights, before any is read.
    """

    def __init__(self, name, ckpt=None, device="cpu", dtype=None, keep=True, loras=(), shard=None, shift=None,
                 compute_dtype=None, base_loras=()):  # fmt: skip
        from tokenizers import Tokenizer

        self.name, self.preset, self.device = name, find_preset(name, ckpt, shift), torch.device(device)
        self.dtype = dtype or (torch.float32 if self.preset.shipped else torch.bfloat16)
        self.compute_dtype, self.keep, self.shard = compute_dtype, keep, shard
        self.loras, self.base_loras, self.networks, self.offload = loras, base_loras, {}, False
        self.paths = find_parts(name, ckpt or self.preset.folder)
        for part, path in self.paths.items():
            if part in TITLES:
                match(blank(self.preset, part), Checkpoint(path), expected(self.preset, part))
        if "high" in self.paths:
            check_experts(self.paths["high"], self.paths["low"])
        try:
            self.tokenizer = Tokenizer.from_file(str(self.paths["tokenizer"]))
        except Exception as error:
            raise UserError(f"{self.paths['tokenizer']}: not a tokenizer ({error}); download it again") from None
        self.tokenizer.no_padding()  # `tokenize` pads, and refuses what it would have to cut
        self.tokenizer.no_truncation()

    dit = property(lambda self: self.network("dit"))
    vae = property(lambda self: self.network("vae"))
    text = property(lambda self: self.network("text"))

    @property
    def tuned(self):
        """The transformer that is tuned: `dit`, or of A14B the low-noise expert (the paper's section 4.1)."""
        return self.dit.expert("low") if isinstance(self.dit, Experts) else self.dit

    def network(self, part):
        """Return the network of that name; it is loaded on first use."""
        if part not in self.networks:
            if not self.keep:
                self.networks.clear()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            self.networks[part] = self.load(part)
        return self.networks[part]

    def load(self, part):
        """A network anew from its file: "dit", "vae", "text", or of A14B "high" or "low"."""
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
            module.set_scale(**scale)
            module.to(self.device)
        if part != "text":
            module.compute_dtype = self.compute_dtype
        if not self.preset.shipped:
            kind = f"{done.tensors} tensors, {done.precision}, {done.layout}"
            print(f"{TITLES[part]}: {kind}: {self.paths[part]}", flush=True)
        add_own_loras(module, part, self.base_loras, merge_lora)
        add_own_loras(module, part, self.loras, attach_lora)
        return module.eval().requires_grad_(False)

    def at_work(self, *parts):
        """With `offload`, bring the loaded networks of these names to the device, and the others to the host.

        "dit", "vae", "text", and "tuned", which is the dit, or of A14B the low-noise expert alone. Their frozen weights
        move; trained ones, and networks that FSDP2 shards, stay where they are. With "dit", each of A14B's experts
        comes to the device when the sampler reaches it, and the other one leaves.
        """
        if not self.offload:
            return
        parts = {"dit" if part == "tuned" else part for part in parts} | set(parts)
        for part, network in self.networks.items():
            if isinstance(network, Experts) and part in parts:
                network.offload = True
                if "tuned" in parts:
                    network.move_expert("low", self.device)
            elif not sharded(network):
                move_frozen(network, self.device if part in parts else "cpu")

    @torch.no_grad()
    def encode_text(self, prompts):
        """Prompts to the context [B, text_len, text_dim], fp32, padding zero."""
        ids, mask = tokenize(prompts, self.tokenizer, self.preset.dit.text_len)
        return self.text(ids.to(self.device), mask.to(self.device)).float()


def find_preset(name, ckpt=None, shift=None):
    """The preset of that name, its noise schedule's shift replaced where one is given.

    UserError where there is none, or where its weights neither ship nor are given.
    """
    if name not in CONFIGS:
        raise UserError(f"--model {name}: unknown preset; choose from {', '.join(CONFIGS)}")
    if not ckpt and not CONFIGS[name].shipped:
        raise UserError(f"--model {name} needs --ckpt DIR, a folder with {DOWNLOAD[name]}")
    return replace(CONFIGS[name], shift=shift) if shift else CONFIGS[name]


# ---------------------------------------------------------------------------------------------------------------
# The face encoder's released file


def iresnet_from_onnx(path):
    """The state dict of an IResNet in an InsightFace .onnx, by walking its graph node by node.

    There a batch-norm after a convolution is folded into the convolution's bias: it comes back as a batch-norm
    that only adds. A graph that normalises pixels of 0..255 itself (Sub, Mul: the older ones, from MXNet) has the
    factor folded into its first convolution. Raises UserError at the first node that an IResNet does not have there.
    """
    import onnx
    from onnx import helper, numpy_helper

    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:
        raise UserError(f"{path}: not a readable ONNX file ({type(error).__name__}); download it again") from None
    constants = {t.name: t for t in graph.initializer}
    for node in graph.node:  # weights may also stand in the graph as nodes
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    users, state = {}, {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def attribute(node, name, default):
        return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)

    entry = next(i for i in graph.input if i.name not in constants)
    size = [d.dim_value for d in entry.type.tensor_type.shape.dim][1:]
    kind = {(3, 192, 192): "a landmark model", (3, 96, 96): "an age and gender model"}.get(tuple(size))
    if len(graph.output) >= 5:
        kind = "a face detector"
    elif any(node.op_type == "Conv" and attribute(node, "group", 1) > 1 for node in graph.node):
        kind = kind or "a MobileFaceNet or its like (grouped convolutions)"
    if kind:
        raise UserError(f"{path}: {kind}, not an ArcFace IResNet")
    if size[0] != 3 or any(n not in (0, 112) for n in size[1:]):
        raise UserError(f"{path}: takes {size}, an ArcFace IResNet takes [3, 112, 112]")

    def weight(name):
        if name not in constants:
            raise UserError(f"{path}: not an ArcFace IResNet: {name!r} is computed, weights are constants")
        return torch.from_numpy(numpy_helper.to_array(constants[name]).copy()).float()

    def after(name):
        """The nodes that use a tensor; those that do nothing are stepped over."""
        found = []
        for node in users.get(name, []):
            found += after(node.output[0]) if node.op_type in ("Identity", "Dropout", "Cast") else [node]
        return found

    def take(name, kind):
        """The one node of a kind that uses a tensor."""
        found = [n for n in after(name) if n.op_type == kind]
        if len(found) != 1:
            kinds = ", ".join(n.op_type for n in after(name)) or "nothing"
            raise UserError(f"{path}: not an ArcFace IResNet: {kind} expected after {name!r}, there is {kinds}")
        return found[0]

    def put_norm(node, key):
        gain, bias, mean, var = (weight(n) for n in node.input[1:5])
        eps = attribute(node, "epsilon", 1e-5)
        state.update({f"{key}.weight": gain, f"{key}.bias": bias, f"{key}.running_mean": mean,
                      f"{key}.running_var": var + eps - 1e-5})  # fmt: skip

    def norm_of(conv):
        """The batch-norm after a convolution, None where it is folded; and the tensor that the two give."""
        norm = next((n for n in after(conv.output[0]) if n.op_type == "BatchNormalization"), None)
        return norm, (norm or conv).output[0]

    def put_conv(conv, key, norm_key):
        """A convolution and its batch-norm, folded or not."""
        kernel = state[f"{key}.weight"] = weight(conv.input[1])
        norm, _ = norm_of(conv)
        if norm:
            return put_norm(norm, norm_key)
        zeros = torch.zeros(len(kernel))
        state.update({f"{norm_key}.weight": zeros + 1, f"{norm_key}.running_mean": zeros,
                      f"{norm_key}.running_var": zeros + 1 - 1e-5,
                      f"{norm_key}.bias": weight(conv.input[2]) if len(conv.input) > 2 else zeros})  # fmt: skip

    x, pixel = entry.name, 1.0
    if any(n.op_type == "Sub" for n in after(x)):
        minus = take(x, "Sub")
        times = take(minus.output[0], "Mul")
        if weight(minus.input[1]).unique().tolist() != [127.5] or weight(times.input[1]).numel() != 1:
            raise UserError(f"{path}: does not normalise its input by (x - 127.5) times one number")
        x, pixel = times.output[0], 127.5 * weight(times.input[1]).item()
    stem = take(x, "Conv")
    put_conv(stem, "conv1", "bn1")
    state["conv1.weight"] *= pixel
    prelu = take(norm_of(stem)[1], "PRelu")
    state["prelu.weight"] = weight(prelu.input[1]).flatten()
    x, stage, block = prelu.output[0], 0, 0
    norm = take(x, "BatchNormalization")
    while any(n.op_type == "Conv" for n in after(norm.output[0])):
        first = take(norm.output[0], "Conv")
        prelu = take(norm_of(first)[1], "PRelu")
        second = take(prelu.output[0], "Conv")
        stage, block = (stage + 1, 0) if attribute(second, "strides", [1, 1])[0] == 2 else (stage, block + 1)
        key = f"layer{stage}.{block}"
        put_norm(norm, f"{key}.bn1")
        put_conv(first, f"{key}.conv1", f"{key}.bn2")
        state[f"{key}.prelu.weight"] = weight(prelu.input[1]).flatten()
        put_conv(second, f"{key}.conv2", f"{key}.bn3")
        joined = take(norm_of(second)[1], "Add")
        end = x  # of the shortcut: x itself, or x convolved
        for shortcut in (n for n in after(x) if n.op_type == "Conv"):
            put_conv(shortcut, f"{key}.downsample.0", f"{key}.downsample.1")
            end = norm_of(shortcut)[1]
        if not any(n is joined for n in after(end)):
            raise UserError(f"{path}: not an ArcFace IResNet: {key}'s shortcut does not end in its sum")
        x = joined.output[0]
        norm = take(x, "BatchNormalization")
    put_norm(norm, "bn2")
    flat = next((n for n in after(norm.output[0]) if n.op_type in ("Flatten", "Reshape")), norm)
    gemm = take(flat.output[0], "Gemm")
    kernel = weight(gemm.input[1])
    state["fc.weight"] = kernel if attribute(gemm, "transB", 0) else kernel.T.contiguous()
    state["fc.bias"] = weight(gemm.input[2]) if len(gemm.input) > 2 else torch.zeros(len(state["fc.weight"]))
    put_norm(take(gemm.output[0], "BatchNormalization"), "features")
    return state
