"""On-policy distillation whose early rollouts the teacher helps to decode, inside a trust region."""

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import DistillationTrainer

from trl_blend import _compat
from trl_blend.generation.hooks import blended_generation
from trl_blend.generation.rules import BlendRule, LogitMixing, SpeculativeKD, TrustRegion
from trl_blend.models.wrappers import evaluation_mode
from trl_blend.ops.head.reverse_kl import reverse_kl
from trl_blend.schedules import linear
from trl_blend.trainers import _cards, _partners
from trl_blend.trainers._run import RunMixin
from trl_blend.trainers._settings import read_settings, write_settings
from trl_blend.trainers.trust_region_opd import report
from trl_blend.trainers.trust_region_opd.base_teacher import BaseTeacher
from trl_blend.trainers.trust_region_opd.checks import check_arguments, check_loaded, find_eos_map
from trl_blend.trainers.trust_region_opd.config import TrustRegionOPDConfig
from trl_blend.trainers.trust_region_opd.diagnostics import Diagnostics, valid_positions
from trl_blend.trainers.trust_region_opd.report import PANELS
from trl_blend.trainers.trust_region_opd.rewards import RewardFunction, as_reward_functions
from trl_blend.trainers.trust_region_opd.temperature import sampling_temperature, warmed_up_sampling


logger = get_logger(__name__)

_SETTINGS_FILE = "trust_region_opd_settings.json"
# A resumed run with other values of these does not continue the interrupted one
_SETTINGS = (
    "rollout_policy",
    "kl_budget",
    "kl_budget_schedule",
    "blend_warmup_steps",
    "teacher_weight",
    "skd_top_k",
    "skd_teacher_temperature",
    "temperature_warmup_start",
    "temperature_warmup_steps",
    "num_rollouts_per_prompt",
    "kl_support",
    "kl_top_k",
    "distillation_target",
    "veto_weight_start",
    "veto_warmup_steps",
    "canonicalize_eos",
    "teacher_eos_token_id",
    "temperature",
    "beta",
)


