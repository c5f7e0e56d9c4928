"""The parts of a card: comparison with a paper, names, tables of results, templates."""

from enum import Enum
from pathlib import Path

import jinja2
import pytest

from trl_blend._resources import model_card_template
from trl_blend.reports import cards
from trl_blend.reports.cards import CardTeacher, PaperValue


class Scheduler(Enum):
    COSINE = "cosine"


# Comparison with a paper


@pytest.mark.parametrize(
    ("value", "own", "same"),
    [
        (PaperValue("x", (1e-5,)), 1e-5, True),
        (PaperValue("x", (0.3,)), 0.1 + 0.2, True),
        (PaperValue("x", (1,)), 1.0, True),
        (PaperValue("x", (2e-6,)), 2.01e-6, False),
        (PaperValue("x", (1,)), True, False),
        (PaperValue("x", (0.001, 0.05)), 0.05, True),
        (PaperValue("x", (0.001, 0.05)), 0.01, False),
        (PaperValue("x", ("linear", "cosine")), Scheduler.COSINE, True),
        (PaperValue("x", (0.5,)), [0.5], True),
        (PaperValue("x", (0.5,)), [0.5, 0.1], False),
        (PaperValue("x", ((0.9, 0.98),)), (0.9, 0.98), True),
        (PaperValue("x", (None,)), None, True),
        (PaperValue("x", (None,)), 5, False),
        (PaperValue("x"), 5, False),
        (PaperValue("x", text="about 5"), 5, False),
    ],
)
def test_same_or_different(value, own, same):
    differences, agreements = cards.compare_with_paper({"x": value}, {"x": own, "y": 1})
    assert (len(agreements), len(differences)) == (same, not same)


def test_how_a_difference_is_shown():
    paper = {
        "a": PaperValue("lr", (1e-5,), "Table 2"),
        "b": PaperValue("budget", (0.001, 0.01, 0.05), "swept"),
        "c": PaperValue("weight"),
        "d": PaperValue("length", text="about 150", source="code"),
        "e": PaperValue("merge", (True,)),
        "f": PaperValue("steps", (15, 25)),
    }
    run = {"a": 3e-5, "b": None, "c": [0.25, 0.5], "d": 40, "e": False, "f": Scheduler.COSINE}
    assert cards.compare_with_paper(paper, run).differences == [
        ("lr", "3e-05", "1e-05 (Table 2)"),
        ("budget", "none", "0.001, 0.01 or 0.05 (swept)"),
        ("weight", "0.25, 0.5", "not given"),
        ("length", "40", "about 150 (code)"),
        ("merge", "no", "yes"),
        ("steps", "cosine", "15 or 25"),
    ]


def test_a_setting_without_a_value_of_the_run_is_an_error():
    with pytest.raises(KeyError, match="gone"):
        cards.compare_with_paper({"gone": PaperValue("x", (1,))}, {})


# Names and cells


def test_cells_and_code():
    assert cards.cell("a|b\nc  d") == "a\\|b c d" and cards.cell("") == "-" and cards.cell("<img>") == "&lt;img>"
    assert cards.code("a`b\nc") == "`a'b c`"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("org/a", None), "[org/a](https://huggingface.co/org/a)"),
        (("org/a", "1234567890abcdef"), "[org/a](https://huggingface.co/org/a) at commit `1234567890ab`"),
        (
            ("/x/models--org--a/snapshots/" + "9" * 40,),
            "[org/a](https://huggingface.co/org/a) at commit `999999999999`",
        ),
        (("org/a", None, "datasets/"), "[org/a](https://huggingface.co/datasets/org/a)"),
        (("/x/y/a", "1234"), "`a` (a local model)"),
        (("/x/y/a", None, "datasets/"), "`a` (a local dataset)"),
        (("",), "a model without a name"),
        ((None, None, "datasets/"), "a dataset without a name"),
    ],
)
def test_model_link(arguments, text):
    assert cards.model_link(*arguments) == text


def test_teacher():
    assert CardTeacher("org/a", None, "float32", "stated", "").shown == f"{cards.model_link('org/a')}, float32"
    assert CardTeacher(None, None, None, "unknown", "").shown == "a model without a name"


# Results


def log(step, **metrics):
    return {"step": step, "epoch": 0.5, **{name.replace("__", "/"): value for name, value in metrics.items()}}


def test_evaluations_first_and_last():
    history = [
        log(1, loss=9.0),
        log(2, eval_loss=0.5, eval_reward=0.25, eval_runtime=1.0),
        log(4, eval_loss=0.4, eval_reward=0.5, eval_runtime=1.0),
        log(6, eval_loss=0.123456, eval_runtime=1.0),
        log(6, train_loss=3.0),
    ]
    assert cards.evaluation_table(history, "loss|reward") == (
        ("metric", "step 2", "step 6"),
        [("loss", "0.5", "0.1235"), ("reward", "0.25", "-")],
    )
    assert cards.evaluation_table(history[:2], "loss") == (("metric", "step 2"), [("loss", "0.5")])
    assert cards.evaluation_table(history, "reverse_kl") is None
    assert cards.evaluation_table([], "loss") is None


