"""
Distil a teacher into a student from the teacher's log-probabilities of stored rollouts, and print how the student does
on held-out prompts before and after. No teacher is loaded.

The test-bed (two CPU cores, no network): `make demo-offline` runs all four stages. One by one:

    trl-blend rollouts --model_name_or_path my-sft --dataset_name prompts.jsonl --output_dir rollouts
    trl-blend score --teacher_model_name_or_path Qwen/Qwen3-8B --rollouts rollouts --output_dir scored
    trl-blend inspect scored --model_name_or_path my-sft
    accelerate launch examples/offline_opd.py --model_name_or_path my-sft --dataset_name scored --output_dir out

From several teachers, each with the scores of its own rows: `--dataset_name scored_math scored_code`.

With a table of accuracy, on prompts with reference answers:

    accelerate launch examples/offline_opd.py --model_name_or_path my-sft --dataset_name scored --output_dir out \
        --test_dataset_name my-org/my-prompts --prompt_column problem --answer_column answer \
        --reward_funcs rewards.boxed_accuracy_reward
"""

from itertools import islice

from datasets import Dataset
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_blend import OfflineOPDConfig, OfflineOPDTrainer, load_scored_rollouts
from trl_blend.errors import ConfigError
from trl_blend.rollouts.prompts import PromptTokens
from trl_blend.scripts.arguments import OfflineOPDScriptArguments
from trl_blend.scripts.data import load_test_prompts
from trl_blend.scripts.rewards import load_rewards
from trl_blend.scripts.running import run
from trl_blend.scripts.scoring import generating_model, greedy_scores, scoring_bar
from trl_blend.scripts.training import finish, train_and_score


def load_test(script_args, training_args, model_args):
    """Prompts of the table, its reward functions and their names."""
    if not script_args.test_dataset_name:
        return [], [], []
    names = script_args.reward_funcs
    if not names:
        raise ConfigError("`--reward_funcs` (what the table of `test_dataset_name` measures) is missing. Name it.")
    dataset = load_test_prompts(script_args, training_args, model_args)
    rewards = load_rewards(names, dataset.column_names)
    columns = [name.rpartition(".")[2] for name in names]
    return list(islice(dataset, script_args.num_test_prompts)), rewards, columns


def main(script_args, training_args, model_args):
    names = script_args.dataset_name
    if len(names) > 1 and script_args.dataset_revision:
        raise ConfigError(
            f"`dataset_revision={script_args.dataset_revision!r}` is of one repository, and `dataset_name` has "
            f"{len(names)}. Leave it out, or train on one."
        )
    scored = [load_scored_rollouts(name, revision=script_args.dataset_revision) for name in names]
    if script_args.max_completion_length is None:
        lengths = [(store.manifest.sampling or {}).get("max_new_tokens", 512) for store in scored]
        script_args.max_completion_length = max(lengths)
    rows, rewards, columns = load_test(script_args, training_args, model_args)

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    trainer = OfflineOPDTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=scored,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    def score():
        if not rows:
            return {}
        template_kwargs = scored[0].manifest.source.get("chat_template_kwargs")
        prompts = PromptTokens(Dataset.from_list(rows), trainer.processing_class, template_kwargs=template_kwargs)
        student = greedy_scores(
            generating_model(trainer.model_wrapped, trainer.accelerator),
            rows,
            prompts.ids(0, len(rows)),
            rewards,
            trainer.processing_class,
            trainer.state,
            accelerator=trainer.accelerator,
            generation_kwargs={"max_new_tokens": script_args.max_completion_length},
            batch_size=training_args.per_device_train_batch_size,
            progress=scoring_bar(trainer, "student"),
        )
        return {"student": student}

    scores = train_and_score(trainer, score)
    finish(trainer, scores, columns, len(rows), names[0] if len(names) == 1 else None)


def make_parser(prog=None):
    return TrlParser((OfflineOPDScriptArguments, OfflineOPDConfig, ModelConfig), prog=prog)


if __name__ == "__main__":
    run(main, make_parser)
