"""What must hold of any rows, against brute force in float64, and real images with planted copies."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity

from curated_data.embedding import embed_pool, resolve_embedder
from curated_data.errors import PoolError
from curated_data.pool import ShardPool, ShardWriter
from curated_data.selection.near_duplicates import (
    exact_groups,
    image_contents,
    match_held_out,
    near_duplicates,
)

THRESHOLDS = [-0.5, 0.0, 0.3, 0.8, 0.95, 0.9999, 1.0]
ROUNDING = 1e-9  # far less than float32 could tell apart


def copies(n_originals: int, n_copies: int, dimension: int = 8, noise: float = 0.05, seed: int = 0):
    """Random directions, each followed by noisy copies, at random scales, in random order."""
    rng = np.random.default_rng(seed)
    x = np.repeat(rng.normal(size=(n_originals, dimension)), n_copies, axis=0)
    x += noise * rng.normal(size=x.shape)
    x *= rng.uniform(0.5, 2, (len(x), 1))
    return x[rng.permutation(len(x))].astype(np.float32)


def directions(x: np.ndarray) -> np.ndarray:
    """Unit rows in float64; zero for zero rows."""
    x = x.astype(np.float64)
    x = x / np.maximum(np.abs(x).max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def check(found, x, threshold, *, valid=None, held_out=None, stay=None, same=None, exact=True) -> None:
    """The two promises, by all pairs."""
    n = len(x)
    valid = np.ones(n, bool) if valid is None else valid
    stay = np.zeros(n, bool) if stay is None else stay
    unit = directions(np.where(valid[:, None], x, 0))
    cosine = unit @ unit.T
    out = valid & ~found.keep
    by_held_out = out & (found.held_out_match >= 0)
    by_kept = np.flatnonzero(out & ~by_held_out)
    assert not found.keep[~valid].any()
    assert found.keep[stay].all()
    assert (found.near[found.keep | ~valid | by_held_out] == -1).all()
    # Every sample left out has a kept one within the threshold, which is named with its cosine.
    near = found.near[by_kept]
    assert found.keep[near].all()
    reached = cosine[by_kept, near] >= threshold - ROUNDING
    if same is not None:
        reached |= same[by_kept] == same[near]
    assert reached.all()
    np.testing.assert_allclose(found.cosine[by_kept], cosine[by_kept, near], atol=1e-6)
    if held_out is not None:
        to_held_out = unit @ directions(held_out).T
        matched = np.flatnonzero(found.held_out_match >= 0)
        mine = to_held_out[matched, found.held_out_match[matched]]
        assert (mine >= threshold - ROUNDING).all()
        # Rows of zeros are near nothing.
        nearest = np.where(held_out.any(axis=1), to_held_out[matched], -np.inf).max(axis=1)
        np.testing.assert_allclose(mine, nearest, atol=1e-6)
        np.testing.assert_allclose(found.cosine[matched], mine, atol=1e-6)
        directed = unit.any(axis=1)[:, None] & held_out.any(axis=1)
        kept = found.keep & ~stay
        assert not ((to_held_out >= threshold + ROUNDING) & directed)[kept].any()
    else:
        assert not by_held_out.any()
    assert np.isnan(found.cosine[(found.near < 0) & (found.held_out_match < 0)]).all()
    # No two kept samples are within the threshold.
    directed = found.keep & unit.any(axis=1)
    assert found.keep[valid & ~unit.any(axis=1) & (same is None)].all()
    within = (cosine >= threshold + ROUNDING) & directed & directed[:, None] & ~(stay & stay[:, None])
    np.fill_diagonal(within, False)
    if exact:
        assert not within.any()
    if same is not None:
        alike = (same == same[:, None]) & found.keep & found.keep[:, None] & ~(stay & stay[:, None])
        np.fill_diagonal(alike, False)
        assert not alike.any()


@st.composite
def pools(draw):
    """Rows at random, in clusters, in chains, many equal, at any scale and in any float type."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    n, d = draw(st.integers(1, 120)), draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["random", "clusters", "chain", "equal", "whole numbers"]))
    if kind == "random":
        x = rng.normal(size=(n, d))
    elif kind == "clusters":
        centres = rng.normal(size=(4, d))
        x = centres[rng.integers(4, size=n)] + rng.choice([0.01, 0.2]) * rng.normal(size=(n, d))
    elif kind == "chain":
        angle = np.arange(n) * rng.choice([0.005, 0.02, 0.1])
        x = np.zeros((n, d + 1))
        x[:, 0], x[:, 1] = np.cos(angle), np.sin(angle)
        x = x[rng.permutation(n)]
    elif kind == "equal":
        x = np.repeat(rng.normal(size=(1, d)), n, axis=0)
    else:  # many cosines at a threshold exactly
        x = rng.integers(-1, 2, (n, d)).astype(float)
    repeated = rng.random(n) < draw(st.sampled_from([0, 0.5]))
    x[repeated] = x[rng.integers(0, n, repeated.sum())]
    x *= np.where(rng.random(n) < 0.5, 1, rng.uniform(0.25, 4, n))[:, None]
    x[rng.random(n) < draw(st.sampled_from([0, 0.1]))] = 0
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    if dtype != np.float16:
        x *= draw(st.sampled_from([1, 1e-15, 1e15]))
    return x.astype(dtype)