def test_a_metric_of_the_deployed_policy_is_shown_once():
    history = [log(2, eval_reward=0.5, eval_mixed__reward=0.5, eval_student__reward=0.25)]
    _, rows = cards.evaluation_table(history, r"((mixed|student)/)?reward")
    assert rows == [("mixed/reward", "0.5"), ("student/reward", "0.25")]


def test_several_evaluation_sets():
    history = [
        log(2, eval_a_loss=0.5, eval_a_runtime=1.0, eval_kl=0.1),
        log(2, eval_b_loss=0.6, eval_b_runtime=1.0, eval_kl=0.2),
    ]
    _, rows = cards.evaluation_table(history, r"(?:.+_)?(loss|kl)")
    assert rows == [("a_loss", "0.5"), ("a_kl", "0.1"), ("b_loss", "0.6"), ("b_kl", "0.2")]


RESULTS = {
    "rewards": ["accuracy", "format"],
    "prompts": 50,
    "before": {"student": [(0.25, 0.01), (1.0, 0.0)], "mixed, 0.5": [(0.5, 0.02), (0.9, 0.03)]},
    "after": {"student": [(0.75, 0.04), (0.5, 0.05)], "mixed, 0.2": [(0.8, 0.06), (0.7, 0.07)]},
}


def test_before_of_a_run_that_went_on_from_a_checkpoint():
    header, rows = cards.before_after_table({**RESULTS, "before_step": 5})
    assert header == ("policy", "reward", "at step 5", "after") and rows == cards.before_after_table(RESULTS)[1]


def test_before_and_after():
    assert cards.before_after_table(RESULTS) == (
        ("policy", "reward", "before", "after"),
        [
            ("student", "accuracy", "0.250 ± 0.010", "0.750 ± 0.040"),
            ("student", "format", "1.000 ± 0.000", "0.500 ± 0.050"),
            ("mixed, 0.5; after: mixed, 0.2", "accuracy", "0.500 ± 0.020", "0.800 ± 0.060"),
            ("mixed, 0.5; after: mixed, 0.2", "format", "0.900 ± 0.030", "0.700 ± 0.070"),
        ],
    )


# Templates


@pytest.fixture
def rendered(tmp_path, monkeypatch):
    """`rendered(text, **fields)` is a template of that text with its fields filled in."""
    monkeypatch.setattr(cards, "model_card_template", lambda name: str(tmp_path / name))

    def render(template, /, **fields):
        (tmp_path / "card.md").write_text(template, encoding="utf-8")
        return cards.render("card.md", fields)

    return render


def test_own_fields_are_filled_and_those_of_trl_left(rendered):
    text = "[[ weight ]] {{ model_name }} [% if weight %]yes[% else %]no[% endif %] {% if wandb_url %}x{% endif %}\n"
    assert rendered(text, weight=0.3) == "0.3 {{ model_name }} yes {% if wandb_url %}x{% endif %}\n"


def test_block_lines_leave_no_blank_lines(rendered):
    assert rendered("a\n[% if flag %]\nb\n[% endif %]\nc\n", flag=True) == "a\nb\nc\n"


def test_a_missing_field_is_an_error(rendered):
    with pytest.raises(jinja2.UndefinedError, match="weight"):
        rendered("[[ weight ]]")


def test_what_is_filled_in_is_text_to_trl(rendered):
    name = "{{ model_name }} {% raw %} {# x #} }} %} '{{' {{{"
    filled = rendered("[[ name ]] {{ model_name }}", name=name)
    assert jinja2.Template(filled).render(model_name="m") == f"{name} m"


def test_paths_in_what_is_filled_in_are_hidden(rendered):
    text = rendered("[[ text ]]", text="in /home/me/x and ../runs/y z", local_names=["../runs/y z"])
    assert text == "in x and y z"


def test_an_unknown_template_names_the_known_ones():
    with pytest.raises(FileNotFoundError, match="logit_mix_grpo.md.*trust_region_opd.md") as raised:
        cards.render("nonsense.md", {})
    assert "_card.md" not in str(raised.value) and "README" not in str(raised.value)


def test_the_examples_are_no_templates():
    folder = Path(model_card_template("_card.md")).parent
    assert {path.name for path in folder.glob("*.md")} == {
        "_card.md", "_mixed_usage.md", "_pipeline.md", "_table.md", "logit_mix_grpo.md", "mixed_policy.md",
        "offline_opd.md", "trust_region_opd.md",
    }  # fmt: skip
