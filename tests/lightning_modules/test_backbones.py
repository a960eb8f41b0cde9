"""Backbones: any name gives features; stems, frozen prefixes and weights from files are what they say."""

import pytest
import timm
import torch
import torchvision

from lightning_modules.backbones import build_backbone


@pytest.mark.parametrize(
    ("name", "options", "dimension"),
    [
        ("resnet10", {"image_size": 28, "small_images": True, "width": 8}, 64),
        ("resnet50", {"image_size": 32, "width": 8}, 256),
        ("torchvision:squeezenet1_1", {"image_size": 64}, 512),
        ("torchvision:vit_b_32", {"image_size": 32}, 768),
        ("mobilenet_v3_small", {"image_size": 32}, 1024),
        ("timm:resnet18", {"image_size": 32, "small_images": True}, 512),
        ("timm:vit_tiny_patch16_224", {"image_size": 32, "patch_size": 8, "depth": 2, "reg_tokens": 4}, 192),
        ("vit_tiny_patch16_224", {"image_size": 32, "depth": 1}, 192),
        ("timm:efficientnet_lite0", {"image_size": 64}, 1280),
    ],
)
def test_any_name_gives_features(name, options, dimension):
    backbone = build_backbone(name, **options)
    size = options["image_size"]
    assert backbone.dimension == dimension
    assert backbone(torch.zeros(2, 3, size, size)).shape == (2, dimension)


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_every_network_of_torchvision(name):
    if any(big in name for big in ("vit_h", "vit_l", "128gf", "efficientnet_v2_l", "regnet_y_32gf")):
        pytest.skip("gigabytes")
    size = 299 if name == "inception_v3" else 224
    assert build_backbone(f"torchvision:{name}", image_size=size).dimension > 100


def test_own_resnets_are_torchvisions():
    theirs = torchvision.models.resnet18(weights=None).eval()
    theirs.fc = torch.nn.Identity()
    ours = build_backbone("resnet18", image_size=64).eval()
    ours.net.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_small_stem_keeps_the_resolution():
    backbone = build_backbone("resnet10", image_size=28, small_images=True, width=8)
    assert backbone.net.conv1.stride == (1, 1)
    assert backbone.net.layer1(backbone.net.conv1(torch.zeros(1, 3, 28, 28))).shape[-1] == 28
    with pytest.raises(ValueError, match="vit_tiny_patch16_224"):
        build_backbone("timm:vit_tiny_patch16_224", image_size=32, small_images=True)


