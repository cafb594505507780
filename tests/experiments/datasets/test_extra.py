"""Says, by skipping, which package keeps the other tests here from running."""

import pytest

from tests.experiments.datasets import PACKAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_package_of_the_extra_is_installed(package):
    pytest.importorskip(package)
