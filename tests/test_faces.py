"""Face recognisers, galleries and protocols."""

import pytest
import torch
from PIL import Image

from diffender import factory as runs
from diffender.classifiers.dataset import correct_subset, load_image
from diffender.config import TargetOptions
from diffender.faces.__main__ import main as verify_faces
from diffender.faces.identification import RECOGNIZERS, identify, list_faces, load_recognizer, natural, split_faces
from diffender.faces.networks import Gallery, InceptionResnetV1, MobileFaceNet, prototypes
from diffender.faces.verification import read_pairs, verify
from diffender.utils.errors import InputError
from diffender.utils.files import save_atomic
from tests.conftest import SHARED

FACES = SHARED / "data" / "faces"
WEIGHTS = FACES / "mobilefacenet.safetensors"


@pytest.fixture
def faces():
    if not WEIGHTS.is_file():
        pytest.skip("no faces and no recogniser here: neither may be part of the repository")
    return FACES


def test_facenet_has_the_published_size():
    net = InceptionResnetV1()
    assert sum(p.numel() for p in net.parameters()) == 23_482_624
    assert len(net.state_dict()) == 714


def test_facenet_is_facenet_pytorchs():
    module = pytest.importorskip("facenet_pytorch.models.inception_resnet_v1", reason="facenet-pytorch not installed")
    theirs, ours = (module.InceptionResnetV1(pretrained=None).eval(), InceptionResnetV1().eval())
    g = torch.Generator().manual_seed(0)
    for name, t in theirs.state_dict().items():
        if t.is_floating_point():
            scale = 1 if t.ndim < 2 else (2 / t[0].numel()) ** 0.5
            t.copy_(
                torch.rand(t.shape, generator=g) + 0.5 if "var" in name else scale * torch.randn(t.shape, generator=g)
            )
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 160, 160, generator=g)
    assert (ours(x) - theirs(x)).abs().max() < 1e-6


def test_published_file_loads_without_its_class_head(tmp_path):
    net = InceptionResnetV1()
    head = {"logits.weight": torch.zeros(10, 512), "logits.bias": torch.zeros(10)}
    save_atomic(net.state_dict() | head, tmp_path / "f.safetensors", {})
    loaded = load_recognizer("facenet", str(tmp_path / "f.safetensors"))
    assert torch.equal(loaded.last_linear.weight, net.last_linear.weight)
    with pytest.raises(InputError, match="does not fit mobilefacenet"):
        load_recognizer("mobilefacenet", str(tmp_path / "f.safetensors"))
    with pytest.raises(InputError, match="20180402-114759-vggface2.pt"):
        load_recognizer("facenet", None)


def test_gallery_by_hand():
    e = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]])
    p = prototypes(e, torch.tensor([0, 1, 1]))
    assert torch.allclose(p[0], e[0])
    assert torch.allclose(p[1], torch.tensor([0.6, 1.8]) / 3.6**0.5)
    logits = Gallery(torch.nn.Identity(), p)(e[:1])
    assert torch.allclose(logits, 64 * torch.tensor([[1.0, 0.6 / 3.6**0.5]]))


def lfw(root):
    """Ann has 3 images, Bob 2, Cy one."""
    for name, n in (("Ann", 3), ("Bob", 2), ("Cy", 1)):
        (root / name).mkdir()
        for i in range(1, n + 1):
            Image.new("RGB", (250, 250), (40 * i, 100, 50)).save(root / name / f"{name}_{i:04d}.jpg")
    return root


def test_probes_are_not_in_the_gallery(tmp_path):
    faces = list_faces(str(lfw(tmp_path)))
    for fold, probes in ((0, ["Ann/Ann_0001", "Bob/Bob_0001"]), (2, ["Ann/Ann_0003"])):
        split = split_faces(faces, fold)
        assert [item.id for item in split.probes] == probes
        assert not {item.id for item in split.probes} & {item.id for item in split.gallery}
        assert len(split.probes) + len(split.gallery) == 5  # Cy cannot be found again
        assert split.names == ["Ann", "Bob"]
        assert all(item.id.startswith(split.names[item.label]) for item in (*split.probes, *split.gallery))
    with pytest.raises(InputError, match="--fold 3"):
        split_faces(faces, 3)
    with pytest.raises(InputError, match="no faces at"):
        list_faces(str(tmp_path / "nobody"))