@settings(max_examples=300, deadline=None)
@given(
    x=pools(),
    threshold=st.sampled_from([*THRESHOLDS, 0.5, np.sqrt(0.5)]),
    n_neighbours=st.integers(1, 5),
    cell_size=st.sampled_from([None, 7, 40]),
    seed=st.integers(0, 99),
)
def test_each_sample_left_out_has_a_kept_one_and_no_two_kept_are_near(
    x, threshold, n_neighbours, cell_size, seed
):
    rng = np.random.default_rng(seed)
    n = len(x)
    valid = rng.random(n) < 0.95 if seed % 2 else None
    if valid is not None:
        x[~valid] = np.nan
    options = {
        "valid": valid,
        "prefer": rng.integers(0, 4, n) if seed % 3 == 0 else None,
        "held_out": x[rng.integers(0, n, 3)] if seed % 5 == 0 and valid is None else None,
        "stay": rng.random(n) < 0.2 if seed % 7 == 0 else None,
    }
    if options["stay"] is not None and valid is not None:
        options["stay"] &= valid
    how = {"n_neighbours": n_neighbours, "cell_size": cell_size, "n_probes": n, "seed": seed, **options}
    found = near_duplicates(x, threshold=threshold, **how)
    check(found, x, threshold, **{name: options[name] for name in ("valid", "held_out", "stay")})
    again = near_duplicates(x, threshold=threshold, **how)
    for name in ("keep", "near", "cosine", "held_out_match", "pairs"):
        assert np.array_equal(getattr(found, name), getattr(again, name), equal_nan=name == "cosine")


