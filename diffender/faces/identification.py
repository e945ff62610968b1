"""Faces: who is on which image, and closed-set identification as the paper's Table 6 needs it.

One image a person is the probe, the others make the person's prototype; `fold` chooses which one. A recogniser never
sees a probe in its gallery. `python -m diffender faces` says how good its weights are.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffender.classifiers.dataset import SUFFIXES, Item, load_image, read_csv
from diffender.classifiers.imagenet import HALF, Classifier, ClassifierConfig
from diffender.faces.networks import Gallery, InceptionResnetV1, MobileFaceNet, prototypes
from diffender.utils.errors import InputError
from diffender.utils.files import check_fit, load_tensors, printable

STD = (128 / 255,) * 3  # (255 x - 127.5) / 128
RECOGNIZERS = {
    "facenet": ClassifierConfig(
        "InceptionResnetV1", 160, 160, HALF, STD,
        ("embed.conv2d_4b", "embed.repeat_1", "embed.repeat_2", "embed.repeat_3"),
        r"embed\.(conv2d_4b|repeat_[123]\.\d|mixed_[67]a|block8)", aspect=1,
    ),
    "mobilefacenet": ClassifierConfig(
        "MobileFaceNet", 224, 224, HALF, STD,
        ("embed.conv1", "embed.blocks.4", "embed.blocks.11", "embed.conv2"), r"embed\.blocks\.\d+|embed\.conv2",
        aspect=6 / 7,
    ),
}  # fmt: skip


class Faces(NamedTuple):
    probes: list[Item]  # one a person; labels are the persons' numbers
    gallery: list[Item]
    names: list[str]  # of the persons


def list_faces(data: str) -> list[tuple[str, Path]]:
    """(person, path) for each image: a csv of file and identity, or a folder of a folder for each person, as LFW."""
    path = Path(data).expanduser()
    if path.is_file() and path.suffix.lower() == ".csv":
        return [(row["identity"], path.parent / row["file"]) for row in read_csv(path, "file", "identity")]
    if not path.is_dir():
        raise InputError(
            f"no faces at {data!r}; give a folder of a folder for each person, or a csv of file and identity"
        )
    return [(p.parent.name, p) for p in sorted(path.glob("*/*")) if p.suffix.lower() in SUFFIXES]


def split_faces(faces: Sequence[tuple[str, Path]], fold: int = 0) -> Faces:
    """People with two images or more: the fold-th of each is the probe, the others are the gallery.

    A person with fewer images than that is in the gallery alone: known, but not asked for.
    """
    of = defaultdict(list)
    for person, path in faces:
        of[person].append(path)
    names = sorted(person for person, paths in of.items() if len(paths) > 1)
    if len(names) < 2:
        raise InputError(f"{len(names)} people have two images or more; identification needs two such people")
    probes, gallery = [], []
    for label, person in enumerate(names):
        for i, path in enumerate(sorted(of[person], key=lambda p: natural(p.name))):
            (probes if i == fold else gallery).append(Item(printable(f"{person}/{path.stem}"), path, label))
    if not probes:
        raise InputError(f"--fold {fold}: nobody has so many images; the largest is {max(map(len, of.values())) - 1}")
    return Faces(probes, gallery, [*map(printable, names)])


def natural(name: str) -> list:
    """So that img2 comes before img10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def load_recognizer(name: str, weights: str | None) -> nn.Module:
    """A recogniser with its weights from a safetensors file in the published names."""
    net = {"facenet": InceptionResnetV1, "mobilefacenet": MobileFaceNet}[name]()
    if weights is None:
        wanted = {
            "facenet": "20180402-114759-vggface2.pt of facenet-pytorch after python -m diffender weights convert",
            "mobilefacenet": "the state of a MobileFaceNet, 128 dimensions, as safetensors",
        }[name]
        raise InputError(f"recogniser {name!r} has no weights in this package; give --classifier-weights {wanted}")

    def kept(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in state.items() if not k.startswith("logits.") and not k.endswith("num_batches_tracked")}

    state = kept(load_tensors(Path(weights)))
    check_fit(Path(weights), name, state, kept(net.state_dict()))
    net.load_state_dict(state, strict=False)
    return net.eval()


def identify(name: str, weights: str | None, faces: Faces, device: torch.device) -> Classifier:
    """A classifier of images in [0, 1] into the people of `faces`, from a recogniser and their gallery, on a device."""
    cfg = RECOGNIZERS[name]
    net = load_recognizer(name, weights)
    embed = Classifier(net, cfg).to(device)  # normalises, as it does for logits
    parts = [faces.gallery[i : i + 64] for i in range(0, len(faces.gallery), 64)]
    embeddings = torch.cat([embed(torch.stack([load_image(i.path, cfg) for i in part]).to(device)) for part in parts])
    people = torch.tensor([item.label for item in faces.gallery], device=device)
    return Classifier(Gallery(net, prototypes(embeddings, people)), cfg, names=faces.names).to(device)
