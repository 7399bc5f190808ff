"""What data.py takes and finds, on films made here.

python tests/bench_data.py cuts      find_cuts on generated cuts, dissolves and fades, and PySceneDetect's detectors
                                     where there is one (pip install scenedetect opencv-python-headless)
python tests/bench_data.py speed     the tiny world's clips and a 720p film, with one worker and with two
python tests/bench_data.py memory    peak memory of a film of 30 seconds and of one of 10 minutes
python tests/bench_data.py kills     killed at 20 random moments and continued: the bytes of an unbroken run
"""

import hashlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
from PIL import Image

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from model import ASSETS  # noqa: E402
from sample import read_video  # noqa: E402
from video import survey  # noqa: E402

FPS = 16
PEOPLE = sorted((ASSETS / "clips/train").glob("*_0.mp4"))


def texture(rng, height, width, colour):
    """A picture with a random 1/f spectrum around a colour, and some rectangles."""
    spectrum = np.fft.rfft2(rng.normal(size=(height, width, 3)), axes=(0, 1))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None, None], np.fft.rfftfreq(width)[None, :, None])
    picture = np.fft.irfft2(spectrum / frequency.clip(1 / width) ** rng.uniform(1, 1.6), (height, width), (0, 1))
    picture = (picture - picture.mean((0, 1))) / picture.std((0, 1)) * rng.uniform(10, 50, 3) + colour
    for _ in range(rng.integers(12)):
        y, x = rng.integers(height), rng.integers(width)
        picture[y : y + rng.integers(10, 120), x : x + rng.integers(10, 120)] = rng.integers(0, 256, 3)
    return picture.clip(0, 255).astype(np.uint8)


def shot(rng, count, camera, colour, height=180, width=320):
    """Yield frames of a person who walks before a texture, under a still, panning, whipping or shaking camera."""
    ground = texture(rng, 2 * height, 2 * width, colour)
    person, _ = read_video(PEOPLE[rng.integers(len(PEOPLE))])
    speed = dict(still=0, shake=0, pan=rng.uniform(0.5, 3), whip=rng.uniform(10, 30))[camera] * height / 180
    place, way = rng.uniform(20, (height - 20, width - 20)), rng.uniform(0, 2 * np.pi)
    side = int(height * rng.uniform(0.33, 0.7))
    y, x, walk = rng.integers(height - side), rng.integers(width - side), rng.uniform(-2, 2) * height / 180
    for k in range(count):
        jitter = rng.normal(0, 3 if camera == "shake" else 0.2, 2)
        at = (place + speed * k * np.array([np.sin(way), np.cos(way)]) + jitter).clip(0, (height, width)).astype(int)
        frame = ground[at[0] : at[0] + height, at[1] : at[1] + width].copy()
        left, pose = int(np.clip(x + walk * k, 0, width - side)), min(k % 32, 32 - k % 32)
        frame[y : y + side, left : left + side] = np.asarray(Image.fromarray(person[pose]).resize((side, side)))
        if height < 200:  # a camera's noise; of 720p it would take too long
            frame = frame * (1 + rng.normal(0, 0.01)) + rng.normal(0, 2, frame.shape)
        yield frame.clip(0, 255).astype(np.uint8)


