"""The offline study: its live baseline and its gradients against plain loops, and its arms on their data."""

import re

import pytest
import torch
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer

from reproduce import offline_opd_policies as policies
from reproduce.live_opd import LiveOPDTrainer, SampledTokenOPDTrainer
from reproduce.offline_opd import ARMS, METRICS, make_trainer
from reproduce.offline_opd_data import make_data, restyle, restyled_dataset
from reproduce.offline_opd_policies import Rollouts, completion_logprobs, gradient_discrepancy, mean_kl, roll_out
from testbed.evaluate import CHECKPOINTS, load_checkpoint
from testbed.task import MAX_NEW_TOKENS, build_prompt_dataset
from tests.tiny import tiny_model, tiny_tokenizer


STUDENT, TEACHER = CHECKPOINTS / "sft_student", CHECKPOINTS / "teacher"


# The live baseline


def live_gradient(trainer_class, tmp_path):
    """Gradient of one live step of tiny models and the batch that it was taken on."""
    seen = {}

    class Recording(trainer_class):
        def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
            seen["inputs"] = inputs
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)

    args = DistillationConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=16, max_steps=1, max_completion_length=24,
        learning_rate=0.0, max_grad_norm=0.0, bf16=False, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    student, teacher = tiny_model(seed=0), tiny_model(seed=1)
    prompts = Dataset.from_dict({"prompt": [f"{n}+{n}=" for n in range(16)]})
    trainer = Recording(
        model=student, teacher_model=teacher, args=args, train_dataset=prompts, processing_class=tiny_tokenizer()
    )
    gradients = {}

    def keep(*_):
        gradients.update({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return gradients, seen["inputs"], student, teacher, trainer


def test_the_live_baseline_has_the_gradient_of_the_formula(tmp_path):
    gradients, inputs, student, teacher, trainer = live_gradient(SampledTokenOPDTrainer, tmp_path)
    lengths = inputs["completion_mask"].sum(dim=1).tolist()
    assert len(set(lengths)) > 1  # sequences of one length would not tell the two aggregations apart
    loss = torch.zeros(())
    for row, length in enumerate(lengths):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
        tokens = inputs["completion_ids"][row][:length]
        ids = torch.cat([prompt, tokens])[None]
        logps = [
            model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)[torch.arange(length), tokens]
            for model in (student, teacher)
        ]
        advantage = (logps[1] - logps[0]).detach()
        loss = loss - (advantage * logps[0]).mean() / len(lengths)
    student.zero_grad()
    loss.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert trainer.tokens == [sum(lengths)]
    assert trainer.rollout_seconds > 0.0 and trainer.teacher_seconds > 0.0
    assert "live/reverse_kl" in trainer.state.log_history[0]


def test_the_other_live_baseline_is_that_of_trl(tmp_path):
    torch.manual_seed(3)
    own, *_ = live_gradient(LiveOPDTrainer, tmp_path)
    torch.manual_seed(3)
    theirs, *_ = live_gradient(DistillationTrainer, tmp_path)
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)


# Gradients and policies


