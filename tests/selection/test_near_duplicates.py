"""Near-duplicate groups against scikit-learn's DBSCAN with one point a core, and hand-made pools."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.cluster import DBSCAN
from sklearn.metrics.pairwise import cosine_similarity

from curated_data.embedding import embed_pool, resolve_embedder
from curated_data.errors import PoolError
from curated_data.pool import ShardPool, ShardWriter
from curated_data.selection.near_duplicates import (
    _cells,
    exact_groups,
    image_contents,
    match_held_out,
    near_duplicates,
)


def copies(n_originals: int, n_copies: int, dimension: int = 8, noise: float = 0.05, seed: int = 0):
    """Random directions, each followed by noisy copies, at random scales, in random order."""
    rng = np.random.default_rng(seed)
    x = np.repeat(rng.normal(size=(n_originals, dimension)), n_copies, axis=0)
    x += noise * rng.normal(size=x.shape)
    x *= rng.uniform(0.5, 2, (len(x), 1))
    return x[rng.permutation(len(x))].astype(np.float32)


def groups_by_dbscan(x: np.ndarray, threshold: float) -> np.ndarray:
    label = DBSCAN(eps=1 - threshold, min_samples=1, metric="cosine").fit(x).labels_
    smallest = {c: i for i, c in reversed(list(enumerate(label)))}
    return np.array([smallest[c] for c in label])


@settings(max_examples=40, deadline=None)
@given(
    n_originals=st.integers(1, 40),
    n_copies=st.integers(1, 4),
    noise=st.sampled_from([0.02, 0.1, 0.3]),
    cell_size=st.sampled_from([10, 37, 10_000]),
    seed=st.integers(0, 99),
)
def test_groups_are_those_of_dbscan_however_the_pool_is_cut(n_originals, n_copies, noise, cell_size, seed):
    x = copies(n_originals, n_copies, noise=noise, seed=seed)
    threshold = 0.9503  # of no pair to seven digits, so that rounding decides nothing
    found = near_duplicates(
        x, threshold=threshold, n_neighbours=len(x), cell_size=cell_size, n_probes=len(x), seed=seed
    )
    assert np.array_equal(found.group, groups_by_dbscan(x, threshold))
    similarity = cosine_similarity(x)
    expected = np.argwhere(np.triu(similarity >= threshold, 1))
    assert np.array_equal(found.pairs, expected)
    np.testing.assert_allclose(found.similarity, similarity[tuple(expected.T)], atol=1e-5)
    assert found.keep.sum() == len(np.unique(found.group))  # one of each group
    assert len(np.unique(found.group[found.keep])) == found.keep.sum()


def test_few_probes_find_nearly_all():
    x = copies(1500, 2, dimension=32, noise=0.1)
    whole = near_duplicates(x, threshold=0.95)
    cut = near_duplicates(x, threshold=0.95, cell_size=300, n_probes=2)
    assert len(whole.pairs) > 1000
    both = {tuple(p) for p in whole.pairs.tolist()} & {tuple(p) for p in cut.pairs.tolist()}
    assert len(both) == len(cut.pairs)  # finds nothing that is not there
    assert len(both) >= 0.98 * len(whole.pairs)
    again = near_duplicates(x, threshold=0.95, cell_size=300, n_probes=2)
    assert np.array_equal(again.keep, cut.keep)


@pytest.mark.parametrize("n_probes", [1, 3, 100])
def test_cells_by_their_definition(n_probes, monkeypatch):
    """Each sample's cell is that of its nearest pivot; its probes are the nearest others within reach."""
    monkeypatch.setattr("curated_data.selection.near_duplicates._PIVOT_DISTANCES", 130)  # a few rows at once
    x = copies(300, 2, dimension=4)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    ids = np.arange(len(x))
    home, probes = _cells(x, ids, 0.9, 20, n_probes, 64, 0)
    pivots = np.unique(x[np.sort(np.random.default_rng(0).choice(ids, 20, replace=False))], axis=0)
    squared = 2 - 2 * x @ pivots.T
    np.testing.assert_array_equal(home, squared.argmin(1))
    reach = np.sqrt(2 - 2 * 0.9) + 1e-3
    for q in range(len(x)):
        near = np.argsort(squared[q], kind="stable")[1:]
        apart = np.linalg.norm(pivots[near] - pivots[home[q]], axis=1)
        allowed = near[squared[q, near] - squared[q, home[q]] <= 2 * reach * apart + 1e-6][:n_probes]
        assert probes[q][probes[q] >= 0].tolist() == allowed.tolist()


def test_the_member_nearest_the_mean_is_kept():
    x = copies(30, 5, noise=0.1)
    found = near_duplicates(x, threshold=0.8)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for group in np.unique(found.group):
        members = np.flatnonzero(found.group == group)
        mean = unit[members].mean(axis=0)
        assert members[np.argmax(unit[members] @ mean)] == members[found.keep[members]].item()