class TrustRegionOPDTrainer(RunMixin, DistillationTrainer):
    r"""
    Trainer for on-policy distillation with trust-region behaviour blending.

    At every prefix of a training rollout the next token is drawn from the policy closest to the teacher inside a KL
    ball around the student (Eq. 1 and 2 of [the paper](https://huggingface.co/papers/2605.31159)):
    \\( \mu^* = \arg\min_\mu KL(\mu \| p_T) \\) subject to \\( KL(\mu \| p_S) \le \varepsilon \\), which is
    \\( \mu^* \propto p_S^{1-\beta^*} p_T^{\beta^*} \\) with the largest feasible \\( \beta^* \in [0, 1] \\). The
    budget \\( \varepsilon \\) is annealed to 0 (Eq. 3), and from there on rollouts are those of
    [`~trl.DistillationTrainer`], through its own code. The loss stays the reverse KL at the visited prefixes, without
    importance correction. The paper's baselines are settings of the same trainer, see [`TrustRegionOPDConfig`].

    With `rollout_policy="student"` and every other setting at its default it is `DistillationTrainer`, bit for bit,
    for models of one vocabulary size with the same end-of-sequence tokens (and not under ZeRO-3). Evaluation always
    decodes the student alone, which is what is deployed.

    Left out on purpose: blended rollouts of vision-language students, whose teacher would need the image features at
    each step, and of continuous batching. The teacher is held in full by every process, also under FSDP2 and ZeRO-3,
    because a rank that has finished its sequences takes no part in a gather.

    Example:

    ```python
    from trl_blend import TrustRegionOPDConfig, TrustRegionOPDTrainer

    trainer = TrustRegionOPDTrainer(
        model="Qwen/Qwen3-1.7B-Base",
        teacher_model="Qwen/Qwen3-8B",
        args=TrustRegionOPDConfig(output_dir="out", kl_budget=0.01, blend_warmup_steps=50),
        train_dataset=prompts,
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student to train, see [`~trl.DistillationTrainer`].
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Frozen teacher with the student's tokenizer; its vocabulary may be padded to another size. `None` with PEFT
            means the student's own base, adapters disabled: one set of weights, no second copy. Defaults to
            `args.teacher_model_name_or_path`.
        args ([`TrustRegionOPDConfig`], *optional*):
            Configuration of this trainer.
        train_dataset, eval_dataset, processing_class, peft_config, **kwargs:
            See [`~trl.DistillationTrainer`].
        reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Reward functions as in [`~trl.GRPOTrainer`], for diagnostics only: their means are logged, and the first
            one is the verifier of `blend/auroc`. They have no effect on the loss.

    Raises:
        [`~trl_blend.errors.ConfigError`]:
            If arguments are outside their range or contradict each other.
        [`~trl_blend.errors.TokenizerMismatchError`]:
            If the teacher's tokenizer maps an id to another token than the student's.
        [`~trl_blend.errors.UnsupportedError`]:
            If a combination would run but not correctly.
    """

    _tag_names = ["trl", "trl-blend", "trust-region-opd"]
    _name = "TrustRegionOPD"
    _paper = {
        "title": "Trust-Region Behavior Blending for On-Policy Distillation",
        "id": "2605.31159",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{plyusov2026trust,
                title        = {{Trust-Region Behavior Blending for On-Policy Distillation}},
                author       = {Daniil Plyusov and Alexey Gorbatovski and Alexey Malakhov and Nikita Balagansky and
                                Boris Shaposhnikov and Daria Korotyshova and Daniil Gavrilov},
                year         = 2026,
                eprint       = {arXiv:2605.31159},
            }"""),
    }
    _template_name = "trust_region_opd.md"
    _panels = PANELS

    def __init__(
        self,
        model: "str | PreTrainedModel",
        teacher_model: "str | PreTrainedModel | None" = None,
        args: TrustRegionOPDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        *,
        peft_config: Any = None,
        reward_funcs: RewardFunction | list[RewardFunction] | None = None,
        **kwargs: Any,
    ):
        if args is None:
            model_id = model if isinstance(model, str) else _compat.get_config_model_id(model.config)
            args = TrustRegionOPDConfig(f"{model_id.split('/')[-1]}-TrustRegionOPD")
        teachers = _partners.as_list(teacher_model or args.teacher_model_name_or_path)
        check_arguments(
            model,
            teachers,
            args,
            processing_class=processing_class,
            peft_config=peft_config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )
        self.reward_funcs = as_reward_functions(reward_funcs)
        self._panels = report.panels([_compat.get_callable_name(function) for function in self.reward_funcs])
        self._diagnostics = Diagnostics(self)
        self._rollout_level = 0.0
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        self._blend_level = args.blend_level()
        self._veto_weight: Callable[[int], float] = lambda step: 0.0
        if args.distillation_target == "veto":
            self._veto_weight = linear(args.veto_weight_start, args.veto_warmup_steps)
        self._prepare_teacher(teachers)
        check_loaded(self, teachers)

    def _prepare_teacher(self, teachers: list) -> None:
        # Not by the parent, which refuses padded vocabularies and shards the teacher under ZeRO-3
        loaded = _partners.load_partners(teachers, self.args)
        self.partners: list = [_partners.prepare_partner(partner, self.accelerator) for partner in loaded]
        self.teacher_model = self.partners[0] if self.partners else BaseTeacher(self.model)
        self.eos = find_eos_map(self, teachers)
        if self.eos is not None:
            self._stop_at(self.eos.merged)
        self.missing_token_ids = _partners.token_ids_without_partner(self.model, self.partners)
        if self.missing_token_ids:  # the teacher could not read them back
            suppressed = self.missing_token_ids + (self.generation_kwargs.get("suppress_tokens") or [])
            self.generation_config.suppress_tokens = self.generation_kwargs["suppress_tokens"] = suppressed

    def _stop_at(self, token_ids: tuple[int, ...]) -> None:
        """End the student's own rollouts, and the trained model's generations, with these tokens too."""
        # In the loss they are the same event as the student's own: a student that went on after one of them would be
        # another policy than the one that is trained
        self.eos_token_ids = [*self.eos_token_ids, *(token for token in token_ids if token not in self.eos_token_ids)]
        self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = self.eos_token_ids
        self.model.generation_config.eos_token_id = self.eos_token_ids
        if self.use_vllm:
            self.vllm_generation.generation_kwargs["stop_token_ids"] = self.eos_token_ids

    @property
    def uses_own_divergence(self) -> bool:
        """Whether the loss is `trl_blend.ops.reverse_kl`, rather than TRL's chunked divergence."""
        sizes = {model.config.get_text_config().vocab_size for model in (self.model, self.teacher_model)}
        own_loss = self.args.kl_support != "full" or self.args.distillation_target != "teacher"
        # TRL's kernel takes every weight for a ZeRO-3 shard, which the teacher's is not
        return own_loss or self.eos is not None or len(sizes) > 1 or self._dist.is_zero3

    # Rollouts

    def _rule(self, level: float) -> BlendRule:
        if self.args.rollout_policy == "trust_region":
            return TrustRegion(level)
        if self.args.rollout_policy == "fixed_weight":
            return LogitMixing(level)
        return SpeculativeKD(self.args.skd_top_k, self.args.skd_teacher_temperature)

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        self._start_rollouts(mode)
        with self._diagnostics.of_rollouts(mode, inputs) as rollouts:
            output = super()._generate_and_score_completions(inputs)
            rollouts.append(output)
        return output

    def _start_rollouts(self, mode: str) -> None:
        """Set the level of the blend for the rollouts that follow, log it, and say once when it has reached 0."""
        if mode == "eval":
            return
        step, level = self.state.global_step, self._blend_level(self.state.global_step)
        if self._rollout_level and not level:
            engine = "vLLM" if self.use_vllm else "transformers"
            logger.warning(
                f"Step {step}: the warmup of `rollout_policy={self.args.rollout_policy!r}` is over. From here on "
                f"rollouts are drawn from the student alone, with {engine}."
            )
        self._rollout_level = level
        if self.args.rollout_policy == "trust_region":
            self._metrics[mode]["blend/kl_budget"].append(level)
        if self.args.temperature_warmup_steps:
            self._metrics[mode]["blend/temperature"].append(sampling_temperature(self))
        if self.args.distillation_target == "veto":
            self._metrics[mode]["blend/veto_weight"].append(self._veto_weight(step))

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        turn = (prompt_ids, images, multimodal_fields, has_tool_images)
        if not self.model.training:
            return super()._generate_single_turn(*turn)
        if not self._rollout_level:
            with warmed_up_sampling(self):
                return super()._generate_single_turn(*turn)
        student = self.accelerator.unwrap_model(self.model_wrapped)
        rule = self._rule(self._rollout_level)
        with (
            evaluation_mode(student),  # dropout would draw tokens from another policy than the one of the budget
            self._decoding_with_transformers(),
            blended_generation(student, self.partners or None, rule, eos=self.eos, record=True) as session,
        ):
            completion_ids = super()._generate_single_turn(*turn)
        record = session.records[-1]
        self._diagnostics.collect(record, [len(ids) for ids in completion_ids])
        self._diagnostics.completions.add_turn(record, prompt_ids, completion_ids)
        return completion_ids

    @contextmanager
    def _decoding_with_transformers(self) -> Iterator[None]:
        use_vllm, self.use_vllm = self.use_vllm, False
        try:
            yield
        finally:
            self.use_vllm = use_vllm

    def _get_train_sampler(self, dataset=None):
        with _compat.repeated_prompts(self.args.num_rollouts_per_prompt):
            return super()._get_train_sampler(dataset)

    def get_train_dataloader(self):
        """Dataloader of training prompts, each of them `num_rollouts_per_prompt` times."""
        if not isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            return super().get_train_dataloader()
        with _compat.repeated_prompts(self.args.num_rollouts_per_prompt):
            return super().get_train_dataloader()

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        with self._diagnostics.of_loss(mode, inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        measures = self._diagnostics.measures_support("train" if self.model.training else "eval")
        if not measures and not self.uses_own_divergence:
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)

        def divergence(heads: _compat.DivergenceInputs) -> _compat.DivergenceResult:
            if measures:
                self._diagnostics.measure_support(heads, inputs["completion_ids"], self.eos)
            return self._divergence(heads) if self.uses_own_divergence else None

        with _compat.divergence_function(divergence):
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)

    def _divergence(self, heads: _compat.DivergenceInputs) -> tuple[Tensor, Tensor]:
        valid, student, teacher = valid_positions(heads)
        result = reverse_kl(
            student,
            teacher,
            temperature=heads.temperature,
            veto_weight=self._veto_weight(self.state.global_step) if self.model.training else 0.0,
            top_k=self.args.kl_top_k if self.args.kl_support == "student_top_k" else None,
            eos=self.eos,
            gather_parameters=_compat.gather_lm_head,
        )
        self._diagnostics.add_reverse_kl(result.reverse_kl)
        zeros = result.loss.new_zeros(valid.shape)
        return zeros.masked_scatter(valid, result.loss), zeros.masked_scatter(valid, result.student_entropy)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs` with the collected metrics, see [`~transformers.Trainer.log`]."""
        mode = "train" if self.model.training else "eval"
        self._diagnostics.log_losses(mode)
        with self._diagnostics.completions.written():
            super().log(logs, start_time)

    def _get_last_hidden_state(self, unwrapped_model, *args, **kwargs):
        if not isinstance(unwrapped_model, BaseTeacher):
            return super()._get_last_hidden_state(unwrapped_model, *args, **kwargs)
        with evaluation_mode(unwrapped_model.student, disable_adapters=True):
            return super()._get_last_hidden_state(unwrapped_model.student, *args, **kwargs)

    # Checkpoints and card

    def write_run_state(self, folder: Path) -> None:
        """Write the settings of the method into a checkpoint."""
        write_settings(folder / _SETTINGS_FILE, self.args, _SETTINGS)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            read_settings(Path(checkpoint) / _SETTINGS_FILE, self.args, _SETTINGS)

    def card_fields(self) -> dict[str, Any]:
        """Fields of `model_cards/trust_region_opd.md`."""
        args, rollouts = self.args, _cards.rows_per_step(self.args)
        if self.partners:
            teacher = _cards.live_teacher(self.partners[0], args)
        else:
            teacher = _cards.base_teacher(self.model, args)
        return {
            "paper_name": "the trust-region paper",
            "paper": report.paper_values(args, merges_eos=self.eos is not None),
            "settings": {
                "prompts_per_step": rollouts // args.num_rollouts_per_prompt,
                "divergence": "reverse KL" if args.beta == 1.0 else f"generalised Jensen-Shannon, beta {args.beta:g}",
            },
            "choices": report.choices(args, merges_eos=self.eos is not None),
            "teachers": [teacher],
            "data_rows": _cards.num_rows(self.train_dataset),
            "data_unit": "prompts",
            "per_step": _cards.rollouts_text(rollouts, args.num_rollouts_per_prompt),
            "result_metrics": r"(?:.+_)?(loss|blend/reverse_kl|rewards/.+/mean)",
            "curves_text": "The budget, the teacher weight it allows, and other metrics against the optimizer step",
            "is_baseline": report.is_baseline(args),
            "realised": [entry for entry in self.state.log_history if "blend/kl_behavior_student" in entry],
            "eos": self.eos,
        }
