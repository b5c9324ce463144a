"""Starts the server as the other Python clients' tests do."""

import importlib.util
import pathlib
import sys

import pytest
from loguru import logger

_shared = pathlib.Path(__file__).parents[1] / "python" / "conftest.py"
# For what the server's own fixture asks for.
sys.path.append(str(_shared.parent))
_spec = importlib.util.spec_from_file_location("electron_server", _shared)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

# What Pipecat tells about every frame would bury a failure.
logger.remove()
logger.add(sys.stderr, level="WARNING")

KEYS = _module.KEYS
bot_url = _module.bot_url
server = _module.server


@pytest.fixture(scope="session")
def key():
    return KEYS["normal"]
