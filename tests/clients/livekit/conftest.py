"""Starts the server as the other Python clients' tests do."""

import importlib.util
import pathlib
import sys

import pytest

_here = pathlib.Path(__file__).parent
# For `line`, which cuts connections.
sys.path.append(str(_here.parent / "pipecat"))
# For what the server's own fixture asks for.
sys.path.append(str(_here.parent / "python"))
_spec = importlib.util.spec_from_file_location("electron_server", _here.parent / "python" / "conftest.py")
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

KEYS = _module.KEYS
bot_url = _module.bot_url
server = _module.server


@pytest.fixture(scope="session")
def key():
    return KEYS["normal"]
