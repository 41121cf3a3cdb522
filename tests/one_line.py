"""The message of an error, which must be one line."""

from __future__ import annotations

import pytest


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message
