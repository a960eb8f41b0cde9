"""What an import takes from a folder, and that all it leaves out is counted."""

import io
import json
import os
import socket
import threading

import numpy as np
import pytest
from PIL import Image

from curated_data.errors import PoolError
from curated_data.pool import ShardPool, ShardWriter, import_folder


@pytest.fixture
def make(tmp_path, photo):
    """Files below `in`: images by their extension, and whatever else."""

    def make(*names, content=None):
        for number, name in enumerate(names):
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo(number) if content is None else content)
        return tmp_path / "in"

    return make


def imported(folder, out, **options):
    pool = ShardPool(import_folder(folder, out, **options))
    ids = np.arange(len(pool))
    return dict(zip(pool.keys(ids), pool.labels(ids).tolist(), strict=True))


def classes_in(out):
    return json.loads((out / "classes.json").read_text())


class TestLinks:
    def test_cycles_end_and_nothing_is_found_twice(self, make, tmp_path, caplog):
        """Each of these doubles the paths of the one before it."""
        folder = make("a/1.jpg", "b/2.jpg", "b/deep/er/3.jpg")
        for number in range(12):
            (folder / "a" / f"loop{number}").symlink_to(folder, target_is_directory=True)
            (folder / "b" / "deep" / f"up{number}").symlink_to("..", target_is_directory=True)
        done = threading.Event()
        found = {}

        def work():
            found.update(imported(folder, tmp_path / "out"))
            done.set()

        threading.Thread(target=work, daemon=True).start()
        assert done.wait(60)
        assert found == {"a/1": 0, "b/2": 1, "b/deep/er/3": 1}
        assert "24 links to folders that are visited anyway" in caplog.text

    def test_a_cycle_outside(self, make, tmp_path):
        folder = make("a/1.jpg")
        outside = tmp_path / "outside"
        (outside / "x").mkdir(parents=True)
        (outside / "x" / "2.jpg").write_bytes(b"x")
        (outside / "x" / "again").symlink_to(outside)
        (outside / "x" / "home").symlink_to(folder)
        (folder / "b").symlink_to(outside)
        (folder / "c").symlink_to(outside)  # the same images as b
        assert imported(folder, tmp_path / "out") == {"a/1": 0, "b/x/2": 1}
        assert classes_in(tmp_path / "out") == ["a", "b"]

    def test_links_to_folders_and_files_elsewhere_are_followed(self, make, tmp_path):
        """As in data sets that are made of links."""
        make("../store/cat/1.jpg", "../store/2.jpg")
        folder = make("dog/3.jpg")
        (folder / "cat").symlink_to("../store/cat")
        (folder / "dog" / "2.jpg").symlink_to("../../store/2.jpg")
        assert imported(folder, tmp_path / "out") == {"cat/1": 0, "dog/2": 1, "dog/3": 1}

    def test_the_class_is_that_of_the_folder_and_not_of_a_link_to_it(self, make, tmp_path):
        folder = make("z/1.jpg")
        (folder / "a").symlink_to("z")
        assert imported(folder, tmp_path / "out") == {"z/1": 0}

    def test_links_to_hidden_folders_of_its_own(self, make, tmp_path):
        folder = make(".store/1.jpg")
        (folder / "a").symlink_to(".store")
        assert imported(folder, tmp_path / "out") == {"a/1": 0}


