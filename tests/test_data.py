"""Data sets, preprocessing and the classifier: real accuracy on real photographs, and clear words for bad input."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffender.classifiers import imagenet
from diffender.classifiers.dataset import (
    correct_subset,
    fit_image,
    list_items,
    list_photographs,
    load_image,
    sample_items,
)
from diffender.classifiers.imagenet import CLASSIFIERS, HALF, Classifier, ClassifierConfig, as_map, load_classifier
from diffender.utils.errors import InputError
from diffender.weights.loading import load_model
from diffender.weights.prompts import contexts_for
from tests.conftest import SHARED


def test_the_embedded_classifier_is_right_on_18_of_the_20_sample_photographs(classifier):
    """The figure pins weights, normalisation, crop and labels at once."""
    items = sample_items()
    x = torch.stack([load_image(item.path, classifier.cfg) for item in items])
    right = classifier(x).argmax(dim=1) == torch.tensor([item.label for item in items])
    assert (len(items), int(right.sum())) == (20, 18)
    alone = torch.cat([classifier(image[None]) for image in x[:3]])
    assert torch.allclose(alone, classifier(x[:3]), rtol=1e-3, atol=1e-3)


def test_subset_is_seeded_correct_and_passes_over_what_was_tuned_on(classifier):
    items = sample_items()
    first = correct_subset(items, classifier, 4, seed=0)
    assert first.ids == correct_subset(items, classifier, 4, seed=0).ids
    assert first.ids != correct_subset(items, classifier, 4, seed=1).ids
    assert (classifier(first.x).argmax(dim=1) == first.y).all()
    rest = correct_subset(items, classifier, 20, seed=0, exclude=frozenset(first.hashes))
    assert len(rest.ids) == 14
    assert not set(rest.ids) & set(first.ids)
    tuned_on = [item for item in items if item.id in first.ids]
    with pytest.raises(InputError, match="prompts or patches were made of all 4 of these images; give other --data"):
        correct_subset(tuned_on, classifier, 4, seed=0, exclude=frozenset(first.hashes))


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(path)


def test_an_image_is_resized_as_asked_and_its_middle_cropped():
    cfg = ClassifierConfig("", 10, 20, HALF, HALF, ())
    image = Image.new("RGB", (80, 40))
    image.paste((255, 0, 0), (30, 10, 50, 30))  # 10 of 20 pixels, once resized
    seen = fit_image(image, cfg)
    assert seen.shape == (3, 10, 10) and seen[0, 2:-2, 2:-2].min() == 1 and seen[0].mean() > 0.9
    assert not torch.equal(fit_image(image, replace(cfg, interpolation="bilinear")), seen)


def test_folders_of_a_class_may_have_folders(tmp_path):
    for name in ("cats/a.png", "dogs/b.png", "dogs/small/c.png"):
        picture(tmp_path / name)
    assert [(i.id, i.label) for i in list_items(str(tmp_path), 2)] == [
        ("cats/a", 0),
        ("dogs/b", 1),
        ("dogs/small/c", 1),
    ]


def test_folders_by_wnid_number_classes_globally(tmp_path):
    picture(tmp_path / "n01443537" / "a.jpg")
    picture(tmp_path / "n15075141" / "b.png")
    assert [(i.id, i.label) for i in list_items(str(tmp_path))] == [("n01443537/a", 1), ("n15075141/b", 999)]
    picture(tmp_path / "cats" / "c.jpg")
    with pytest.raises(InputError, match="no ImageNet-1k wnids: cats; for your own classes"):
        list_items(str(tmp_path))


def test_names_that_begin_with_a_wnid(tmp_path):
    picture(tmp_path / "n01440764_tench.jpg")
    assert [(i.id, i.label) for i in list_items(str(tmp_path))] == [("n01440764_tench", 0)]


def test_csv(tmp_path):
    table = tmp_path / "LABELS.CSV"
    table.write_text("file, label\nimages/a.png, 7\n")
    (item,) = list_items(str(table))
    assert (item.id, item.label, item.path) == ("images/a", 7, tmp_path / "images/a.png")


def test_photographs_need_no_labels(tmp_path):
    (tmp_path / "cats").mkdir()
    for name in ("b.png", "a.jpg", "cats/c.webp", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "some.csv").write_text("file\ncats/c.webp\n")
    names = [str(p.relative_to(tmp_path)) for p in list_photographs(str(tmp_path))]
    assert names == ["a.jpg", "b.png", "cats/c.webp"]
    assert list_photographs(str(tmp_path / "some.csv")) == [tmp_path / "cats/c.webp"]
    assert len(list_photographs("samples")) == 20
    with pytest.raises(InputError, match="no images in nowhere"):
        list_photographs("nowhere")


def test_labels_may_be_wnids(tmp_path):
    (tmp_path / "labels.csv").write_text("file,label\na.jpg,n01440764\nb.jpg, 7\n")
    assert [item.label for item in list_items(str(tmp_path / "labels.csv"))] == [0, 7]
    (tmp_path / "labels.csv").write_text("file,label\na.jpg,n99999999\n")
    with pytest.raises(InputError, match="'n99999999'; labels are class indices from 0 to 999, or ImageNet-1k wnids"):
        list_items(str(tmp_path / "labels.csv"))


def validation_images(folder):
    folder.mkdir(parents=True)
    for i in (1, 2, 3):
        (folder / f"ILSVRC2012_val_{i:08}.JPEG").touch()


def test_imagenets_validation_layout_of_kaggle(tmp_path):
    images = tmp_path / "ILSVRC/Data/CLS-LOC/val"
    validation_images(images)
    with pytest.raises(InputError, match="validation images without labels; put LOC_val_solution.csv"):
        list_items(str(images))
    with pytest.raises(InputError, match=rf"in a folder of it; give that one: {images}"):
        list_items(str(images.parent))
    lines = ["ImageId,PredictionString", *(f"ILSVRC2012_val_{i:08},n0144{i:04} 1 2 3 4" for i in (1, 2, 3))]
    wnids = {1: "n01440764", 2: "n01443537", 3: "n15075141"}
    lines[1:] = [f"ILSVRC2012_val_{i:08},{wnid} 85 1 499 272" for i, wnid in wnids.items()]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(lines))
    assert [item.label for item in list_items(str(images))] == [0, 1, 999]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join([*lines[:3], "ILSVRC2012_val_00000003,"]))
    with pytest.raises(InputError, match="has no label for ILSVRC2012_val_00000003.JPEG"):
        list_items(str(images))


def test_imagenets_development_kit(tmp_path):
    """Its numbers of classes are its own, not the ranks of wnids."""
    scipy_io = pytest.importorskip("scipy.io", reason="scipy is not installed: meta.mat cannot be written")
    validation_images(tmp_path / "val")
    kit = tmp_path / "ILSVRC2012_devkit_t12/data"
    kit.mkdir(parents=True)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n2\n")
    synsets = np.array([(1, "n15075141"), (2, "n01440764")], [("ILSVRC2012_ID", object), ("WNID", object)])
    scipy_io.savemat(kit / "meta.mat", {"synsets": synsets})
    assert [item.label for item in list_items(str(tmp_path / "val"))] == [0, 999, 0]
    whole = (kit / "meta.mat").read_bytes()
    for size in (0, 100, 200, len(whole) - 50):
        (kit / "meta.mat").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"meta.mat or .* is damaged .*; fetch the kit again"):
            list_items(str(tmp_path / "val"))


def test_classifiers_without_weights_name_the_file_wanted():
    for name, cfg in CLASSIFIERS.items():
        if not cfg.package:
            with pytest.raises(InputError, match=cfg.tag.replace(".", r"\.")):
                load_classifier(name)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_taps_and_preprocessing_equal_timms(name, monkeypatch):
    """Sizes, mean and std are those of timm's own configuration for the tag; every tap gives a map."""
    import timm

    from diffender.classifiers.imagenet import Classifier

    cfg = CLASSIFIERS[name]
    with torch.device("meta"):  # shapes are all that counts
        net = timm.create_model(cfg.tag)
    monkeypatch.setattr(imagenet, "check_finite", lambda *_: None)
    pretrained = net.pretrained_cfg
    if not cfg.package:  # the package's weights were trained with other constants than timm's file of the same net
        assert (cfg.mean, cfg.std) == (pretrained["mean"], pretrained["std"])
        assert cfg.interpolation == pretrained["interpolation"]
        assert cfg.resize == int(cfg.size / pretrained["crop_pct"])  # timm rounds down
    assert cfg.size == pretrained["input_size"][1]
    features = Classifier(net, cfg).features(torch.empty(1, 3, cfg.size, cfg.size, device="meta"))
    assert len(features) == len(cfg.taps)
    for feature in features:
        assert feature.ndim == 4
        assert feature.shape[2] == feature.shape[3]
        assert feature.shape[1] >= 16


