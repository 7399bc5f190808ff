"""From every clip's figures to tables, intervals and pages: statistics over people, report.html, the user study.

People are what is drawn from a population: clips and seeds are repeats of a person. A mean is the mean over people of
each person's mean; models are compared clip by clip, since they sample from the same picture, prompt and noise.

A page is a template of templates/ with its data, JSON, in the place of `/*DATA*/`: one file that needs nothing else and
can be sent to a colleague. The script in the template draws it.
"""

import base64
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import scipy.stats
from PIL import Image, ImageDraw, ImageFont

from cli import UserError, whole_file, write_text
from sample import read_video, write_video

# ---------------------------------------------------------------------------------------------------------------
# Statistics over people


def interval(values, statistic=lambda mean: mean, draws=2000):
    """A statistic of the mean of n people's values [n] or [n, k], with its 95 % bootstrap interval: (it, low, high).

    The percentile interval is too short for few people; its level is widened until it is the t interval where the mean
    is normal (Hesterberg 2015, arXiv 1411.5279). One person has no interval: (it, None, None).
    """
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return float(statistic(values.mean(0))), None, None
    chosen = np.random.default_rng(0).integers(n, size=(draws, n))
    drawn = statistic(values[chosen].mean(1))
    tail = scipy.stats.norm.cdf(np.sqrt(n / (n - 1)) * scipy.stats.t.ppf(0.025, n - 1))
    low, high = np.quantile(drawn[np.isfinite(drawn)], [tail, 1 - tail])
    return float(statistic(values.mean(0))), float(low), float(high)


def by_person(pairs):
    """(person, value) pairs, a value a number or several, to each person's mean; what is None is left out."""
    values = {}
    for person, value in pairs:
        if value is not None:
            values.setdefault(person, []).append(value)
    return {person: np.mean(v, 0) for person, v in values.items()}


def mean_of(rows, metric):
    """A metric's mean over people, as a dict of mean, low, high and people; None where no row has it."""
    values = list(by_person((row["person"], row.get(metric)) for row in rows).values())
    if not values:
        return None
    return dict(zip(("mean", "low", "high"), interval(values)), people=len(values))


def difference(base, tuned, metric):
    """A metric's difference, tuned - base, over the clips and seeds that both have it for; None where there are none.

    A dict of difference, low, high, people, improved (the people whose value rises), and ratio, ratio_low, ratio_high:
    the tuned mean over the base's.
    """
    before = {(row["clip"], row["seed"]): row.get(metric) for row in base}
    pairs = [(row["person"], (row[metric], before[row["clip"], row["seed"]])) for row in tuned
             if row.get(metric) is not None and before.get((row["clip"], row["seed"])) is not None]  # fmt: skip
    if not pairs:
        return None
    values = np.array(list(by_person(pairs).values()))  # [people, 2]
    gain = values[:, 0] - values[:, 1]
    result = dict(zip(("difference", "low", "high"), interval(gain)), people=len(gain), improved=int((gain > 0).sum()))
    if values[:, 1].mean() > 0:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = interval(values, lambda mean: mean[..., 0] / mean[..., 1])
        result |= dict(zip(("ratio", "ratio_low", "ratio_high"), ratio))
    return result


# ---------------------------------------------------------------------------------------------------------------
# Tables

CONTROLS = dict(true="true clip", vae="VAE", still="frame 0 repeated")
SIZES = ((0, 32), (32, 64), (64, 100), (100, None))  # px, the longer side of the face in the input picture

# metric: (title, digits, factor); first what the paper's Table 1 shows
TABLE_1 = dict(facesim_from_1=("FaceSim", 3, 1), sc=("SC", 2, 100), bc=("BC", 2, 100), aq=("AQ", 2, 100),
               iq=("IQ", 2, 100), tf=("TF", 2, 100), dd=("DD", 2, 100), ms=("MS", 2, 100))  # fmt: skip
FACES = dict(facesim_from_1=("FaceSim", 3, 1), facesim=("with frame 0", 3, 1), facesim_zero=("faceless = 0", 3, 1),
             faceless=("faceless %", 1, 100), judge=("judge's", 3, 1), opens2v=("OpenS2V's", 3, 1),
             hacked=("hacked %", 1, 100), unclear=("unclear %", 1, 100))  # fmt: skip
