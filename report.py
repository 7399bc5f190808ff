"""The pages that eval.py writes: report.html, the user study's page, and the figure of its votes.

A page is a template of templates/ with its data, JSON, in the place of `/*DATA*/`: one file that needs nothing else and
can be sent to a colleague. The script in the template draws it.
"""

import base64
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cli import UserError
from sample import read_video, write_video

TEMPLATES = Path(__file__).parent / "templates"
CASES = 6  # worst, and as many best, clips that the report shows
HEIGHT = 240  # px, most of a clip in a page

# question of the user study: what is asked of the two clips (the paper asks four; the words are ours)
QUESTIONS = dict(
    identity="In which clip does the person stay the same person as in the picture?",
    motion="In which clip do face and body move more naturally?",
    quality="Which clip looks better: sharper, steadier, with fewer faults?",
    overall="Which clip would you keep?",
)


def fill(template, data, path):
    """Write a page: templates/<template> with data, as JSON, in it."""
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")  # no data may end the script that it is in
    page = (TEMPLATES / template).read_text(encoding="utf-8").replace("/*DATA*/", text)
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)


def small_video(clips, fps):
    """Clips uint8 [F, H, W, 3] of one shape, side by side and small, as the data URI of an mp4."""
    frames = np.concatenate(clips, 2)
    scale = min(1, HEIGHT / frames.shape[1])
    size = [max(2, round(n * scale / 2) * 2) for n in (frames.shape[2], frames.shape[1])]  # even: H.264 wants it
    frames = np.stack([np.asarray(Image.fromarray(f).resize(size, Image.LANCZOS)) for f in frames])
    with tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder) / "clip.mp4", frames, fps, crf=23)
        return "data:video/mp4;base64," + base64.b64encode((Path(folder) / "clip.mp4").read_bytes()).decode()


def shown_cases(results, metric="facesim_from_1"):
    """The clips to show, worst first: (clip, gain of the first tuned model over the base), CASES from each end."""
    values = {}
    for row in results["clips"]:
        if row["seed"] == 0 and row.get(metric) is not None:
            values.setdefault(row["clip"], {})[row["version"]] = row[metric]
    tuned = next(iter(results["differences"]), None)
    gains = {c: v[tuned] - v["base"] for c, v in values.items() if "base" in v and tuned in v}
    order = sorted(gains, key=gains.get)
    return [(clip, gains[clip]) for clip in dict.fromkeys(order[:CASES] + order[-CASES:])]


def write_report(results, out, fps):
    """Write out/report.html, and out/over_time.webp: two people over time, a row a version."""
    cases = []
    for clip, gain in shown_cases(results):
        rows = [row for row in results["clips"] if row["clip"] == clip and row["seed"] == 0]
        videos = [read_video(out / "clips" / row["file"])[0] for row in rows]
        about = {row["version"]: row.get("facesim_from_1") for row in rows}
        cases.append(dict(prompt=rows[0]["prompt"], clip=clip, gain=gain, facesim=about, video=small_video(videos, fps)))
        if clip in (shown_cases(results)[0][0], shown_cases(results)[-1][0]):
            cases[-1]["frames"] = [(row["version"], v) for row, v in zip(rows, videos) if row["version"] != "still"]
    strips = [case.pop("frames") for case in cases if "frames" in case]
    if strips:
        over_time([pair for strip in strips for pair in strip]).save(out / "over_time.webp", quality=90)
    fill("report.html", {k: v for k, v in results.items() if k != "clips"} | dict(cases=cases), out / "report.html")


def over_time(clips, count=9):
    """A picture of clips over time, a named row each: (name, uint8 [F, H, W, 3]) pairs to a PIL image."""
    _, height, width, _ = clips[0][1].shape
    band = 24 + width // 4  # left of the rows, for their names
    picture = Image.new("RGB", (band + count * width, len(clips) * height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for k, (name, frames) in enumerate(clips):
        chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
        picture.paste(Image.fromarray(np.concatenate(frames[chosen], 1)), (band, k * height))
        draw.text((band - 6, (k + 0.5) * height), name, "black", font, anchor="rm")
    return picture


# ---------------------------------------------------------------------------------------------------------------
# The user study: base against tuned, blind


def write_study(results, out, fps, count):
    """Write out/study.html, `count` clips of each tuned model against the base, and out/study_key.json.

    The page does not say which clip is whose: the key, which stays here, does. The page mixes order and sides anew for
    every voter.
    """
    by_clip = {}
    for row in results["clips"]:
        if row["seed"] == 0:
            by_clip.setdefault(row["clip"], {})[row["version"]] = row
    pairs, key, rng = [], [], np.random.default_rng(0)
    for tuned in results["differences"]:
        both = [clip for clip, rows in by_clip.items() if "base" in rows and tuned in rows]
        for i in np.linspace(0, len(both) - 1, min(count, len(both))).round().astype(int):
            rows, order = by_clip[both[i]], rng.permutation(["base", tuned]).tolist()
            clips = [small_video([read_video(out / "clips" / rows[version]["file"])[0]], fps) for version in order]
            picture = base64.b64encode((out / rows["base"]["picture"]).read_bytes()).decode()
            pairs.append(dict(picture="data:image/png;base64," + picture, prompt=rows["base"]["prompt"], clips=clips))
            key.append(dict(clip=both[i], tuned=tuned, order=order))
    study = f"{rng.integers(2**32):08x}-{len(pairs)}"
    fill("study.html", dict(study=study, questions=QUESTIONS, pairs=pairs), out / "study.html")
    (out / "study_key.json").write_text(json.dumps(dict(study=study, pairs=key), indent=1))


def read_votes(files, key):
    """Vote files of a study to rows of voter, tuned, question and vote: 1 for the tuned clip, -1 for the base's, 0 for
    neither. UserError for a file that is none of this study's."""
    rows = []
    for file in files:
        try:
            votes = json.loads(Path(file).read_text())
            if votes["study"] != key["study"]:
                raise UserError(f"{file}: votes of another study ({votes['study']}, not {key['study']})")
            for vote in votes["votes"]:
                pair = key["pairs"][vote["pair"]]
                chosen = None if vote["choice"] is None else pair["order"][vote["choice"]]
                value = 0 if chosen is None else 1 if chosen == pair["tuned"] else -1
                if vote["question"] not in QUESTIONS:
                    raise ValueError(f"question {vote['question']!r}")
                rows.append(dict(voter=votes["voter"], tuned=pair["tuned"], question=vote["question"], vote=value))
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{file}: not a file of votes ({error})") from None
    return rows


def draw_votes(shares, path):
    """Shares of votes, {tuned model: {question: {tuned, neither, base: (share, low, high)}}}, as a picture of bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(shares), figsize=(6 * len(shares), 3), layout="constrained", squeeze=False)
    for axis, (name, questions) in zip(axes[0], shares.items()):
        left = np.zeros(len(questions))
        for choice, colour in (("tuned", "#2a6f97"), ("neither", "#d9d9d9"), ("base", "#c8793f")):
            share, low, high = np.array([[np.nan if x is None else x for x in q[choice]] for q in questions.values()]).T
            label = name if choice == "tuned" else choice
            axis.barh(list(questions), share, left=left, color=colour, label=label)
            if choice == "tuned":
                axis.errorbar(share, list(questions), xerr=[share - low, high - share], fmt="none", color="black")
            left += share
        axis.invert_yaxis()
        axis.set(xlim=(0, 1), xlabel="share of the votes")
        axis.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
