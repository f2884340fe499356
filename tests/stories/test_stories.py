"""Plays every story in this folder; see play.py."""

import os
from pathlib import Path

import pytest

from tests.stories.play import Story, paragraphs

STORIES = sorted(Path(__file__).parent.glob("*.story"))


@pytest.mark.parametrize("file", STORIES, ids=lambda file: file.stem)
def test_story(file: Path) -> None:
    story = Story()
    told, played = [], []
    for comment, command, expected in paragraphs(file):
        if not command:
            told.append(comment.strip())
            played.append(comment.strip())
            continue
        told.append(f"{comment}{command}\n----\n{expected}")
        played.append(f"{comment}{command}\n----\n{story.play(command)}")
    if os.environ.get("KVMHV_STORIES") == "rewrite":
        file.write_text("\n\n".join(played) + "\n")
        return
    assert "\n\n".join(played) == "\n\n".join(told)


def test_there_are_stories() -> None:
    assert len(STORIES) >= 8
