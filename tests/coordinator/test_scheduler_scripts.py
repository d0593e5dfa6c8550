"""The scheduler's behaviour, as transcripts that a person can read: tests/coordinator/scripts/*.txt.

Lines that start with `> ` are what the line above decides. OCTAVO_REWRITE=1 writes them anew: read them, then commit.
"""

import os
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.txt"))


def replay(scripted, text: str) -> str:
    out = []
    for line in text.splitlines():
        if line.startswith("> "):
            continue
        out.append(line)
        if line.strip() and not line.startswith("#"):
            answer = scripted.run(line)
            out += [f"> {answer}"] if answer else []
    return "\n".join(out) + "\n"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script(scripted, path):
    expected = path.read_text()
    actual = replay(scripted, expected)
    if os.environ.get("OCTAVO_REWRITE"):
        path.write_text(actual)
    else:
        assert actual == expected


def test_there_are_scripts():
    assert len(SCRIPTS) >= 10
