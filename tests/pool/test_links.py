"""Links within an archive, against what tarfile and GNU tar make of them."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curated_data.pool import ShardPool
from curated_data.pool.index import index_shard
from curated_data.pool.links import resolve_links
from curated_data.pool.tar import Link


def link(name: str, target: str, *, hard: bool = False) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type = tarfile.LNKTYPE if hard else tarfile.SYMTYPE
    info.linkname = target
    return info, b""


def contents(pool: ShardPool) -> dict[str, dict[str, bytes]]:
    return {
        sample["__key__"]: {name: value for name, value in sample.items() if not name.startswith("__")}
        for sample in pool.read(range(len(pool)))
    }


LONG = "d" * 90 + "/" + "n" * 90
MEMBERS = [
    ("x/a.jpg", b"image a"),
    ("x/a.cls", b"1"),
    link("x/b.jpg", "a.jpg"),
    link("x/b.cls", "x/a.cls", hard=True),
    link("y/c.jpg", "../x/a.jpg"),
    link("y/c.cls", "./../x/../x/./b.cls"),
    link("y/d.jpg", "c.jpg"),
    link("before.jpg", "later.png"),
    link("before.cls", "later.txt", hard=True),
    ("later.png", b"later"),
    ("later.txt", b"7"),
    link("to", "x"),  # a folder
    link("through.jpg", "to/a.jpg"),
    link("up.jpg", "to/../later.png"),
    (LONG + ".jpg", b"long"),
    link("e.jpg", LONG + ".jpg"),
    link("f.jpg", LONG + ".jpg", hard=True),
    ("blobs/0123", b"without an extension"),
    link("g.jpg", "blobs/0123"),
]
LOST = [
    link("out.jpg", "../secret.jpg"),
    link("root.jpg", "/etc/passwd"),
    link("none.jpg", "nowhere.jpg"),
    link("none2.jpg", "nowhere.jpg", hard=True),
    link("self.jpg", "self.jpg"),
    link("self2.jpg", "self2.jpg", hard=True),
    link("one.jpg", "two.jpg"),
    link("two.jpg", "one.jpg"),
    link("folder.jpg", "x"),
    link("deep.jpg", "x/../../x/a.jpg"),
]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_are_what_they_lead_to(write_tar, format):
    pool = ShardPool(write_tar("links.tar", MEMBERS + LOST, format))
    found = contents(pool)
    assert found == {
        "x/a": {"jpg": b"image a", "cls": b"1"},
        "x/b": {"jpg": b"image a", "cls": b"1"},
        "y/c": {"jpg": b"image a", "cls": b"1"},
        "y/d": {"jpg": b"image a"},
        "before": {"jpg": b"later", "cls": b"7"},
        "later": {"png": b"later", "txt": b"7"},
        "through": {"jpg": b"image a"},
        "up": {"jpg": b"later"},
        LONG: {"jpg": b"long"},
        "e": {"jpg": b"long"},
        "f": {"jpg": b"long"},
        "g": {"jpg": b"without an extension"},
    }
    notes = pool.index().notes
    assert notes["links"].number == len(LOST) + 1  # the folder's link itself
    assert "'to' -> 'x'" in notes["links"].example


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
def test_what_gnu_tar_packs(tmp_path):
    """A folder with links, packed by tar itself, as it unpacks."""
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    for number in range(3):
        (folder / "a" / f"{number}.jpg").write_bytes(b"image %d" % number)
        os.link(folder / "a" / f"{number}.jpg", folder / "a" / f"{number}.png")
        os.symlink(f"{number}.jpg", folder / "a" / f"{number}.webp")
        os.symlink(f"../a/{number}.webp", folder / "a" / f"{number}.bmp")
    path = tmp_path / "gnu.tar"
    subprocess.run(["tar", "--sort=name", "-cf", path, "-C", folder, "."], check=True)
    found = contents(ShardPool(path))
    assert len(found) == 3
    for key, sample in found.items():
        assert set(sample) == {"jpg", "png", "webp", "bmp"}
        for extension, content in sample.items():
            assert content == (folder / f"{key}.{extension}").read_bytes()


part = st.sampled_from(["a", "b", "c"])
member_name = st.lists(part, min_size=1, max_size=3).map(lambda parts: "/".join(parts))
target = st.lists(st.sampled_from(["a", "b", "c", "..", "."]), min_size=1, max_size=4).map("/".join)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(member_name, st.one_of(st.none(), target)), min_size=1, max_size=8, unique_by=lambda m: m[0]
    )
)
def test_symbolic_links_mean_what_the_system_makes_of_them(tmp_path_factory, members):
    """The same tree on disk, where the kernel follows the links."""
    root = tmp_path_factory.mktemp("tree") / "up" / "root"
    root.mkdir(parents=True)
    kept = []
    for name, leads in members:
        place = root / name
        if any((root / "/".join(name.split("/")[:n])).is_symlink() for n in range(1, name.count("/") + 1)):
            continue  # unpacking would write through a link
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if leads is None:
                place.write_bytes(name.encode())
            else:
                place.symlink_to(leads)
        except OSError:  # a file where a folder should be
            continue
        kept.append((name, leads))
    names = [name.encode() for name, _ in kept]
    links = [Link(i, leads.encode(), True) for i, (_, leads) in enumerate(kept) if leads is not None]
    found = resolve_links(names, links)
    for one in links:
        path = root / kept[one.place][0]
        try:
            content = path.read_bytes() if path.is_file() else None
        except OSError:
            content = None
        leads_out = content is not None and root not in _passed(path, root)
        if content is not None and not leads_out:
            assert names[found[one.place]] == content
        elif content is None and one.place in found:
            # Over folders that do not exist, as tarfile reads `missing/../a`, and `file/.`.
            assert any("." in leads for _, leads in kept if leads)


def _passed(path: Path, root: Path) -> list[Path]:
    """The root, unless following a link's `..`s leaves it on the way."""
    depth, at = 0, path
    for piece in os.readlink(at).split("/"):
        depth += {"..": -1, ".": 0}.get(piece, 1)
        if len(path.relative_to(root).parts) - 1 + depth < 0:
            return []
    return [root]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_hard_links_are_tarfiles(write_tar, data):
    """Any files and hard links to earlier members, also by names that occur twice."""
    members, names = [], []
    for number in range(data.draw(st.integers(1, 8))):
        name = f"{data.draw(st.sampled_from('ab'))}{number % 3}.x"
        if names and data.draw(st.booleans()):
            members.append(link(f"link{number}.x", data.draw(st.sampled_from(names)), hard=True))
            names.append(f"link{number}.x")
        else:
            members.append((name, b"<%d>" % number))
            names.append(name)
    path = write_tar("hard.tar", members, tarfile.GNU_FORMAT)
    with tarfile.open(path) as archive:
        expected = [archive.extractfile(member).read() for member in archive.getmembers()]
    index = index_shard(path)
    content = path.read_bytes()
    found = [
        content[offset : offset + size]
        for offset, size in zip(index.member_offset.tolist(), index.member_size.tolist(), strict=True)
    ]
    assert found == expected


def test_chains_and_cycles_take_little_time():
    n = 20_000
    names = [b"%d.x" % i for i in range(n)]
    chain = [Link(i, b"%d.x" % (i - 1), False) for i in range(1, n)]
    assert resolve_links(names, chain) == dict.fromkeys(range(1, n), 0)
    cycle = [Link(i, b"%d.x" % ((i + 1) % n), True) for i in range(n)]
    assert resolve_links(names, cycle) == {}
    cycle = [Link(i, b"%d.x" % ((i + 1) % n), False) for i in range(n)]
    assert resolve_links(names, cycle) == {}
    many = [b"same.x"] * n
    assert len(resolve_links([*many, *names], [Link(n + i, b"same.x", False) for i in range(n)])) == n
