"""Every public name has an example in its docstring, and each runs and prints what it shows.

Examples find a pool in their folder: `pool-{000..001}.tar`, 40 small labelled images.
"""

import doctest
import inspect
from types import ModuleType

import pytest

import curated_data
import lightning_modules
import lightning_modules.evaluation
import lightning_modules.maps
import lightning_modules.transport

PACKAGES: tuple[ModuleType, ...] = (
    curated_data,
    lightning_modules,
    lightning_modules.evaluation,
    lightning_modules.maps,
    lightning_modules.transport,
)
NAMES = [
    (package, name)
    for package in PACKAGES
    for name in package.__all__
    if not (inspect.isclass(getattr(package, name)) and issubclass(getattr(package, name), Exception))
]


@pytest.mark.parametrize(("package", "name"), NAMES, ids=[f"{p.__name__}.{name}" for p, name in NAMES])
def test_the_example_runs(package, name, write_pool, tmp_path, monkeypatch):
    write_pool([25, 15])
    monkeypatch.chdir(tmp_path)
    subject = getattr(package, name)
    found = doctest.DocTestFinder(recurse=False).find(subject, name, globs={})
    assert sum(len(test.examples) for test in found), f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in found:
        runner.run(test)
    assert not runner.failures, f"{name}: see the output"