@settings(max_examples=100, deadline=None)
@given(x=pools(), threshold=st.sampled_from(THRESHOLDS), seed=st.integers(0, 99))
def test_samples_known_to_be_copies_are_left_out_at_any_cosine(x, threshold, seed):
    rng = np.random.default_rng(seed)
    same = rng.integers(0, max(len(x) // 2, 1), len(x))
    prefer = rng.integers(0, 4, len(x)) if seed % 2 else None
    stay = rng.random(len(x)) < 0.2 if seed % 3 == 0 else None
    found = near_duplicates(x, threshold=threshold, same=same, prefer=prefer, stay=stay, n_neighbours=2)
    check(found, x, threshold, same=same, stay=stay)


@settings(max_examples=40, deadline=None)
@given(n_copies=st.integers(20, 200), n_neighbours=st.integers(1, 4), cell_size=st.sampled_from([None, 50]))
def test_more_copies_than_neighbours_hide_nothing(n_copies, n_neighbours, cell_size):
    rng = np.random.default_rng(n_copies)
    x = rng.normal(size=(30, 16)).astype(np.float32)
    near = x[:5] + 0.05 * rng.normal(size=(5, 16)).astype(np.float32)
    scaled = x[:2] * np.linspace(1, 3, n_copies, dtype=np.float32)[:, None, None]  # equal but for rounding
    x = np.concatenate([x, np.tile(x[:5], (n_copies, 1)), near, scaled.reshape(-1, 16)])
    x = x[rng.permutation(len(x))]
    found = near_duplicates(
        x, threshold=0.95, n_neighbours=n_neighbours, cell_size=cell_size, n_probes=len(x)
    )
    check(found, x, 0.95)
    assert found.keep.sum() == 30


def test_a_chain_is_no_group():
    """Neighbours are within the threshold, most others are not: one of every three stays, not one of all."""
    angle = np.arange(99) * 0.1
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1)[:62]
    found = near_duplicates(x, threshold=float(np.cos(0.11)))
    check(found, x, float(np.cos(0.11)))
    assert 20 <= found.keep.sum() <= 31
    assert (np.abs(np.arange(62) - found.near)[found.near >= 0] == 1).all()


def test_the_more_connected_stays_and_ties_keep_the_first():
    star = np.eye(6)[[0, 0, 0, 0, 0]] + 0.3 * np.eye(6)[[1, 2, 0, 3, 4]]  # the third is near all others
    found = near_duplicates(star, threshold=0.95)
    assert found.near.tolist() == [2, 2, -1, 2, 2]
    x = np.ones((4, 3), np.float32)
    assert near_duplicates(x).keep.tolist() == [True, False, False, False]
    assert near_duplicates(x, prefer=np.array([1, 5, 9, 9])).keep.tolist() == [False, False, True, False]
    assert near_duplicates(x, threshold=1.0).near.tolist() == [-1, 0, 0, 0]
    # Two copies of one image have more copies than the image between them and a third.
    pair = np.array([[1, 0], [1, 0], [0.97, 0.2]])
    assert near_duplicates(pair, threshold=0.95).near.tolist() == [-1, 0, 0]


def test_few_probes_find_nearly_all():
    x = copies(1500, 2, dimension=32, noise=0.1)
    whole = near_duplicates(x, threshold=0.95)
    cut = near_duplicates(x, threshold=0.95, cell_size=300, n_probes=2)
    assert len(whole.pairs) > 1000
    both = {tuple(p) for p in whole.pairs.tolist()} & {tuple(p) for p in cut.pairs.tolist()}
    assert len(both) == len(cut.pairs)  # finds nothing that is not there
    assert len(both) >= 0.99 * len(whole.pairs)
    check(cut, x, 0.95, exact=False)
    unit = directions(x[cut.keep])
    assert ((unit @ unit.T >= 0.95).sum() - len(unit)) / 2 <= 0.01 * len(whole.pairs)
    again = near_duplicates(x, threshold=0.95, cell_size=300, n_probes=2)
    assert np.array_equal(again.keep, cut.keep)


def test_dense_pools_take_few_searches():
    """Thousands of different rows all within the threshold, and within it of few."""
    x = copies(1, 6000, dimension=32, noise=0.2)
    assert near_duplicates(x, threshold=0.5).keep.sum() == 1
    unit = directions(x)
    threshold = float(np.quantile(unit[:1000] @ unit[:1000].T, 0.5))
    check(near_duplicates(x, threshold=threshold, n_neighbours=4), x, threshold)


def test_samples_that_are_not_valid_take_no_part():
    x = np.ones((4, 3), np.float32)
    x[1] = np.nan
    found = near_duplicates(x, valid=np.array([False, False, True, True]))
    assert found.group.tolist() == [-1, -1, 2, 2]
    assert found.keep.tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="sample 1 "):
        near_duplicates(x)
    nothing = near_duplicates(x, valid=np.zeros(4, bool))
    assert not nothing.keep.any()
    assert nothing.pairs.shape == (0, 2)
    empty = near_duplicates(np.empty((0, 3)), held_out=np.ones((2, 3)))
    assert empty.keep.shape == (0,)


def test_held_out_images_leave_the_pool_and_another_copy_may_stay():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 16)).astype(np.float32)
    x[1] = x[0]
    x[2] = x[0] + 0.2 * x[3]  # a copy of 0 in the pool, not near enough to what is held out
    held_out = np.stack([rng.normal(size=16), x[0] - 0.2 * x[3]])
    cosine = cosine_similarity(x, held_out)
    threshold = (min(cosine[0, 1], cosine_similarity(x)[0, 2]) + cosine[2, 1]) / 2
    assert cosine_similarity(x)[0, 2] > threshold
    found = near_duplicates(x, held_out=held_out, threshold=float(threshold))
    assert found.held_out_match.tolist() == [1, 1, -1, -1, -1, -1]
    assert found.keep.tolist() == [False, False, True, True, True, True]
    assert match_held_out(x, np.empty((0, 16)), threshold=0.9).tolist() == [-1] * 6
    assert match_held_out(x, np.zeros((2, 16)), threshold=-0.9).tolist() == [-1] * 6


