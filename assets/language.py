"""The tiny world's text encoder: a byte-level tokenizer and a small UMT5, taught by masked tokens. Stage `text`.

A caption's tokens are hidden at random and the encoder, with its own token table as output layer, names them. What
it must learn for that is what the DiT needs to read: which words describe the person and which the motion.
"""

import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import CONFIGS, UMT5, tokenize
from weights import write_safetensors

STEPS, BATCH, PEAK, HIDDEN = 1500, 64, 1e-3, 0.25
MASK = 2  # id of <extra_id_0>


def train_tokenizer(captions, path):
    """Byte-level BPE, so that any prompt has tokens; ends a prompt with </s> as UMT5's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIGS["tiny"].text.vocab_size, special_tokens=["<pad>", "</s>", "<extra_id_0>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(path))
    return tokenizer


def train(work, out, threads=2):
    """Write out/tokenizer.json and out/text.safetensors; resumes from work/text/state.pt."""
    torch.set_num_threads(threads)
    work, out = Path(work), Path(out)
    (work / "text").mkdir(parents=True, exist_ok=True)
    captions = [p.read_text().strip() for p in sorted((work / "clips/train").glob("*.txt"))]
    tokenizer = train_tokenizer(captions, out / "tokenizer.json")
    ids, mask = tokenize(captions, tokenizer, CONFIGS["tiny"].dit.text_len)
    torch.manual_seed(0)
    model = UMT5(CONFIGS["tiny"].text)
    model.token_embedding.weight.data.mul_(0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.01)
    start, state = 0, work / "text/state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    bar = tqdm(range(start, STEPS), initial=start, total=STEPS, desc="text", mininterval=5)
    for step in bar:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(ids), (BATCH,), generator=generator)
        x, m = ids[rows], mask[rows]
        hide = (torch.rand(x.shape, generator=generator) < HIDDEN) & (m > 0) & (x != 1)
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        y = model(torch.where(hide, MASK, x), m)
        logits = y[hide] @ model.token_embedding.weight.T
        loss = F.cross_entropy(logits, x[hide])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(
                loss=f"{float(loss):.2f}", right=f"{float((logits.argmax(1) == x[hide]).float().mean()):.2f}"
            )
        if (step + 1) % 500 == 0:
            torch.save(
                dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1),
                f"{state}.part",
            )
            os.replace(f"{state}.part", state)
            with open(work / "text/log.jsonl", "a") as log:
                print(json.dumps(dict(step=step + 1, loss=float(loss))), file=log)
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    write_safetensors(weights, out / "text.safetensors")


if __name__ == "__main__":
    train(Path(__file__).parent / "build", Path(__file__).parent)
