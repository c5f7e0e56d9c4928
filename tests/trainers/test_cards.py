from pathlib import Path

import jinja2
import pytest

from trl_blend.trainers import _cards


@pytest.fixture
def template(tmp_path, monkeypatch):
    def write(text):
        path = tmp_path / "card.md"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setattr(_cards, "model_card_template", lambda name: str(tmp_path / name))

    return write


def test_own_fields_are_filled_and_those_of_trl_left(template):
    template(
        "[[ weight ]] {{ model_name }} [% if weight %]yes[% else %]no[% endif %] {% if wandb_url %}x{% endif %}\n"
    )
    with _cards.method_card("card.md", weight=0.3) as path:
        assert Path(path).name == "card.md"
        assert Path(path).read_text(encoding="utf-8") == "0.3 {{ model_name }} yes {% if wandb_url %}x{% endif %}\n"
    assert not Path(path).exists()


def test_block_lines_leave_no_blank_lines(template):
    template("a\n[% if flag %]\nb\n[% endif %]\nc\n")
    with _cards.method_card("card.md", flag=True) as path:
        assert Path(path).read_text(encoding="utf-8") == "a\nb\nc\n"


def test_a_missing_field_is_an_error(template):
    template("[[ weight ]]")
    with pytest.raises(jinja2.UndefinedError, match="weight"), _cards.method_card("card.md"):
        pass


def test_an_unknown_template_names_the_known_ones():
    known = "logit_mix_grpo.md.*trust_region_opd.md"
    with pytest.raises(FileNotFoundError, match=known), _cards.method_card("nonsense.md"):
        pass