def plain_gradient(model, sampler, teacher, rollouts):
    """The expected gradient in plain loops, one token at a time."""
    loss = torch.zeros(())
    for row in range(len(rollouts.ids)):
        prompt = rollouts.ids[row, : rollouts.width][rollouts.mask[row, : rollouts.width].bool()]
        tokens = rollouts.tokens[row][rollouts.counts[row]]
        for end in range(len(tokens)):
            prefix = torch.cat([prompt, tokens[:end]])[None]
            own, drawn, wanted = (m(prefix).logits[0, -1].log_softmax(-1) for m in (model, sampler, teacher))
            term = (drawn.detach().exp() * (own.detach() - wanted.detach()) * own).sum()
            loss = loss + term / len(tokens) / len(rollouts.ids)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_gradient_discrepancy_against_plain_loops(monkeypatch):
    model, start, teacher = tiny_model(seed=0).eval(), tiny_model(seed=1).eval(), tiny_model(seed=2).eval()
    tokenizer = tiny_tokenizer()
    prompts = [[{"role": "user", "content": text}] for text in ("1+2=", "34+5=", "6=", "7+8+9=")]
    monkeypatch.setattr(policies, "MAX_NEW_TOKENS", 6)
    drawn = []

    def recording(*args):
        drawn.append(roll_out(*args))
        drawn[-1].mask[len(drawn), -2:] = 0  # a shorter row: tiny models hardly ever end
        return drawn[-1]

    monkeypatch.setattr(policies, "roll_out", recording)
    found = gradient_discrepancy(model, start, teacher, tokenizer, prompts, seed=1)
    assert all(len(set(rollouts.counts.sum(dim=1).tolist())) > 1 for rollouts in drawn)
    live, other = (plain_gradient(model, model, teacher, rollouts) for rollouts in drawn[:2])
    offline = plain_gradient(model, start, teacher, drawn[2])
    expected = {
        "cosine": torch.cosine_similarity(offline, live, dim=0),
        "relative": (offline - live).norm() / live.norm(),
        "chance_cosine": torch.cosine_similarity(other, live, dim=0),
        "chance_relative": (other - live).norm() / live.norm(),
        "norm": live.norm(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-3), name
    assert expected["cosine"] < 0.99


def test_rollouts_end_at_their_end_token_and_leave_the_random_state():
    model, tokenizer = load_checkpoint(STUDENT)
    prompts = list(build_prompt_dataset("test", 12)["prompt"])
    before = torch.get_rng_state()
    rollouts = roll_out(model, prompts, tokenizer, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    for row in range(12):
        kept = rollouts.tokens[row][rollouts.counts[row]].tolist()
        assert tokenizer.eos_token_id not in kept[:-1]
        assert kept[-1] == tokenizer.eos_token_id or len(kept) == MAX_NEW_TOKENS
    again = roll_out(model, prompts, tokenizer, seed=5)
    assert torch.equal(rollouts.ids, again.ids)


def test_log_probabilities_do_not_depend_on_the_padding():
    model, tokenizer = load_checkpoint(STUDENT)
    rollouts = roll_out(model, [[{"role": "user", "content": t}] for t in ("1+2=?", "907+895=?")], tokenizer, seed=0)
    with torch.no_grad():
        together = completion_logprobs(model, rollouts)
        for row in range(2):
            mask = rollouts.mask[row : row + 1]
            kept = rollouts.ids[row : row + 1][:, mask[0].bool()]
            width = int(mask[0, : rollouts.width].sum())
            alone = completion_logprobs(model, Rollouts(kept, torch.ones_like(kept), width))
            torch.testing.assert_close(together[row][rollouts.counts[row]], alone[0], rtol=1e-4, atol=1e-4)


def test_mean_kl():
    p, q = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]), torch.tensor([[[0.25, 0.75], [0.5, 0.5]]])
    counts = torch.tensor([[True, False]])
    assert mean_kl(p.log(), q.log(), counts) == pytest.approx(0.5 * torch.tensor(2.0).log().item() + 0.5 * -0.405465)


# Arms


def test_the_second_style_is_the_same_addition():
    assert restyle("3+6+0=09,2+5+0=07,1+4+0=05") == "0:3+6=09;0:2+5=07;0:1+4=05"
    row = restyled_dataset(3, seed=1)[0]
    a, b = map(int, re.findall(r"\d+", row["prompt"][0]["content"]))
    text = row["completion"][0]["content"]
    assert text.endswith(f"\\boxed{{{a + b}}}") and "," not in text
    for carry, x, y, total in re.findall(r"(\d):(\d)\+(\d)=(\d\d)", text):
        assert int(carry) + int(x) + int(y) == int(total)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folder of the data of arms which need none of the models that take minutes to train."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("second", "late_student"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize("name", ["offline", "offline_ratio", "offline_topk", "offline_4"])
def test_offline_arms_take_their_steps_on_their_data(name, work, tmp_path):
    arm = ARMS[name]
    made = make_data(arm.data, work, seed=0, steps=1, with_top_k=arm.loss == "top_k")
    assert made["tokens"] > 64 * 20 and made["collect_seconds"] >= 0.0 and 0.0 < made["bytes_per_token"] < 12.0
    trainer = make_trainer(arm, work, seed=0, steps=1, scratch=str(tmp_path))
    assert (trainer.args.importance_correction == "token") == (name == "offline_ratio")
    trainer.train()
    assert {finding.severity for finding in trainer.consistency_report.findings} <= {"ok", "info", "warning"}
    rows = trainer.rollout_store.dataset()
    assert len(rows) == 64 and len({tuple(ids) for ids in rows["prompt_ids"]}) == 64 // arm.data.rollouts_per_prompt
    assert set(METRICS) & set(trainer.state.log_history[0]) >= {"loss", "offline/drift_kl", "offline/reverse_kl"}
