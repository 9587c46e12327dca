"""The site is built without a warning, and holds every page and the API."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pages
import pytest


def build(
    folder: Path, config: Path = pages.ROOT / "mkdocs.yml"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d"]
    return subprocess.run(
        [*command, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    built = {file.parent.name for file in site.rglob("index.html")}
    for page in (pages.ROOT / "docs").glob("*.md"):
        assert page.stem == "index" or page.stem in built, page


def test_the_api_is_made_of_docstrings(site: Path) -> None:
    text = (site / "api" / "index.html").read_text()
    for name in ("HybridExpertsConfig", "hybridize", "HybridExpertsCallback", "MemoryPlanError"):
        assert f'id="kt_sft.{name}"' in text or f".{name}" in text, name
    assert "storage of the frozen experts" in text


def test_a_link_that_leads_nowhere_is_a_failure(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("[nowhere](none.md)\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: broken\n")
    assert build(tmp_path / "site", tmp_path / "mkdocs.yml").returncode != 0
