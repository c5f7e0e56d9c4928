"""Every link of every Markdown file: files, images and anchors exist, addresses have the form of one."""

import re

import pytest

from tests.docs.markdown import ROOT, anchors, links, markdown_files


@pytest.mark.parametrize("page", markdown_files())
def test_links_resolve(page):
    for link in links(page):
        if "{{" in link or "[[" in link:  # a template of a model card, filled in when a card is written
            assert page.startswith("model_cards/"), link
        elif re.match(r"[a-z]+:", link):
            assert re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]{2,}(/[^\s]*)?", link), f"{page}: {link}"
        else:
            path, _, fragment = link.partition("#")
            target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
            assert target.exists(), f"{page}: {link}"
            assert target == ROOT or ROOT in target.parents, f"{page}: {link} leaves the repository"
            if fragment:
                assert fragment in anchors(str(target.relative_to(ROOT))), f"{page}: {link}"


def test_the_check_sees_the_pages():
    found = markdown_files()
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/grpo_mix.md"} <= set(found)
    assert len([link for page in found for link in links(page)]) > 50
    # Code spans, punctuation and repeated headings, as GitHub does it
    assert "logitmixgrpotrainer-two-objectives" not in anchors("README.md")
    assert {"changelog", "unreleased", "added"} <= anchors("CHANGELOG.md")
