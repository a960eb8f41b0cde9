"""The chart of a suite's figures: what its bars and lines show."""

import numpy as np

from lightning_modules.evaluation import Figure
from lightning_modules.evaluation.comparison import interval
from lightning_modules.evaluation.suite_result import SuiteResult

RNG = np.random.default_rng(0)
HITS = {name: (RNG.random(300) < share).astype(float) for name, share in (("a", 0.6), ("b", 0.8))}


def figures(name):
    hits = HITS[name]
    return {
        "set": {
            "k-NN": Figure(float(hits.mean()), hits),
            "NMI": Figure(0.4),
            "depth, RMSE": Figure(2.5, is_share=False, is_better="lower"),
            "effective rank": Figure(90.0, is_share=False),
        }
    }


def test_lower_is_better_stands_apart_and_figures_of_samples_have_their_intervals(tmp_path):
    result = SuiteResult({name: figures(name) for name in HITS})
    higher, lower = (axes for axes in result.chart().axes)
    assert (higher.get_title(loc="left"), lower.get_title(loc="left")) == (
        "higher is better",
        "lower is better",
    )
    assert [label.get_text() for label in higher.get_yticklabels()] == ["set: k-NN", "set: NMI"]
    assert [label.get_text() for label in lower.get_yticklabels()] == ["set: depth, RMSE"]
    for bars, (name, hits) in zip(higher.containers[1::2], HITS.items(), strict=True):
        assert bars.get_label() == name
        assert bars[0].get_width() == hits.mean()
        lines = bars.errorbar.lines[2][0].get_segments()
        np.testing.assert_allclose(lines[0][:, 0], interval(hits))
        assert np.ptp(lines[1][:, 0]) == 0  # the other figure is not made of samples
    result.plot(tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_without_figures_where_lower_is_better_there_is_one_panel():
    result = SuiteResult({"a": {"set": {"NMI": Figure(0.4)}}})
    assert len(result.chart().axes) == 1