def test_a_list_of_faces_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "faces.CSV").write_text("file,identity\na.png,ann\n")
    assert list_faces("~/faces.CSV") == [("ann", tmp_path / "a.png")]


def test_images_are_counted_by_their_decimals_alone():
    """A superscript is a digit to Python, and no number."""
    names = ["img10.jpg", "img2.jpg", "x²1.jpg", "²1.jpg"]
    assert sorted(names, key=natural) == ["img2.jpg", "img10.jpg", "x²1.jpg", "²1.jpg"]


def test_probes_are_counted_by_their_numbers(tmp_path):
    for name, files in (("Ann", ("img2", "img10")), ("Bob", ("a", "b"))):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / f"{file}.jpg").touch()
    probes = split_faces(list_faces(str(tmp_path))).probes
    assert [probe.id for probe in probes] == ["Ann/img2", "Bob/a"]


class Colour(torch.nn.Module):
    """Who looks alike has the same mean colour."""

    def forward(self, x):
        return torch.nn.functional.normalize(x.mean(dim=(2, 3)), dim=1)


def test_a_person_is_who_the_gallery_says(tmp_path, monkeypatch):
    """Not who the probes say."""
    for person, colours in (("Ann", ("red", "blue")), ("Bob", ("blue", "red"))):
        (tmp_path / person).mkdir()
        for i, colour in enumerate(colours):
            Image.new("RGB", (8, 8), colour).save(tmp_path / person / f"{i}.png")
    monkeypatch.setattr("diffender.faces.identification.load_recognizer", lambda *_: Colour())
    classifier = identify("facenet", None, split_faces(list_faces(str(tmp_path))), torch.device("cpu"))
    red = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None].expand(1, 3, 160, 160)
    assert classifier.names[classifier(red).argmax()] == "Bob"


@pytest.mark.parametrize("name", RECOGNIZERS)
def test_faces_are_normalised_as_published(name):
    """(255 x - 127.5) / 128."""
    cfg = RECOGNIZERS[name]
    assert [(1 - m) / s for m, s in zip(cfg.mean, cfg.std, strict=True)] == pytest.approx([127.5 / 128] * 3, rel=1e-6)


def test_mobilefacenet_averages_pixels_where_it_sees_fewer():
    net, seen = MobileFaceNet().eval(), []
    net.conv1.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    net(torch.tensor([0.0, 1.0]).repeat(112).expand(1, 3, 224, 224))
    assert seen[0].shape == (1, 3, 112, 96)
    assert (seen[0][..., 2:-2] - 0.5).abs().max() < 0.2


@pytest.mark.parametrize(("name", "size", "left"), [("facenet", 160, 45), ("mobilefacenet", 224, 56)])
def test_an_lfw_face_is_the_middle(tmp_path, name, size, left):
    """In the proportions that the network was trained on: 137 of 160 pixels are 6 of 7."""
    image = Image.new("RGB", (250, 250))
    image.paste((255, 0, 0), (left, 45, 250 - left, 205))
    image.save(tmp_path / "a.png")
    x = load_image(tmp_path / "a.png", RECOGNIZERS[name])
    assert x.shape == (3, size, size)
    assert x[0].min() == 1


def test_pairs_of_lfw(tmp_path):
    (tmp_path / "pairs.txt").write_text("1\t1\nAnn\t1\t2\nAnn\t1\tBob\t2\n")
    same, different = read_pairs(tmp_path / "pairs.txt", tmp_path)
    assert same == (tmp_path / "Ann" / "Ann_0001.jpg", tmp_path / "Ann" / "Ann_0002.jpg", True)
    assert different == (tmp_path / "Ann" / "Ann_0001.jpg", tmp_path / "Bob" / "Bob_0002.jpg", False)


