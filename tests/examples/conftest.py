"""The demo model's scripts as modules: they import each other as they do when one of them is run."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

DEMO_MODEL = Path(__file__).parents[2] / "examples" / "demo_model"


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    def load(name: str) -> ModuleType:
        sys.path.insert(0, str(DEMO_MODEL))
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(str(DEMO_MODEL))

    return load


@pytest.fixture(scope="session")
def demo_model_directory() -> Path:
    return DEMO_MODEL