def film_of_shots(seed):
    """Eight shots, 0.4 of them in the colours of the one before, some with a flash; and what joins them.

    Returns uint8 [F, H, W, 3] and the transitions (kind, first frame that is not the old shot, first of the new)."""
    rng = np.random.default_rng(seed)
    frames, joins = None, []
    for _ in range(8):
        if frames is None or rng.random() < 0.6:
            colour = rng.uniform(40, 200, 3)
        count = int(rng.integers(34, 70))
        camera = rng.choice(["still", "pan", "shake", "whip"], p=[0.4, 0.3, 0.2, 0.1])
        new = np.stack(list(shot(rng, count, camera, colour)))
        if rng.random() < 0.15:
            k = rng.integers(5, count - 5)
            new[k : k + 2] = (new[k : k + 2].astype(int) + 120).clip(0, 255)
        if frames is None:
            frames = new
            continue
        kind, n = rng.choice(["cut", "dissolve", "fade"], p=[0.5, 0.4, 0.1]), int(rng.integers(4, 17))
        mix, end = np.linspace(0, 1, n + 2)[1:-1, None, None, None], len(frames)
        if kind == "cut":
            joins.append(("cut", end, end))
            frames = np.concatenate([frames, new])
        elif kind == "dissolve":
            joins.append(("dissolve", end - n, end))
            frames = np.concatenate([frames[:-n], frames[-n:] * (1 - mix) + new[:n] * mix, new[n:]]).astype(np.uint8)
        else:
            joins.append(("fade", end - n, end + n))
            frames = np.concatenate([frames[:-n], frames[-n:] * (1 - mix), new[:n] * mix, new[n:]]).astype(np.uint8)
    return frames, joins


