from __future__ import annotations

import pytest

from tests.fuzz.valid import Valid, make_valid


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Valid:
    return make_valid(tmp_path_factory.mktemp("valid") / "files")