@pytest.mark.parametrize("others", [0, 1, 2, 5])
def test_tokens_of_no_place_are_left_out_of_maps(others):
    """None, ViT's class token, DeiT's with distillation, DINOv2's with registers."""
    places = torch.arange(14 * 14.0).view(1, -1, 1)
    found = as_map(torch.cat([torch.full((1, others, 1), -1.0), places], dim=1))
    assert torch.equal(found, places.view(1, 1, 14, 14))


def test_a_network_of_ones_own_stays_as_it_is_and_its_copy_in_evaluation_mode():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    classifier = Classifier(net, ClassifierConfig("own", 8, 8, HALF, HALF, ()))
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert net[0].weight.is_contiguous()
    classifier.train()
    before = classifier.net[1].running_mean.clone()
    classifier(torch.rand(2, 3, 8, 8))
    assert torch.equal(classifier.net[1].running_mean, before)
    assert not any(p.requires_grad for p in classifier.parameters())


def test_accuracy_on_nips17_is_that_of_a_working_classifier(classifier):
    """Top-1 of 60 images of the evaluation set: 91.6 % over all 1000 were measured elsewhere."""
    table = SHARED / "data" / "nips17" / "labels.csv"
    if not table.is_file():
        pytest.skip("no evaluation images here: they are not part of the repository")
    items = list_items(str(table))[:60]
    x = torch.stack([load_image(item.path, classifier.cfg) for item in items])
    right = (classifier(x).argmax(dim=1) == torch.tensor([item.label for item in items])).float().mean()
    assert right > 0.8


def test_loading_takes_none_of_the_callers_random_numbers():
    before = torch.get_rng_state()
    contexts_for("tuned", load_model("tiny"))
    load_classifier("efficientnet_lite0")
    assert torch.equal(torch.get_rng_state(), before)
