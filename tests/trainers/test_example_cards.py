"""The rendered cards of the test-bed runs, as they are committed."""

from pathlib import Path

import pytest
import yaml

from testbed import cards
from tests.trainers.card_reading import assert_sound, metadata_of, rows_of, run_of, tables_of


ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def test_every_example_has_a_card_and_the_page_its_command():
    folder = ROOT / "model_cards" / "examples"
    assert folder == cards.CARDS
    assert {path.name for path in folder.iterdir()} == {*cards.NAMES, "README.md"}
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert "python examples/testbed/cards.py" in page
    assert all(f"]({name}/README.md)" in page for name in cards.NAMES)
    for name in cards.NAMES:
        assert {path.name for path in (folder / name).iterdir()} == set(cards.KEPT)
        assert (folder / name / "training_curves.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("name", cards.NAMES)
def test_card(name):
    card = (cards.CARDS / name / "README.md").read_text(encoding="utf-8")
    settings = yaml.safe_load((ROOT / "examples" / "configs" / f"{name}_testbed.yaml").read_text())
    assert_sound(card)
    assert "/checkpoints" not in card and "](training_curves.png)" in card
    assert metadata_of(card)["model_name"] == f"{name}_testbed"
    run = run_of(card)
    start = Path(settings["model_name_or_path"]).name
    assert run["started from"] == f"`{start}` (a local model)"
    assert run["teacher"] == "`teacher` (a local model), float32"
    assert run["length"].startswith(f"{settings['max_steps']} of {settings['max_steps']} optimizer steps")
    assert run["per step"].startswith(f"{settings['per_device_train_batch_size']} rollouts")
    assert f"{settings['learning_rate']:g}" in card
    header, *rows = tables_of(card)["Results"]
    assert header == ["policy", "reward", "before", "after"]
    rewards = {row[1].removesuffix("_reward") for row in rows}
    assert rewards == {"format_and_answer", "answer", "format"}
    student = next(row for row in rows if row[0].startswith("student") and row[1].startswith("format_and_answer"))
    assert float(student[3].split()[0]) > float(student[2].split()[0])  # what the page of the test-bed says
    verified = run["identity of the teacher"].startswith("**verified**")
    assert verified == (name == "offline_opd")
    assert rows_of(card)