MOTION = dict(motion=("motion", 4, 1), yaw_range=("yaw range °", 1, 1), mouth_width=("mouth width", 4, 1),
              mouth_opening=("mouth opens", 4, 1), eye_opening=("eyes open", 4, 1))  # fmt: skip
METRICS = TABLE_1 | FACES | MOTION
BETTER = {m: 1 for m in METRICS if m not in (*MOTION, "dd", "unclear")} | dict(faceless=-1, hacked=-1)
TRAINING = dict(facesim=("FaceSim", 3, 1), facesim_from_1=("from 1 on", 3, 1), judge=("judge's", 3, 1),
                face_rate=("face rate", 3, 1), motion=("motion", 4, 1), tf=("TF", 4, 1))  # fmt: skip


def table(rows, columns=TRAINING):
    """Rows of (name, means by metric) as text; columns: {metric: (title, digits, factor)}. A dash where there is no
    mean; a column that no row has is left out."""
    shown = {metric: column for metric, column in columns.items() if any(metric in means for _, means in rows)}
    wide = max(12, *(len(name) + 2 for name, _ in rows))
    lines = [" " * wide + "".join(title.rjust(max(11, len(title) + 2)) for title, _, _ in shown.values())]
    for name, means in rows:
        cells = []
        for metric, (title, digits, factor) in shown.items():
            value = "-" if means.get(metric) is None else f"{factor * means[metric]:.{digits}f}"
            cells.append(value.rjust(max(11, len(title) + 2)))
        lines.append(name.ljust(wide) + "".join(cells))
    return "\n".join(lines)


def summarise(rows, tuned):
    """The statistics of all clips' metrics, rows of dicts of version, clip, person, seed and metrics.

    Returns {version: dict of means, over_time, by_size, frozen}, each mean as `mean_of` gives it, and {tuned model:
    {metric: `difference` to the base}}. A version is frozen that moves less than half as much as the base: its FaceSim
    was bought with that.
    """
    by_version = {}
    for row in rows:
        by_version.setdefault(row["version"], []).append(row)
    versions, base = {}, by_version["base"]
    least = mean_of(base, "motion")
    for version, own in by_version.items():
        means = {metric: mean for metric in METRICS if (mean := mean_of(own, metric))}
        over_time = [mean_of([row | dict(cosine=row["over_time"][i]) for row in own], "cosine")
                     for i in range(min(len(row["over_time"]) for row in own))]  # fmt: skip
        by_size = {f"{low} to {high} px" if high else f"{low} px up":
                   mean_of([row for row in own if low <= row["face_size"] < (high or np.inf)], "facesim_from_1")
                   for low, high in SIZES}  # fmt: skip
        frozen = bool(least) and ("motion" not in means or means["motion"]["mean"] < 0.5 * least["mean"])
        versions[version] = dict(means=means, over_time=over_time, by_size=by_size, frozen=frozen)
    differences = {name: {metric: d for metric in METRICS if (d := difference(base, by_version[name], metric))}
                   for name in tuned}  # fmt: skip
    return versions, differences


def terminal_tables(results):
    """What the terminal shows of results.json's content."""
    parts = []
    for heading, columns in (("As in the paper's Table 1 (VBench's columns times 100; - is not computed)", TABLE_1),
                             ("Faces", FACES), ("Motion and expression", MOTION)):  # fmt: skip
        rows = []
        for name, version in results["versions"].items():
            means = {metric: version["means"][metric]["mean"] for metric in columns if metric in version["means"]}
            rows.append((CONTROLS.get(name, name), dict.fromkeys(columns if columns is TABLE_1 else ()) | means))
        parts.append(f"{heading}\n{table(rows, columns)}")
    for name, differences in results["differences"].items():
        lines = [f"{name} - base, with 95 % intervals over {results['people']} people"]
        for metric, d in differences.items():
            title, digits, factor = METRICS[metric]
            change, low, high = (None if d[k] is None else f"{d[k] * factor:+.{digits}f}"
                                 for k in ("difference", "low", "high"))  # fmt: skip
            bounds = "" if low is None else f"[{low}, {high}]"
            kept = f", {d['ratio']:.0%} of the base's" if metric in MOTION and "ratio" in d else ""
            lines.append(f"{title:14}{change:>9}  {bounds:22}up for {d['improved']} of {d['people']}{kept}")
        parts.append("\n".join(lines))
    if results["missing"]:
        lines = [f"  {column}  {command}" for column, command in results["missing"].items()]
        parts.append("Not computed; what fetches their networks, for --vbench_weights DIR:\n" + "\n".join(lines))
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------
# Pages

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