def test_the_preferred_member_is_kept_and_ties_keep_the_first():
    x = np.ones((4, 3), np.float32)
    assert near_duplicates(x).keep.tolist() == [True, False, False, False]
    assert near_duplicates(x, prefer=np.array([1, 5, 9, 9])).keep.tolist() == [False, False, True, False]
    assert near_duplicates(x, threshold=1.0).group.tolist() == [0, 0, 0, 0]


def test_many_identical_samples_are_one_group_with_short_lists():
    x = np.concatenate([np.tile([[1.0, 2, 3]], (3000, 1)), copies(50, 1, 3, 0)]).astype(np.float16)
    found = near_duplicates(x, threshold=0.9999, n_neighbours=4, cell_size=500)
    assert (found.group[:3000] == 0).all()
    assert found.keep[:3000].sum() == 1


def test_samples_that_are_not_valid_take_no_part():
    x = np.ones((4, 3), np.float32)
    x[1] = np.nan
    found = near_duplicates(x, valid=np.array([False, False, True, True]))
    assert found.group.tolist() == [-1, -1, 2, 2]
    assert found.keep.tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="sample 1 is not finite"):
        near_duplicates(x)
    nothing = near_duplicates(x, valid=np.zeros(4, bool))
    assert not nothing.keep.any()
    assert nothing.pairs.shape == (0, 2)


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


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60),
    m=st.integers(1, 20),
    noise=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    threshold=st.sampled_from([0.2, 0.7, 0.95, 1.0]),
    prefer_largest=st.booleans(),
    seed=st.integers(0, 999),
)
def test_nothing_within_the_threshold_of_a_held_out_image_stays(n, m, noise, threshold, prefer_largest, seed):
    rng = np.random.default_rng(seed)
    held_out = rng.normal(size=(m, 6)).astype(np.float32)
    x = held_out[rng.integers(0, m, n)] + noise * rng.normal(size=(n, 6))
    x = (x * rng.uniform(0.1, 9, (n, 1))).astype(np.float32)
    valid = rng.random(n) < 0.9
    prefer = rng.integers(0, 5, n) if prefer_largest else None
    found = near_duplicates(
        x, valid=valid, threshold=threshold, prefer=prefer, held_out=held_out, cell_size=16
    )
    nearest = cosine_similarity(x.astype(np.float64), held_out.astype(np.float64)).max(axis=1)
    assert (nearest[found.keep] < threshold).all()
    matched = found.held_out_match >= 0
    assert (nearest[matched] > threshold - 1e-5).all()
    assert not (matched & ~valid).any()
    if threshold == 1.0 and noise == 0.0:
        assert not found.keep.any()


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
    """Each copy is linked to its own original; what is another garment is linked to none."""
    pool, store, kinds = planted
    found = near_duplicates(store, threshold=0.9)
    of_original = np.arange(len(pool)) % 30
    assert (of_original[found.pairs[:, 0]] == of_original[found.pairs[:, 1]]).all()
    group = found.group.reshape(len(kinds), 30)
    linked = dict(zip(kinds, (group == group[0]).mean(axis=1)))
    print(linked)
    assert linked["exact"] == 1
    assert min(linked["jpeg"], linked["larger"]) > 0.7
    assert found.keep.reshape(len(kinds), 30).sum(axis=0).min() >= 1  # something of each image stays


def test_of_planted_copies_the_largest_stays(planted):
    pool, store, kinds = planted
    contents = image_contents(pool)
    found = near_duplicates(
        store, threshold=0.9, same=exact_groups(contents.digest), prefer=contents.n_pixels
    )
    stayed = found.keep.reshape(len(kinds), 30)
    larger = kinds.index("larger")
    linked = found.group.reshape(len(kinds), 30)
    with_larger = linked[larger] == linked[0]
    assert stayed[larger].all()
    assert not stayed[0][with_larger].any()
    assert not stayed[kinds.index("exact")].any()  # the same bytes as the original


def test_known_copies_are_joined():
    x = np.eye(5, dtype=np.float32)
    found = near_duplicates(x, same=np.array([0, 1, 1, 3, 0]), prefer=np.array([0, 0, 1, 0, 1]))
    assert found.group.tolist() == [0, 1, 1, 3, 0]
    assert found.keep.tolist() == [False, False, True, True, True]


def test_exact_groups_by_digest():
    digest = np.array([[0, 0], [5, 1], [5, 2], [5, 1], [0, 0]], np.uint64)
    assert exact_groups(digest).tolist() == [0, 1, 2, 1, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"n_neighbours": 0}, "n_neighbours=0"),
        ({"valid": np.ones(3, bool)}, "valid needs shape"),
        ({"prefer": np.ones((4, 1))}, "prefer needs shape"),
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
    with pytest.raises(PoolError, match="no images, its members are txt"):
        image_contents(ShardPool(str(tmp_path / "pool-*.tar")))
