"""The terminal's side of every program here: options, mistakes, the folder --out, and torchrun's processes.

A program's options are the fields of one dataclass. A field says its type, default, unit, bounds and choices in one
place, `option`, from which --help, the parser and the checks follow. What a person can mend is a `UserError`: one
line on the terminal and exit status 2.
"""

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import re
import socket
import sys
import time
import types
import typing
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError


class UserError(Exception):
    """A mistake that the person at the terminal can mend; the programs print its one line and exit with 2."""


def option(default, text, least=None, most=None, choices=None, **about):
    """A dataclass field that is an option: its default, its line in --help, its smallest and largest value.

    choices: the values allowed, of which --help leaves "" out. about: what else a program wants to know of it,
    kept in the field's metadata.
    """
    metadata = dict(text=text, least=least, most=most, choices=choices, about=about)
    return dataclasses.field(default=default, metadata=metadata)


def kind_of(field):
    """The type of an option's value: of `int | None`, int."""
    if isinstance(field.type, types.UnionType):
        return next(t for t in typing.get_args(field.type) if t is not type(None))
    return field.type


def check_value(field, value):
    """UserError where a value is not finite, out of the option's bounds, or none of its choices."""
    least, most, choices = (field.metadata[k] for k in ("least", "most", "choices"))
    name = f"--{field.name} {value}"
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}: must be a finite number")
    if least is not None and value is not None and value < least:
        raise UserError(f"{name}: at least {least}")
    if most is not None and value is not None and value > most:
        raise UserError(f"{name}: at most {most}")
    if choices and value not in choices:
        raise UserError(f"{name}: choose from {', '.join(filter(None, choices))}")


def pixels(text):
    """'HxW' to (height, width)."""
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW in pixels, as in 480x832") from None
    return height, width


def given_options(cls, argv=None, doc=None, positional=()):
    """What the command line gives of the dataclass `cls`, checked, as a dict. UserError for anything else in it."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip

    def refuse(message):
        raise UserError(f"{message} (see --help)")

    parser.error = refuse
    for field in dataclasses.fields(cls):
        kind, text, choices = kind_of(field), field.metadata["text"], field.metadata["choices"]
        if choices:
            text += f": {', '.join(filter(None, choices))}"
        if field.default not in (None, ""):
            others = (f"; {name}: {v}" for name, v in field.metadata["about"].items() if name != "resumable")
            text += f" (default: {field.default}{''.join(others)})"
        text = text.replace("%", "%%")
        if field.name in positional:
            parser.add_argument(field.name, type=kind, help=text)
        elif kind is bool:
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = pixels if typing.get_origin(kind) is tuple else kind
            parser.add_argument(f"--{field.name}", type=kind, help=text)
    given = vars(parser.parse_args(argv))
    for field in dataclasses.fields(cls):
        if field.name in given:
            check_value(field, given[field.name])
    return given


def parse_options(cls, argv=None, doc=None, positional=()):
    """The dataclass `cls` with what the command line gives, and its defaults."""
    return cls(**given_options(cls, argv, doc, positional))


# Errors of the operating system that a person can mend, by making room or otherwise
FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
MENDABLE = *FULL, errno.EROFS, errno.EACCES, errno.EPERM


def run(main):
    """Run a program; a user's mistake is one line on the terminal and exit status 2, Ctrl-C one line and 130."""
    program = Path(sys.argv[0]).name
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            if error.errno not in MENDABLE:
                raise
            remedy = "make room" if error.errno in FULL else "mend that"
            error = f"{error.filename or 'a file'}: {error.strerror}; {remedy} and start it again"
        line = f"{program}: {error}"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(line, file=sys.stderr)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what torchrun's own report gives as the cause
            Path(report).write_text(json.dumps(dict(message=line)))
        sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------
# The folder --out, and what a program writes in it: complete or absent


def check_can_be_made(folder):
    """UserError where --out, a folder that may not exist yet, is a file or lies where this user cannot write."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--out {folder}: nothing can be written to {place}; name another folder")


def is_empty(folder):
    """Holds a folder, which may not exist yet, nothing but what a run killed at its very start leaves?"""
    return not folder.exists() or all(path.name == "lock" or ".part" in path.suffix for path in folder.iterdir())


def lock_folder(folder):
    """Make --out; returns its lock, a file that this process has open until it ends, however it ends.

    UserError where another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise UserError(f"--out {folder}: process {lock.read()} is at work in it; name another folder") from None
    except OSError:  # a file system without locks
        return lock
    lock.truncate(0)
    print(f"{os.getpid()} on {socket.gethostname()}", end="", file=lock, flush=True)
    return lock


@contextlib.contextmanager
def whole_file(path):
    """Yield a path beside `path` to write to, which takes its place when all is written; a fault leaves neither.

    OSError, which names `path`, where it cannot be written, as on a full disk.
    """
    path, rank = Path(path), rank_and_ranks()[0]  # ranks may write the same file at once
    part = path.with_name(f"{path.name}.part{rank or ''}")
    try:
        yield part
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        code = error.errno if isinstance(error, OSError) else None
        if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
            code = int(found[1])  # which it tells in its text only
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from None


def write_text(path, text):
    """Write a text file that is complete or absent at any moment."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")


def read_options(folder):
    """What options.json in --out says, as a dict; None where there is none. UserError where it cannot be read."""
    path = folder / "options.json"
    try:
        return dict(json.loads(path.read_text())) if path.exists() else None
    except (OSError, ValueError, TypeError) as error:  # no JSON; no object
        raise UserError(f"{path}: not readable ({error}); start again with another --out") from None


# ---------------------------------------------------------------------------------------------------------------
# Ranks: one process, or those that torchrun starts


def this_device():
    """The device of this process, which torch takes as the current one from here on: its own GPU, or the CPU."""
    # Segments that grow leave less of a GPU unusable: one step of wan5b had 18.6 GB of live tensors in 29.5 without.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def start_ranks(timeout=None):
    """(rank, ranks, device) of this process; it joins the group of torchrun's processes if it is one of them.

    timeout: the longest time that one may wait for the others, a timedelta; None for torch's.
    """
    device = this_device()
    if "RANK" not in os.environ:
        return 0, 1, device
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    return dist.get_rank(), dist.get_world_size(), device


def leave_ranks():
    """Leave the group, with a moment for gloo's threads to free the last collective's tensors.

    They need the interpreter's lock for it; where it ends first, torch 2.13 aborts the process (one run in twenty).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.5)


def rank_and_ranks():
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(rows, everywhere=True):
    """All ranks' lists as one, in rank order, on every rank; everywhere=False: on rank 0, elsewhere an empty one."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    if everywhere:
        dist.all_gather_object(parts, rows)
    elif dist.get_rank() == 0:
        dist.gather_object(rows, parts)
    else:
        dist.gather_object(rows)
        return []
    return [row for part in parts for row in part]