def _planted(images: list[np.ndarray]) -> dict[str, list[bytes]]:
    """Files of each image, as a crawl finds them again: untouched, recompressed, scaled, cropped, flipped."""

    def file(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
        content = io.BytesIO()
        image.save(content, kind, **options)
        return content.getvalue()

    pictures = [Image.fromarray(image).convert("RGB") for image in images]
    return {
        "original": [file(picture) for picture in pictures],
        "exact": [file(picture) for picture in pictures],
        "jpeg": [file(picture, "JPEG", quality=85) for picture in pictures],
        "larger": [file(picture.resize((56, 56), Image.Resampling.BICUBIC)) for picture in pictures],
        "cropped": [file(picture.crop((1, 1, 27, 27))) for picture in pictures],
        "mirrored": [file(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) for picture in pictures],
    }


@pytest.fixture(scope="module")
def planted(fashion_train, tmp_path_factory):
    """Thirty real images, each with five planted copies, embedded by a real network; the kinds in order."""
    source = ShardPool(fashion_train[0])
    ids = np.random.default_rng(0).choice(len(source), 30, replace=False)
    images = [np.asarray(Image.open(io.BytesIO(sample["png"]))) for sample in source.read(ids, ["png"])]
    folder, kinds = tmp_path_factory.mktemp("planted"), _planted(images)
    with ShardWriter(folder / "pool-%06d.tar") as writer:
        for kind, files in kinds.items():
            for i, content in enumerate(files):
                member = "jpg" if kind == "jpeg" else "png"
                writer.write({"__key__": f"{kind}{i}", member: content})
    pool = ShardPool(str(folder / "pool-*.tar"), cache_dir=folder / "cache")
    embedder = resolve_embedder("efficientnet_lite0:64")
    return pool, embed_pool(pool, embedder, folder / "cache", num_workers=0), list(kinds)


def test_planted_copies_of_real_images_are_found(planted):
    """Each copy is left out for its own original or another copy of it, never for another garment."""
    pool, store, kinds = planted
    found = near_duplicates(store, threshold=0.9)
    of_original = np.arange(len(pool)) % 30
    out = np.flatnonzero(found.near >= 0)
    assert (of_original[out] == of_original[found.near[out]]).all()
    check(found, store.as_array(), 0.9)
    stayed = found.keep.reshape(len(kinds), 30)
    kept_of = dict(zip(kinds, stayed.mean(axis=1)))
    assert (stayed[0] + stayed[kinds.index("exact")] <= 1).all()
    assert max(kept_of["jpeg"], kept_of["larger"]) < 0.5
    assert stayed.sum(axis=0).min() >= 1  # something of each image stays


def test_of_planted_copies_the_largest_stays(planted):
    _, store, kinds = planted
    contents = image_contents(planted[0])
    found = near_duplicates(
        store, threshold=0.9, same=exact_groups(contents.digest), prefer=contents.n_pixels
    )
    stayed = found.keep.reshape(len(kinds), 30)
    larger = kinds.index("larger")
    unit = directions(store.as_array()).reshape(len(kinds), 30, -1)
    near_larger = np.einsum("nd,nd->n", unit[0], unit[larger]) >= 0.9
    assert near_larger.mean() > 0.7
    assert stayed[larger].all()
    assert not stayed[0][near_larger].any()
    assert not (stayed[0] & stayed[kinds.index("exact")]).any()  # the same bytes


def test_known_copies_are_joined():
    x = np.eye(5, dtype=np.float32)
    found = near_duplicates(x, same=np.array([0, 1, 1, 3, 0]), prefer=np.array([0, 0, 1, 0, 1]))
    assert found.near.tolist() == [4, 2, -1, -1, -1]
    assert found.cosine[:2].tolist() == [0, 0]


def test_exact_groups_by_digest():
    digest = np.array([[0, 0], [5, 1], [5, 2], [5, 1], [0, 0]], np.uint64)
    assert exact_groups(digest).tolist() == [0, 1, 2, 1, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"n_neighbours": 0}, "n_neighbours=0"),
        ({"valid": np.ones(3, bool)}, r"valid .*\(4,\)"),
        ({"prefer": np.ones((4, 1))}, r"prefer .*\(4,\)"),
        ({"stay": np.ones(3, bool)}, r"stay .*\(4,\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        near_duplicates(np.ones((4, 2), np.float32), **arguments)


def test_image_contents_digest_bytes_and_read_sizes(tmp_path):
    rng = np.random.default_rng(0)

    def png(width: int, height: int, colour: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.full((height, width), colour, np.uint8)).save(file, "PNG")
        return file.getvalue()

    images = [png(4, 3, 9), png(5, 5, 9), png(4, 3, 9), b"broken", b"broken", rng.bytes(20)]
    with ShardWriter(tmp_path / "pool-%06d.tar", max_samples=4) as writer:
        for i, data in enumerate(images):
            writer.write({"__key__": f"s{i}", "png": data})
        writer.write({"__key__": "no-image", "txt": "words"})
        writer.write({"__key__": "no-image-2", "txt": "words"})
    contents = image_contents(ShardPool(str(tmp_path / "pool-*.tar")), ".PNG", batch_size=3)
    assert exact_groups(contents.digest).tolist() == [0, 1, 0, 3, 3, 5, 6, 7]
    assert contents.n_pixels.tolist() == [12, 25, 12, 0, 0, 0, 0, 0]


def test_image_contents_of_a_pool_without_images(tmp_path):
    with ShardWriter(tmp_path / "pool-%06d.tar") as writer:
        writer.write({"__key__": "a", "txt": "words"})
    with pytest.raises(PoolError, match="txt"):
        image_contents(ShardPool(str(tmp_path / "pool-*.tar")))
