"""The terminal's side of every program here: options, mistakes, and the processes that torchrun starts.

A program's options are the fields of one dataclass. A field says its type, default, unit, bounds and choices in one
place, `option`, from which --help, the parser and the checks follow. What a person can mend is a `UserError`: one
line on the terminal, exit status 2, nothing written.
"""

import argparse
import dataclasses
import math
import os
import sys
import time
import types
import typing
from pathlib import Path

import torch
import torch.distributed as dist


class UserError(Exception):
    """A mistake that the person at the terminal can mend; the programs print its one line and exit with 2."""


def option(default, text, least=None, most=None, choices=None, **about):
    """A dataclass field that is an option: its default, its line in --help, its smallest and largest value.

    choices: the values allowed; "" is allowed without being offered. about: what else a program wants to know of it,
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


def check_can_be_made(folder):
    """UserError where --out, a folder that may not exist yet, is a file or lies where this user cannot write."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--out {folder}: nothing can be written to {place}; name another folder")


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
            text += f" (default: {field.default})"
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


def run(main):
    """Run a program; a user's mistake is one line on the terminal and exit status 2, Ctrl-C one line and 130."""
    program = Path(sys.argv[0]).name
    try:
        sys.exit(main())
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun's other processes here make the same mistake
            print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------
# Ranks: one process, or those that torchrun starts


def start_ranks():
    """(rank, ranks, device) of this process; it joins the group of torchrun's processes if it is one of them."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if "RANK" not in os.environ:
        return 0, 1, device
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
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