def write_page(template, data, path):
    """Write a page: templates/<template> with data, as JSON, in it."""
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")  # no data may end the script that it is in
    page = (TEMPLATES / template).read_text(encoding="utf-8").replace("/*DATA*/", text)
    write_text(path, page)


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


def write_report(results, out):
    """Write out/report.html, and out/over_time.webp: two people over time, a row a version."""
    cases, strips = [], []
    for clip, gain in shown_cases(results):
        rows = [row for row in results["clips"] if row["clip"] == clip and row["seed"] == 0]
        videos, rates = zip(*(read_video(out / "clips" / row["file"]) for row in rows))
        about = {row["version"]: row.get("facesim_from_1") for row in rows}
        video = small_video(videos, rates[0])
        cases.append(dict(prompt=rows[0]["prompt"], clip=clip, gain=gain, facesim=about, video=video))
        strips.append([(row["version"], v) for row, v in zip(rows, videos) if row["version"] != "still"])
        strips = [strips[0], strips[-1]] if len(strips) > 1 else strips  # the frames of no more than these stay
    if strips:
        picture = over_time([pair for strip in strips for pair in strip])
        with whole_file(out / "over_time.webp") as part:
            picture.save(part, "WEBP", quality=90)
    shown = {name: value for name, value in results.items() if name != "clips"} | dict(cases=cases)
    tables = dict(table_1=TABLE_1, faces=FACES, motion=MOTION, columns=METRICS, better=BETTER, controls=CONTROLS)
    write_page("report.html", shown | tables, out / "report.html")


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


def write_study(results, out, count):
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
            clips = [small_video([frames], fps) for frames, fps in
                     (read_video(out / "clips" / rows[version]["file"]) for version in order)]  # fmt: skip
            picture = base64.b64encode((out / rows["base"]["picture"]).read_bytes()).decode()
            pairs.append(dict(picture="data:image/png;base64," + picture, prompt=rows["base"]["prompt"], clips=clips))
            key.append(dict(clip=both[i], tuned=tuned, order=order))
    study = hashlib.sha256(json.dumps([pairs, key]).encode()).hexdigest()[:12]  # votes of another do not count
    write_page("study.html", dict(study=study, questions=QUESTIONS, pairs=pairs), out / "study.html")
    write_text(out / "study_key.json", json.dumps(dict(study=study, pairs=key), indent=1))


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


def tally(votes, out):
    """Print and draw the votes of a user study: the paper's Figure 8, with 95 % intervals over voters.

    votes: the voters' files, comma-separated, or a folder of them; out: the evaluation's folder, with the study's key.
    Writes out/user_study.png.
    """
    try:
        key = json.loads((out / "study_key.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"--out {out}: no study_key.json in it; --study N writes one beside the page") from None
    files = sorted(Path(votes).glob("*.json")) if Path(votes).is_dir() else votes.split(",")
    rows = read_votes(files, key)
    if not rows:
        raise UserError(f"--tally {votes}: no votes in it")
    shares = {}
    for tuned in dict.fromkeys(row["tuned"] for row in rows):
        print(f"{tuned} against base: shares of the votes, 95 % intervals over voters")
        for question, text in QUESTIONS.items():
            own = [row for row in rows if (row["tuned"], row["question"]) == (tuned, question)]
            share = shares.setdefault(tuned, {})[question] = {}
            for choice, value in (("tuned", 1), ("neither", 0), ("base", -1)):
                people = by_person((row["voter"], float(row["vote"] == value)) for row in own)
                share[choice] = interval(list(people.values())) if people else (0.0, None, None)
            shown = [f"{choice} {s:.0%}" + ("" if low is None else f" [{low:.0%}, {high:.0%}]")
                     for choice, (s, low, high) in share.items()]  # fmt: skip
            print(f"  {text}\n    {', '.join(shown)}: {len(own)} votes of {len({row['voter'] for row in own})} voters")
    draw_votes(shares, out / "user_study.png")
    print(out / "user_study.png")
