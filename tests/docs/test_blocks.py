"""
Every code block of the README and of the pages is run, on the checkpoints of the test-bed, cut to a few steps; but for
`NOT_RUN`, and the commands in `running.ONLY_CHECKED`. Those of the README are pasted in order into a clone as they
stand.
"""

import datasets
import pytest
import yaml
from transformers import dynamic_module_utils

from tests.docs.markdown import code_blocks, markdown_files
from tests.docs.running import command_lines, make_clone, make_world, run_command, run_python


PAGES = [page for page in markdown_files() if page.startswith(("README", "CONTRIBUTING", "examples/"))]
PAGES = [page for page in PAGES if code_blocks(page)]
_ON_A_GPU = ("distil_a_larger_model", "distil_without_the_teacher", "keep_the_format", "no_reward", "serve_a_mixture")
# Blocks that are only parsed: the pages say why
NOT_RUN = {
    ("examples/trust_region_opd.md", "needs 8 GPUs"),
    *((f"examples/recipes/{page}.md", "needs a GPU") for page in _ON_A_GPU),
}


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    as_it_stands = page == "README.md"
    (make_clone if as_it_stands else make_world)(tmp_path)
    variables = {"__name__": "__main__"}
    for block in code_blocks(page):
        try:
            if block.language == "python":
                assert not block.not_run
                run_python(block.code, str(block), variables, cut=not as_it_stands)
            elif block.language in ("bash", "sh"):
                for words in command_lines(block.code):
                    run_command(words, execute=block.not_run is None, cut=not as_it_stands)
            elif block.language == "yaml":
                assert isinstance(yaml.safe_load(block.code), dict)
            else:
                assert block.language == "text", "name the language of the block; `text` is for output and trees"
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block} failed:\n{block.code}") from error


def test_blocks_that_are_not_run_are_known():
    found = {(block.page, block.not_run) for page in PAGES for block in code_blocks(page) if block.not_run}
    assert found == NOT_RUN