def test_pairs_of_a_csv(tmp_path):
    (tmp_path / "pairs.csv").write_text("file_a,file_b,same\na.jpg,b.jpg,1\na.jpg,c.jpg,0\n")
    assert [same for *_, same in read_pairs(tmp_path / "pairs.csv", tmp_path)] == [True, False]


def test_pairs_that_do_not_say_what_they_are_are_refused(tmp_path):
    (tmp_path / "pairs.csv").write_text("file_a,file_b,same\na.jpg,b.jpg,True\n")
    with pytest.raises(InputError, match="same is 'True'; it is 1 for two images of one person, 0 for two people"):
        read_pairs(tmp_path / "pairs.csv", tmp_path)
    (tmp_path / "pairs.txt").write_text("1\t1\nAnn\tone\t2\n")
    with pytest.raises(InputError, match="Ann one; after a name stands the number of its image"):
        read_pairs(tmp_path / "pairs.txt", tmp_path)
    (tmp_path / "pairs.txt").write_bytes(b"1\t1\n\nAnn\xff 1\n")
    with pytest.raises(InputError, match="Ann. 1' is no pair; give name i j, or name i name j"):
        read_pairs(tmp_path / "pairs.txt", tmp_path)


def test_every_threshold_counts_what_it_separates():
    """The thresholds are those of a plain search, ties included."""
    g = torch.Generator().manual_seed(0)
    distances, same = torch.randint(0, 20, (60,), generator=g) / 10, torch.rand(60, generator=g) < 0.5
    chosen = []
    for part in torch.arange(60).tensor_split(3):
        others = torch.ones(60, dtype=torch.bool)
        others[part] = False
        ordered = distances[others].sort().values
        candidates = (ordered[1:] + ordered[:-1]) / 2
        right = torch.stack([((distances[others] <= t) == same[others]).sum() for t in candidates])
        chosen.append(candidates[right == right.max()].median().item())
    assert verify(distances, same, folds=3).threshold == pytest.approx(sum(chosen) / 3)


def test_verification_by_hand():
    distances = torch.tensor([0.1, 0.9, 0.2, 0.8] * 5)
    same = torch.tensor([True, False, True, False] * 5)
    result = verify(distances, same, folds=5)
    assert result.accuracy == 1
    assert 0.2 <= result.threshold < 0.8
    assert verify(distances, ~same, folds=5).accuracy <= 0.5
    assert verify(distances, same, folds=9).accuracy == 1, "folds of 2 and of 3 pairs"
    odd = torch.tensor([0.1, 0.3, 0.1, 0.3, 0.25, 0.4])
    assert verify(odd, same[:6], folds=3).accuracy == pytest.approx(5 / 6), "no fold chooses its own threshold"
    torn = torch.tensor([0.1, 0.4, 0.5, 0.7, 0.8, 0.95]).repeat(2)
    assert verify(torn, same[:12], folds=2).threshold == pytest.approx(0.6), "the middle of three that are as good"
    with pytest.raises(InputError, match="20 pairs are too few for 11 folds"):
        verify(distances, same, folds=11)


def test_real_faces_are_recognised(faces, call):
    args = ("--pairs", faces / "pairs.csv", "--data", faces)
    net = ("--classifier", "mobilefacenet", "--classifier-weights", WEIGHTS)
    _, out, error = call(verify_faces, "diffender faces", *args, *net)
    assert float(out.split(" %")[0]) > 98, error
    split = split_faces(list_faces(str(faces / "identities.csv")))
    classifier = identify("mobilefacenet", str(WEIGHTS), split, torch.device("cpu"))
    assert len(correct_subset(split.probes, classifier, 9, 0).ids) == 9
    assert len(classifier.features(torch.rand(1, 3, 224, 224))) == len(classifier.cfg.taps)


def test_the_flags_open_a_recogniser(faces):
    opts = TargetOptions(
        data=str(faces / "identities.csv"), classifier="mobilefacenet", classifier_weights=str(WEIGHTS)
    )
    assert isinstance(runs.open_classifier(opts, torch.device("cpu")).net.embed, MobileFaceNet)
    assert len(runs.open_items(opts)) == 9
