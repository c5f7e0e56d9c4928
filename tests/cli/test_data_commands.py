"""`trl-blend`: options, configuration files, exit codes, one-line errors, and what `inspect` prints."""

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rollouts.collecting import rows_of, save_model, save_prompts
from trl_blend import RolloutConfig, ScoringConfig, cli
from trl_blend.cli import training
from trl_blend.rollouts import collect
from trl_blend.rollouts.config import StoreConfig
from trl_blend.rollouts.store import RolloutStore
from trl_blend.trainers._options import described_options


ROOT = Path(__file__).resolve().parents[2]
COLLECT = ["--max_completion_length", "6", "--rows_per_shard", "4", "--disable_tqdm"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A student, a teacher, prompts, and one store of each kind, made by the commands."""
    folder = tmp_path_factory.mktemp("world")
    paths = {name: str(folder / name) for name in ("student", "teacher", "prompts.jsonl", "rollouts", "scored")}
    save_model(paths["student"])
    save_model(paths["teacher"], seed=1)
    save_prompts(paths["prompts.jsonl"], count=6)
    assert cli.main([*rollouts_command(paths), *COLLECT]) == 0
    assert cli.main([*score_command(paths), "--top_k", "3", "--disable_tqdm"]) == 0
    return paths


def rollouts_command(paths, output="rollouts"):
    command = ["rollouts", "--model_name_or_path", paths["student"], "--dataset_name", paths["prompts.jsonl"]]
    return [*command, "--output_dir", paths.get(output, output)]


def score_command(paths, output="scored"):
    command = ["score", "--teacher_model_name_or_path", paths["teacher"], "--rollouts", paths["rollouts"]]
    return [*command, "--output_dir", paths.get(output, output)]


def fails(capsys, arguments):
    """The one line that a command with an error of the user prints."""
    status = cli.main(arguments)
    output, errors = capsys.readouterr()
    assert status == 2 and output == ""
    lines = errors.strip().splitlines()
    assert len(lines) == 1, errors
    return lines[0]


# -------------------- the commands


def test_the_commands_make_the_stores(world):
    store, scored = RolloutStore.open(world["rollouts"]), RolloutStore.open(world["scored"])
    assert [row["key"] for row in rows_of(store)] == [row["key"] for row in rows_of(scored)]
    assert len(rows_of(store)) == 6 and store.manifest.sampling["max_new_tokens"] == 6
    assert scored.manifest.scoring["top_k"] == 3


def test_what_is_printed_at_the_end(world, capsys):
    assert cli.main([*rollouts_command(world), *COLLECT]) == 0
    output = capsys.readouterr().out
    assert output.startswith("6 rollouts with ") and f"trl-blend inspect {world['rollouts']}" in output


@pytest.mark.parametrize(("command", "config"), [("rollouts", RolloutConfig), ("score", ScoringConfig)])
def test_help_names_every_option_and_its_default(capsys, command, config):
    assert cli.main([command, "--help"]) == 0
    text = "".join(capsys.readouterr().out.split())
    described = described_options(inspect.getdoc(StoreConfig)) | described_options(inspect.getdoc(config))
    for field in dataclasses.fields(config):
        known = field.default not in (None, dataclasses.MISSING)
        said = described[field.name] + (f"(default: {field.default!r})" if known else "")
        assert f"--{field.name}" in text and said.replace(" ", "") in text


def test_a_configuration_file(world, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    lines = [
        f"model_name_or_path: {world['student']}",
        f"dataset_name: {world['prompts.jsonl']}",
        "disable_tqdm: true",
    ]
    lines += ["max_completion_length: 3", "temperature: 0.5", "repair: false", "min_p: null", "seed: 4"]
    config.write_text("\n".join([*lines, "chat_template_kwargs: {enable_thinking: false}"]))
    folder = str(tmp_path / "store")
    given = ["--config", str(config), "--output_dir", folder, "--max_completion_length", "4"]
    assert cli.main(["rollouts", *given]) == 0
    sampling = RolloutStore.open(folder).manifest.sampling
    assert (sampling["max_new_tokens"], sampling["temperature"], sampling["seed"]) == (4, 0.5, 4)
    capsys.readouterr()
    config.write_text("temprature: 0.5")
    message = fails(capsys, [*rollouts_command(world), "--config", str(config)])
    assert f"`--config {config}`: unknown key `temprature`; did you mean `--temperature`?" in message
    config.write_text("temperature: hot")
    message = fails(capsys, [*rollouts_command(world), "--config", str(config)])
    assert "argument --temperature: invalid float value: 'hot'" in message
    config.write_text("mixed_precision: bf16")  # a key of `accelerate launch`, which this command does not start
    assert "unknown key `mixed_precision`" in fails(capsys, [*rollouts_command(world), "--config", str(config)])
    config.write_text("temperature: [")
    assert "is not YAML" in fails(capsys, [*rollouts_command(world), "--config", str(config)])
    config.write_text("- a list")
    assert "has to hold `option: value` lines" in fails(capsys, [*rollouts_command(world), "--config", str(config)])


def test_record_teacher(world, tmp_path, capsys):
    student = save_model(tmp_path / "student")
    command = ["record-teacher", "--model_name_or_path", student, "--teacher_model_name_or_path"]
    assert cli.main([*command, world["teacher"], "--note", "sft"]) == 0
    assert "as the SFT teacher of" in capsys.readouterr().out
    assert json.loads((tmp_path / "student" / "teacher_provenance.json").read_text())["note"] == "sft"
    assert "records another teacher" in fails(capsys, [*command, student])
    assert cli.main([*command, student, "--add"]) == 0
    assert f" and {student} (" in (output := capsys.readouterr().out) and "as the SFT teachers of" in output
    assert cli.main([*command, student, "--add", "--route", "math", "code"]) == 0
    assert "(route math, code) as the SFT teachers of" in capsys.readouterr().out
    assert cli.main([*command, student, "--overwrite"]) == 0
    capsys.readouterr()
    assert "is not a folder" in fails(capsys, [*command[:2], "nowhere", *command[3:], student])


# -------------------- inspect


def test_inspect_rollouts(world, capsys):
    assert cli.main(["inspect", world["rollouts"]]) == 0
    output = capsys.readouterr().out
    for text in ("rollouts, made ", "6 in 2 shards", "temperature=0.7, top_p=0.9", "bytes", "log-probs in float16"):
        assert text in output
    assert "teacher" not in output.split("Score it with")[0] and "trl-blend score --rollouts" in output


def test_inspect_scores_without_a_model(world, capsys):
    assert cli.main(["inspect", world["scored"], "--verify"]) == 0
    output = capsys.readouterr().out
    assert output.count(", tokenizer ") == 2  # student and teacher
    for text in (
        "3 teacher tokens per position",
        "[ok] manifest",
        "[ok] tokenizer",
        "policy_gap",
        "--model_name_or_path",
    ):
        assert text in output


def test_inspect_with_the_models(world, capsys):
    models = ["--model_name_or_path", world["student"], "--teacher_model_name_or_path", world["teacher"]]
    assert cli.main(["inspect", world["scored"], *models]) == 1
    output = capsys.readouterr().out
    assert "[missing] provenance" in output and "[ok] rescored" in output and "[ok] rollout_student" in output
    # The recorded student is the one to compare with where none is given
    assert cli.main(["inspect", world["scored"], *models[2:], "--sft_teacher", world["teacher"]]) == 0
    assert "stated, not verified" in capsys.readouterr().out


def test_inspect_as_json(world, capsys):
    assert cli.main(["inspect", world["scored"], "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["summary"]["num_rows"] == 6 and value["summary"]["bytes_per_token"] > 0
    assert value["consistency"]["ok"] and value["consistency"]["findings"][0]["name"] == "manifest"
    assert cli.main(["inspect", world["rollouts"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["consistency"] is None


def test_inspect_says_what_it_does_not_compare(world, capsys):
    given = ["--model_name_or_path", world["student"], "--sft_teacher", world["teacher"]]
    assert cli.main(["inspect", world["rollouts"], *given]) == 0
    note = f"note: {world['rollouts']} is not scored yet, so --model_name_or_path, --sft_teacher was not compared."
    assert note in capsys.readouterr().err
    assert cli.main(["inspect", world["scored"], *given]) == 0
    assert "note:" not in capsys.readouterr().err


def test_a_zero_of_a_configuration_file_counts(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(training, "run", lambda name, arguments, command: given.extend(arguments) or 0)
    (tmp_path / "demo.yaml").write_text("num_test_prompts: 0\nmax_steps: 7")
    assert cli.main(["demo", "--config", str(tmp_path / "demo.yaml")]) == 0
    assert given[given.index("--num_test_prompts") + 1] == "0" and given[given.index("--max_steps") + 1] == "7"


# -------------------- errors of the user


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["scor"], "unknown command `scor`; did you mean `score`? There are grpo-mix, "),
        (["help"], "unknown command `help`. There are"),
        (["--versoin"], "unknown option `--versoin`; did you mean `--version`?"),
        (["inspect"], "the following arguments are required: store"),
        (["inspect", "nowhere"], "'nowhere' is not a folder here"),
        (["inspect", str(ROOT / "tests")], "has no manifest.json"),
        (["score", "--rollouts", "r"], "required: --output_dir, --teacher_model_name_or_path"),
        (["score", "--config", "nowhere.yaml"], "`--config nowhere.yaml`: there is no such file."),
        (["score", "--config", "examples/configs/grpo_mix_testbd.yaml"], "did you mean `grpo_mix_testbed.yaml`?"),
        (["score", "--config"], "`--config` needs a value"),
        (["score", "--config", "tests"], "`--config tests` cannot be read: "),
        (["score", "--rolouts", "r"], "unknown option `--rolouts`; did you mean `--rollouts`? (see `trl-blend score"),
        (["inspect", "a", "b"], "unexpected argument `b` (see `trl-blend inspect --help`)"),
        (["demo", "--max-step", "3"], "unknown option `--max-step`; did you mean `--max_steps`?"),
    ],
)
def test_what_is_asked_for(capsys, arguments, message):
    assert message in fails(capsys, arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temp", "1"], "unknown option `--temp`"),
        (["--vllm_kwargs", "[]"], "`--vllm_kwargs='[]'` is not a JSON object"),
        (["--repair", "perhaps"], "argument --repair: "),
        (["--load_in_4bit"], "needs bitsandbytes"),
        (["--output_dir", str(ROOT)], "is not empty and no store of rollouts"),
        (["--seed", "1"], "started with other settings (there -> now): seed: 0 -> 1"),
    ],
)
def test_rollouts(world, capsys, options, message):
    assert message in fails(capsys, [*rollouts_command(world), *COLLECT, *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top_k", "64"], "`--top_k=64` must be less than the teacher's vocabulary size 64"),
        ([], "top_k: 3 -> 16"),
    ],
)
def test_score(world, capsys, options, message):
    assert message in fails(capsys, [*score_command(world), "--disable_tqdm", *options])


def test_an_error_of_ours_keeps_its_traceback(world, monkeypatch):
    monkeypatch.setattr(collect, "collect_rollouts", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(rollouts_command(world))


def test_running_out_of_memory(world, monkeypatch, capsys):
    class OutOfMemoryError(RuntimeError):
        pass

    def fail(*args, **kwargs):
        raise OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(collect, "collect_rollouts", fail)
    assert "Lower --batch_size" in fails(capsys, rollouts_command(world))


def test_other_processes_say_which_they_are(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert fails(capsys, ["inspect", "nowhere"]).startswith("trl-blend (process 3): error: ")


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_silences_the_bars_of_transformers_too(world, tmp_path, quiet):
    command = [*rollouts_command(world, str(tmp_path / "store")), *COLLECT[:-1], *["--disable_tqdm"][:quiet]]
    done = subprocess.run(
        [sys.executable, "-m", "trl_blend", *command], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0
    assert ("Loading weights" in done.stderr, "%|" in done.stderr) == (not quiet, not quiet)
