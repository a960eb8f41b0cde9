"""The clusters that are kept for a resume: what was written, or one error that names the file."""

import numpy as np
import pytest

from curated_data.errors import CacheError
from curated_data.streaming.strata import strata


def kept(folder, ids=None, find=None):
    return strata(ids, 1, find=find, tree="0123456789abcdef0123", cache_dir=folder, keep=True)


def test_any_changed_byte_of_kept_clusters_is_told(tmp_path):
    ids, clusters = np.arange(3, 13), np.arange(10) % 3
    kept(tmp_path, ids, find=lambda level, ids: clusters)
    np.testing.assert_array_equal(kept(tmp_path, ids), clusters)
    (path,) = (tmp_path / "streaming").iterdir()
    whole = path.read_bytes()

    def is_told(place):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = kept(tmp_path, ids)
        except CacheError as error:
            return path.name in str(error)
        np.testing.assert_array_equal(found, clusters)  # a note of the archive's, such as a time
        return False

    assert sum(map(is_told, range(len(whole)))) > clusters.nbytes


@pytest.mark.parametrize("other", [np.arange(9), np.zeros((10, 1), int), np.zeros(10)])
def test_clusters_that_do_not_fit_the_ids_are_refused(tmp_path, other):
    ids = np.arange(10)
    kept(tmp_path, ids, find=lambda level, ids: other)
    with pytest.raises(CacheError, match=r"\.npz: "):
        kept(tmp_path, ids)