@pytest.mark.parametrize("name", ["resnet10", "timm:vit_tiny_patch16_224", "torchvision:vit_b_32"])
def test_frozen_prefix_neither_learns_nor_counts(name):
    options = {"width": 8} if name == "resnet10" else {"depth": 3} if "timm" in name else {}
    backbone = build_backbone(name, image_size=32, frozen_blocks=2, **options).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    # Blocks with a residual branch of scale 0 would hide a gradient, so look at requires_grad as well.
    backbone(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    changed = {k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
    frozen = {id(v) for block in backbone.blocks[:2] for v in block.state_dict(keep_vars=True).values()}
    stem = {
        "net.conv1.weight",
        "net.bn1.running_mean",
        "net.cls_token",
        "net.pos_embed",
        "net.conv_proj.weight",
    }
    state = backbone.state_dict(keep_vars=True)
    assert not {k for k in changed if id(state[k]) in frozen or k in stem}
    later = {id(v) for block in backbone.blocks[2:] for v in block.state_dict(keep_vars=True).values()}
    assert any(id(state[k]) in later for k in changed)


def test_freezing_everything():
    backbone = build_backbone("resnet10", image_size=32, width=8, frozen_blocks=-1).train()
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(m.training for m in backbone.net.modules())
    with pytest.raises(ValueError, match="4 blocks"):
        build_backbone("resnet10", image_size=32, width=8, frozen_blocks=5)


@pytest.mark.parametrize("name", ["resnet10", "timm:resnet10t"])
def test_frozen_statistics_stay_where_batchnorm_is_synchronised(name):
    options = {"width": 8} if name == "resnet10" else {}
    backbone = build_backbone(name, image_size=32, frozen_blocks=2, **options)
    backbone = torch.nn.SyncBatchNorm.convert_sync_batchnorm(backbone).train()
    modes = {n: m.training for n, m in backbone.net.named_modules() if isinstance(m, torch.nn.SyncBatchNorm)}
    assert modes
    for layer, mode in modes.items():
        assert mode == layer.startswith(("layer3", "layer4")), layer
    assert not backbone.net.layer2.training
    assert backbone.net.training


def test_weights_from_files(tmp_path):
    from safetensors.torch import save_file

    source = build_backbone("resnet10", image_size=32, width=8)
    path = tmp_path / "weights.pth"
    wrapped = {f"module.backbone.{k}": v for k, v in source.net.state_dict().items()}
    torch.save({"state_dict": wrapped | {"module.fc.weight": torch.zeros(2)}, "epoch": 3}, path)
    save_file({k: v.clone() for k, v in source.net.state_dict().items()}, tmp_path / "w.safetensors")
    for file in (path, tmp_path / "w.safetensors"):
        loaded = build_backbone("resnet10", image_size=32, width=8, pretrained=str(file))
        for key, value in source.net.state_dict().items():
            torch.testing.assert_close(loaded.net.state_dict()[key], value)
    # Files from before BatchNorm counted its batches, or converted from elsewhere.
    old = {k: v for k, v in source.net.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    build_backbone("resnet10", image_size=32, width=8, pretrained=tmp_path / "old.pth")
    with pytest.raises(ValueError, match="conv1"):
        build_backbone("resnet10", image_size=32, width=16, pretrained=path)
    with pytest.raises(ValueError, match="missing"):
        build_backbone("resnet18", image_size=32, width=8, pretrained=path)


def test_transformer_weights_fit_another_image_size(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=7)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    loaded = build_backbone(
        "timm:vit_tiny_patch16_224", image_size=32, depth=1, pretrained=tmp_path / "vit.pth"
    )
    assert loaded.net.pos_embed.shape[1] == 5
    torch.testing.assert_close(loaded.net.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)


def test_bad_names_sizes_and_files(tmp_path):
    with pytest.raises(ValueError, match=r"resnet81.*resnet18"):
        build_backbone("torchvision:resnet81")
    with pytest.raises(ValueError, match="resnet_eighteen"):
        build_backbone("resnet_eighteen")
    with pytest.raises(ValueError, match="keras"):
        build_backbone("keras:resnet18")
    with pytest.raises(ValueError, match=r"28 .* 16"):
        build_backbone("timm:vit_tiny_patch16_224", image_size=28, depth=1)
    with pytest.raises(ValueError, match="torchvision:resnet18"):
        build_backbone("torchvision:resnet18", depth=3)
    with pytest.raises(ValueError, match=r"no\.pth"):
        build_backbone("resnet10", width=8, pretrained=tmp_path / "no.pth")
    (tmp_path / "bad.pth").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"bad\.pth: "):
        build_backbone("resnet10", width=8, pretrained=tmp_path / "bad.pth")


def test_unreachable_hub_says_what_to_do(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(ValueError, match=r"no route to host.*https://.*pretrained='/path"):
        build_backbone("torchvision:resnet18", pretrained=True)


def test_a_users_own_network_in_timm_needs_no_pretrained_configuration():
    def own_narrow_vit(pretrained=False, **options):
        settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2} | options
        return timm.models.build_model_with_cfg(
            timm.models.VisionTransformer, "own_narrow_vit", pretrained, **settings
        )

    timm.models.register_model(own_narrow_vit)
    assert build_backbone("timm:own_narrow_vit", image_size=32).dimension == 24


def test_tokens_of_the_last_blocks():
    backbone = build_backbone("timm:vit_tiny_patch16_224", image_size=32, depth=3, reg_tokens=2).eval()
    images = torch.randn(2, 3, 32, 32)
    outputs = backbone.tokens(images, n_last_blocks=2)
    assert [(c.shape, p.shape) for c, p in outputs] == [((2, 192), (2, 4, 192))] * 2
    torch.testing.assert_close(outputs[-1][0], backbone(images))
    with pytest.raises(ValueError, match="vision transformer"):
        build_backbone("resnet10", width=8).tokens(images)