def write(path, frames, height, width, fps=FPS, **options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return path


def cuts(folder, count=24):
    ways = {"find_cuts": lambda path: joins_of(survey(path, FPS)[0])}
    try:
        import scenedetect
    except ImportError:
        print("PySceneDetect is not installed: pip install scenedetect opencv-python-headless")
    else:

        def library(detector):
            return lambda path: [(s[0].frame_num,) * 2 for s in scenedetect.detect(str(path), detector())[1:]]

        ways |= {name: library(lambda name=name: getattr(scenedetect, name)(min_scene_len=4))
                 for name in ("ContentDetector", "AdaptiveDetector", "HistogramDetector", "HashDetector")}  # fmt: skip
    found, false, seconds, total, mixed = {name: Counter() for name in ways}, Counter(), Counter(), Counter(), Counter()
    for seed in range(count):
        frames, joins = film_of_shots(seed)
        path = write(folder / "film.mp4", frames, *frames.shape[1:3], crf="20", preset="veryfast")
        total += Counter(kind for kind, *_ in joins)
        for name, find in ways.items():
            began = time.process_time()
            said = find(path)
            seconds[name] += time.process_time() - began
            hits = set()
            for kind, a, b in joins:
                slack = 1 if kind == "cut" else 4
                hit = {i for i, (p, q) in enumerate(said) if p <= b + slack and q >= a - slack}
                found[name][kind] += bool(hit)
                hits |= hit
                if kind == "dissolve" and hit:  # its frames that are left in a shot, but for the outermost quarters
                    p, q = min(said[i][0] for i in hit), max(said[i][1] for i in hit)
                    inner = range(a + (b - a) // 4, b - (b - a) // 4)
                    mixed[name] += sum(not p <= k < q for k in inner)
            false[name] += len(said) - len(hits)
    print(f"| {count} films | cuts | dissolves | fades | false | frames of dissolves left in shots | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for name in ways:
        of = " | ".join(f"{found[name][kind]} of {total[kind]}" for kind in ("cut", "dissolve", "fade"))
        print(f"| {name} | {of} | {false[name]} | {mixed[name]} | {seconds[name]:.1f} |")


def joins_of(shots):
    """The transitions between shots (start, end): the end of one and the start of the next."""
    return [(a[1], b[0]) for a, b in itertools.pairwise(shots)]


def film_720p(path, seconds, fps=24):
    """A 720p film, a cut every ten seconds."""
    rng = np.random.default_rng(0)
    frames = (f for _ in range(seconds // 10) for f in shot(rng, 10 * fps, "pan", rng.uniform(40, 200, 3), 720, 1280))
    write(path, frames, 720, 1280, fps, crf="23", preset="ultrafast")
    path.with_suffix(".txt").write_text("a man nods")


def repeat(source, path, times):
    """A film over and over, its packets copied."""
    with av.open(str(path), "w") as out:
        for k in range(times):
            with av.open(str(source)) as container:
                if k == 0:
                    stream = out.add_stream_from_template(container.streams.video[0])
                length = container.streams.video[0].duration
                for packet in container.demux(video=0):
                    if packet.dts is not None:
                        packet.pts, packet.dts = packet.pts + k * length, packet.dts + k * length
                        packet.stream = stream
                        out.mux(packet)
    path.with_suffix(".txt").write_text("a man nods")


def run(*arguments):
    """data.py: what it printed, its seconds, those of CPUs, and its peak memory in MB (without workers)."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, REPO / "data.py", *map(str, arguments)], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"data.py {arguments} failed")
    return said, time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def speed(folder):
    (folder / "tiny").mkdir()
    for path in PEOPLE[:24]:
        shutil.copy(path, folder / "tiny")
        shutil.copy(path.with_suffix(".txt"), folder / "tiny")
    (folder / "films").mkdir()
    film_720p(folder / "films/0.mp4", 20)
    for k in (1, 2, 3):
        shutil.copy(folder / "films/0.mp4", folder / f"films/{k}.mp4")
        shutil.copy(folder / "films/0.txt", folder / f"films/{k}.txt")
    for name in ("tiny", "films"):
        for workers in (1, 2):
            said, seconds, used, _ = run(folder / name, "--out", folder / f"{name}{workers}", "--workers", workers,
                                         "--spans", "chunk", "--max_face", 960)  # fmt: skip
            print(f"{name}, --workers {workers}: {seconds:.1f} s, {used:.1f} CPU s in all\n" + said, flush=True)


def memory(folder):
    film_720p(folder / "short.mp4", 30)
    repeat(folder / "short.mp4", folder / "long.mp4", 20)
    for name in ("short", "long"):
        (folder / name).mkdir()
        for suffix in (".mp4", ".txt"):
            (folder / f"{name}{suffix}").rename(folder / name / f"{name}{suffix}")
        said, seconds, used, peak = run(folder / name, "--out", folder / f"{name}_set", "--spans", "chunk",
                                        "--max_face", 960)  # fmt: skip
        print(f"{name}: peak {peak:.0f} MB in {seconds:.0f} s, {used:.0f} CPU s\n" + said, flush=True)


def kills(folder, count=20):
    (folder / "clips").mkdir()
    for k, path in enumerate(PEOPLE[:count]):
        frames, _ = read_video(path)
        write(folder / f"clips/{k}.mp4", np.tile(frames, (3, 1, 1, 1)), *frames.shape[1:3], 8, crf="14")
        (folder / f"clips/{k}.txt").write_text("a man nods")
    whole, killed = ([folder / "clips", "--out", folder / name, "--spans", "chunk"] for name in ("whole", "killed"))
    run(*whole)
    rng, moments = random.Random(0), []
    for _ in range(count):
        began = time.time()
        process = subprocess.Popen([sys.executable, REPO / "data.py", *map(str, killed)], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        before = list((folder / "killed").rglob("*.safetensors"))
        while process.poll() is None and len(list((folder / "killed").rglob("*.safetensors"))) <= len(before):
            time.sleep(0.02)  # the networks are being loaded
        time.sleep(rng.uniform(0, 0.8))
        process.send_signal(signal.SIGKILL)
        process.wait()
        moments.append(round(time.time() - began, 2))
    run(*killed)

    def digest(name):
        files = [p for p in sorted((folder / name).rglob("*")) if p.is_file()]
        return {p.relative_to(folder / name): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    same = digest("whole") == digest("killed")
    print(f"killed after {moments} s, then continued: {len(digest('killed'))} files, the same bytes: {same}")


if __name__ == "__main__":
    for name in sys.argv[1:] or ("cuts", "speed", "memory", "kills"):
        with tempfile.TemporaryDirectory() as temporary:
            globals()[name](Path(temporary))
