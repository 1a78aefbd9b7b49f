"""README and docs/: links lead somewhere, named files and commands exist, and the plans and scripts of the guides run."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest

from launch import cli, plan, slurm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The words of indented lines, continued lines joined, comments left out."""
    lines = re.findall(r"^    (\S.*)$", page.read_text().replace("\\\n", " "), flags=re.MULTILINE)
    found = []
    for line in lines:
        if re.match(r"(alf-moe|\.venv/bin/alf-moe|make|python|torchrun|deepspeed) ", line):
            found.append(shlex.split(line, comments=True))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_configurations_and_commands_exist(page: Path):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link
    for words in commands(page):
        for before, word in itertools.pairwise(words):
            if before == "--config" and word.startswith("configs/"):
                assert (ROOT / word).is_file(), word
        if words[0].endswith("alf-moe"):
            assert words[1] in cli.COMMANDS, words
        if words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), words


PLANS = [words for page in PAGES for words in commands(page) if words[:2] == ["alf-moe", "plan"]]
SCRIPTS = [
    words for page in PAGES for words in commands(page) if words[:2] == ["alf-moe", "slurm"] and "..." not in words
]


@pytest.mark.parametrize("words", PLANS, ids=" ".join)
def test_plans_of_the_guides_fit(words: list[str], monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert plan.main(words[2:]) == 0


@pytest.mark.parametrize("words", SCRIPTS, ids=" ".join)
def test_scripts_of_the_guides_are_written(words: list[str], tmp_path: Path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "job.sh"
    words[words.index("--out") + 1] = str(out)
    assert slurm.main(words[2:]) == 0 and out.read_text().startswith("#!/usr/bin/env bash")


def test_the_guides_are_read():
    assert len(PLANS) >= 5 and len(SCRIPTS) >= 2
