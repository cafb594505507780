"""What hypothesis keeps goes to a temporary folder, not into the clone."""

import hypothesis.configuration
import pytest


@pytest.fixture(scope="session", autouse=True)
def _hypothesis_home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hypothesis")
    hypothesis.configuration.set_hypothesis_home_dir(folder)