class TestLeftOut:
    def test_what_is_no_regular_file_is_not_opened(self, make, tmp_path, caplog):
        folder = make("a/1.jpg")
        os.mkfifo(folder / "a" / "pipe.jpg")
        (folder / "a" / "device.jpg").symlink_to("/dev/zero")
        with socket.socket(socket.AF_UNIX) as listener:
            os.chdir(folder / "a")  # the path of a socket is short
            try:
                listener.bind("socket.jpg")
            finally:
                os.chdir("/")
            found = {}
            thread = threading.Thread(
                target=lambda: found.update(imported(folder, tmp_path / "out")), daemon=True
            )
            thread.start()
            thread.join(60)
        assert found == {"a/1": 0}
        assert "3 no regular file" in caplog.text

    def test_what_macos_adds_is_counted_and_no_class(self, make, tmp_path, caplog):
        folder = make("a/1.jpg", "b/2.jpg")
        make("a/._1.jpg", "__MACOSX/a/._1.jpg", "__MACOSX/2.jpg", "a/.DS_Store", content=b"apple")
        assert imported(folder, tmp_path / "out") == {"a/1": 0, "b/2": 1}
        assert classes_in(tmp_path / "out") == ["a", "b"]
        assert "left out 4 files" in caplog.text
        assert "1 AppleDouble" in caplog.text
        assert "2 in __MACOSX" in caplog.text

    def test_folders_without_images_get_no_number(self, make, tmp_path, caplog):
        folder = make("b/1.jpg", "d/x/2.jpg")
        make("c/notes.txt", content=b"x")
        (folder / "a").mkdir()
        (folder / "e" / "f").mkdir(parents=True)
        assert imported(folder, tmp_path / "out") == {"b/1": 0, "d/x/2": 1}
        assert classes_in(tmp_path / "out") == ["b", "d"]
        assert "1 .txt" in caplog.text

    def test_images_beside_folders_without_images(self, make, tmp_path):
        folder = make("1.jpg")
        (folder / "empty").mkdir()
        make("__MACOSX/._1.jpg", content=b"apple")
        assert imported(folder, tmp_path / "out") == {"1": -1}
        assert not (tmp_path / "out" / "classes.json").exists()

    def test_every_file_is_counted_by_its_extension(self, make, tmp_path, caplog):
        folder = make("a/1.jpg")
        others = ["a/x.txt", "a/y.TXT", "a/z.csv", "a/README", "top.md", "a/p.heic", "b/q.HEIC"]
        make(*others, content=b"x")
        assert imported(folder, tmp_path / "out") == {"a/1": 0}
        assert f"left out {len(others)} files" in caplog.text
        for count in ("2 .txt", "1 .csv", "1 without an extension", "1 .md", "2 .heic (unsupported"):
            assert count in caplog.text

    def test_a_folder_of_nothing_but_unsupported_images(self, make, tmp_path, caplog):
        folder = make("a/p.heic", content=b"x")
        with pytest.raises(PoolError, match=str(folder)):
            import_folder(folder, tmp_path / "out")
        assert "1 .heic (unsupported" in caplog.text
        assert not (tmp_path / "out").exists()

    def test_with_a_decoder_they_are_images(self, make, tmp_path, monkeypatch):
        """A stand-in that Pillow registers, as pillow-heif does."""
        Image.init()
        monkeypatch.setitem(Image.EXTENSION, ".heic", "PNG")
        folder = make("a/p.heic")
        assert imported(folder, tmp_path / "out") == {"a/p": 0}

    def test_jfif_is_jpeg(self, make, tmp_path):
        folder = make("a/1.jfif", "a/2.JFIF", "a/2.jpg")
        assert imported(folder, tmp_path / "out") == {"a/1": 0, "a/2%2EJFIF": 0, "a/2%2Ejpg": 0}
        sample = ShardPool(tmp_path / "out" / "shard-000000.tar").read([0])[0]
        assert sample["jpg"] == (folder / "a" / "1.jfif").read_bytes()

    def test_classes_of_another_import_are_kept(self, make, tmp_path):
        folder = make("a/1.jpg", "b/2.jpg")
        import_folder(folder, tmp_path / "out" / "train-%d.tar")
        import_folder(folder, tmp_path / "out" / "again-%d.tar")  # of the same classes
        before = sorted(os.listdir(tmp_path / "out"))
        make("c/3.jpg")
        with pytest.raises(PoolError, match=r"classes\.json"):
            import_folder(folder, tmp_path / "out" / "val-%d.tar")
        assert classes_in(tmp_path / "out") == ["a", "b"]
        assert sorted(os.listdir(tmp_path / "out")) == before


class TestPillow:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA", "I;16"])
    def test_an_image_is_written_without_loss(self, tmp_path, mode):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8))
        image = Image.new("I;16", (7, 9), 300) if mode == "I;16" else image.convert(mode)
        with ShardWriter(tmp_path) as writer:
            writer.write({"__key__": "a", "png": image, "mask.png": image})
        sample = ShardPool(writer.shards).read([0])[0]
        for name in ("png", "mask.png"):
            read = Image.open(io.BytesIO(sample[name]))
            assert (read.mode, read.size) == (image.mode, image.size)
            assert np.array_equal(np.asarray(read), np.asarray(image))

    @pytest.mark.parametrize(
        ("name", "mode", "message"), [("jpg", "RGB", "'jpg'.*'png'"), ("png", "CMYK", "CMYK")]
    )
    def test_what_png_cannot_hold_is_named(self, tmp_path, name, mode, message):
        with ShardWriter(tmp_path) as writer, pytest.raises(PoolError, match=f"'a'.*{message}"):
            writer.write({"__key__": "a", name: Image.new(mode, (3, 3))})
