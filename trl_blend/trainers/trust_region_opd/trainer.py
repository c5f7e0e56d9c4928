"""On-policy distillation whose early rollouts the teacher helps to decode, inside a trust region."""

import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import DistillationTrainer

from trl_blend import _compat
from trl_blend.errors import ConfigError
from trl_blend.generation.hooks import blended_generation
from trl_blend.generation.rules import BlendRule, LogitMixing, TrustRegion
from trl_blend.models.limits import vocabulary_rows
from trl_blend.models.output_layer import find_plain_outputs, plain_outputs
from trl_blend.models.own_logits import Fused, check_own_logits, head_log_probs
from trl_blend.models.wrappers import evaluation_mode
from trl_blend.ops.head.layer import LMHead
from trl_blend.ops.head.reverse_kl import ReverseKL, reverse_kl, support_statistics
from trl_blend.ops.losses import iw_opd_weights, sampled_token_loss
from trl_blend.ops.selection import tip_selection
from trl_blend.ops.trust_region import acceptance_bound
from trl_blend.schedules import linear
from trl_blend.trainers import _cards, _engine, _partners, _record
from trl_blend.trainers._data import RowsNeeded, check_prompt_columns
from trl_blend.trainers._record import RunParts
from trl_blend.trainers._run import RunMixin, default_config
from trl_blend.trainers.trust_region_opd import checks, report
from trl_blend.trainers.trust_region_opd.completions import CompletionsTable
from trl_blend.trainers.trust_region_opd.config import TrustRegionOPDConfig
from trl_blend.trainers.trust_region_opd.diagnostics import Diagnostics, valid_positions
from trl_blend.trainers.trust_region_opd.rewards import RewardFunction, as_reward_functions, rollout_rewards


logger = get_logger(__name__)

# A resumed run with other values of these does not continue the interrupted one: all options but those of the logging
_LOGGING = ("log_teacher_statistics", "success_threshold")
_OF_THE_PARENT = ("temperature", "beta", "max_completion_length")
_RECORDED = [name for name in TrustRegionOPDConfig.__annotations__ if name not in _LOGGING] + [*_OF_THE_PARENT]


class BaseTeacher(nn.Module):
    """
    Stands in for `teacher_model` where the teacher is the student without its adapters: one set of weights.

    `DistillationTrainer._compute_loss` asks a teacher for its configuration and LM head, and for hidden states through
    `_get_last_hidden_state`, which [`TrustRegionOPDTrainer`] answers with the adapters disabled.

    Args:
        student ([`~peft.PeftModel`]):
            The student, unwrapped.
    """

    def __init__(self, student: PreTrainedModel):
        super().__init__()
        self._students = (student,)  # not registered: its parameters are not the teacher's

    @property
    def student(self) -> PreTrainedModel:
        """The student, adapters active."""
        return self._students[0]

    @property
    def config(self) -> Any:
        """Configuration of the base model."""
        return self.student.config

    def get_output_embeddings(self) -> nn.Module:
        """LM head of the base model; not the one that `modules_to_save` or trainable tokens put in its place."""
        layer: Any = self.student.get_output_embeddings()
        return getattr(layer, "original_module", layer)


class TrustRegionOPDTrainer(RunMixin, DistillationTrainer):
    r"""
    Trainer for on-policy distillation with trust-region behaviour blending.

    At every prefix of a training rollout the next token is drawn from the policy closest to the teacher inside a KL
    ball around the student (Eq. 1 and 2 of [the paper](https://huggingface.co/papers/2605.31159)):
    \\( \mu^* = \arg\min_\mu KL(\mu \| p_T) \\) subject to \\( KL(\mu \| p_S) \le \varepsilon \\), which is
    \\( \mu^* \propto p_S^{1-\beta^*} p_T^{\beta^*} \\) with the largest feasible \\( \beta^* \in [0, 1] \\). The
    budget \\( \varepsilon \\) is annealed to 0 (Eq. 3), and from there on rollouts are those of
    [`~trl.DistillationTrainer`], through its own code. By default the loss is the reverse KL at the visited prefixes,
    without importance correction. The paper's baselines are settings of the same trainer, see
    [`TrustRegionOPDConfig`].

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
    _recorded = _RECORDED
    engine = property(_engine.of_trainer)

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
        args = default_config(TrustRegionOPDConfig, model) if args is None else args
        teachers = _partners.given_teachers(teacher_model, args)
        checks.check_arguments(
            model,
            teachers,
            args,
            processing_class=processing_class,
            peft_config=peft_config,
            has_rewards=bool(reward_funcs),
            uses_tools=bool(kwargs.get("tools")) or kwargs.get("environment_factory") is not None,
        )
        check_prompt_columns(train_dataset, eval_dataset, processing_class)
        self.reward_funcs = as_reward_functions(reward_funcs)
        reward_names = [_compat.get_callable_name(function) for function in self.reward_funcs]
        self._panels = report.panels(reward_names)
        self._rule: BlendRule | None = None
        self._behavior_logps: Tensor | None = None
        stop = args.blend_warmup_steps is not None
        with _engine.blended_engine(args, teachers, args.rule_at(0), blends=args.blends, partners_stop=stop):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=peft_config,
                **kwargs,
            )
        self._diagnostics = Diagnostics(args, reward_names, self.accelerator, self._log_metrics)
        self._table = CompletionsTable(args, reward_names, self._logs["prompt"].maxlen)
        self._veto_weight: Callable[[int], float] = lambda step: 0.0
        if args.distillation_target == "veto":
            self._veto_weight = linear(args.veto_weight_start, args.veto_warmup_steps)
        self._prepare_teacher(teachers)
        self._prepare_reference(model)
        if not teachers:
            _partners.check_base_as_reference(self.model, self._dist, args)
        checks.check_loaded(
            self.model,
            self.teacher_model,
            args,
            is_vision_language=self._is_vlm,
            uses_own_divergence=self.uses_own_divergence,
            missing_token_ids=self.missing_token_ids,
        )

    def _prepare_teacher(self, teachers: list) -> None:
        # Not by the parent, which refuses padded vocabularies and shards the teacher under ZeRO-3
        loaded = _partners.load_partners(teachers, self.args)
        self.partners: list = [_partners.prepare_partner(partner, self.accelerator) for partner in loaded]
        self._plain_outputs = find_plain_outputs(self.partners, "teacher_model")
        self._given_teachers = teachers
        self.teacher_model = self.partners[0] if self.partners else BaseTeacher(self.model)
        if self.engine is not None:
            self.engine.send_partners(_engine.in_memory(self.model, teachers, self.partners))
        self.eos = None
        if teachers:
            target = self._tokenizer.eos_token_id
            self.eos = checks.find_eos_map(
                teachers[0], self.teacher_model, self.args, student_ids=self.eos_token_ids, target=target
            )
        if self.eos is not None:
            self._stop_at(self.eos.merged)
        self._num_tokens = _partners.num_tokens(self.model, self._tokenizer)
        self.missing_token_ids = _partners.token_ids_without_partner(self.model, self.partners)
        if self.missing_token_ids:  # the teacher could not read them back
            suppressed = self.missing_token_ids + (self.generation_kwargs.get("suppress_tokens") or [])
            self.generation_config.suppress_tokens = self.generation_kwargs["suppress_tokens"] = suppressed

    def teacher_parts(self) -> list[dict[str, Any]]:
        """The teachers in the record, and the student at step 0 where the target is made with it."""
        parts = super().teacher_parts()
        if self._reference is not None and not isinstance(self._reference, BaseTeacher):
            digest = _record.weights_sample(self.accelerator.unwrap_model(self._reference).named_parameters())
            parts.append(_record.model_part("the student at step 0", digest))
        return parts

    def _prepare_reference(self, model: "str | PreTrainedModel") -> None:
        """Keep the student at step 0, whole on every process. A resumed run is built from that, too."""
        self._reference: nn.Module | None = None
        self._reference_hidden: Tensor | None = None
        if self.args.uses_reference and is_peft_model(self.model):
            if not self._dist.is_zero3:
                _partners.check_starts_as_base(self.model, checks.needs_reference(self.args))
            self._reference = BaseTeacher(self.model)
        elif self.args.uses_reference:
            reference = _partners.copy_of_student(model, self.model, self.args)
            self._reference = _partners.prepare_partner(reference, self.accelerator)

    def _stop_at(self, token_ids: tuple[int, ...]) -> None:
        """End the student's own rollouts, and the trained model's generations, with these tokens too."""
        # In the loss they are the same event as the student's own: a student that went on after one of them would be
        # another policy than the one that is trained
        self.eos_token_ids = [*self.eos_token_ids, *(token for token in token_ids if token not in self.eos_token_ids)]
        self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = self.eos_token_ids
        self.model.generation_config.eos_token_id = self.eos_token_ids
        if self.use_vllm:
            settings = self.vllm_generation.generation_kwargs
            settings["stop_token_ids"] = sorted({*(settings.get("stop_token_ids") or ()), *self.eos_token_ids})

    @property
    def uses_own_divergence(self) -> bool:
        """Whether the loss is `trl_blend.ops.reverse_kl`, rather than TRL's chunked divergence."""
        sizes = self._vocab_sizes()
        # TRL's kernel takes every weight for a ZeRO-3 shard, which the teacher's is not
        return self.args.uses_own_loss or self.eos is not None or len(sizes) > 1 or self._dist.is_zero3

    def _vocab_sizes(self) -> set[int]:
        return {vocabulary_rows(model) for model in (self.model, self.teacher_model)}

    # Rollouts

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._start_step()
        self._diagnostics.start_rollouts()
        self._table.start()
        self._behavior_logps = None
        started = time.perf_counter()
        output = super()._generate_and_score_completions(inputs)
        seconds = time.perf_counter() - started
        self._diagnostics.log_rollouts(mode, output["completion_mask"].sum().item(), seconds)
        rewards = None
        if self.reward_funcs:
            rewards = self._reward(inputs, output)
            self._diagnostics.log_rewards(mode, rewards)
            output["verifier_reward"] = rewards[:, 0]
        if self.args.distillation_objective == "iw_opd" and self._behavior_logps is not None:
            width = output["completion_ids"].size(1)  # that of the longest row, or padded to a multiple
            columns = width - self._behavior_logps.size(1)
            output["behavior_logps"] = nn.functional.pad(self._behavior_logps, (0, columns))
        self._table.finish(len(inputs), self._rule if mode == "train" else None, rewards)
        return output

    def _start_step(self) -> None:
        """Set what the training rollouts that follow are drawn from, log it, and say once when the blend is over."""
        step, args = self.state.global_step, self.args
        rule = args.rule_at(step)
        if self._rule is not None and rule is None:
            engine = "vLLM" if self.use_vllm else "transformers"
            logger.warning(
                f"Step {step}: the warmup of `rollout_policy={args.rollout_policy!r}` is over. From here on "
                f"rollouts are drawn from the student alone, with {engine}."
            )
        self._rule = rule
        if args.rollout_policy == "trust_region":
            self._log_metrics("train", {"blend/kl_budget": getattr(rule, "kl_budget", 0.0)})
        if args.temperature_warmup_steps:
            self._log_metrics("train", {"blend/temperature": self._sampling_temperature()})
        if args.distillation_target == "veto":
            self._log_metrics("train", {"blend/veto_weight": self._veto_weight(step)})

    def _log_metrics(self, mode: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

    def _reward(self, rows: list[dict[str, Any]], output: dict[str, Any]) -> Tensor:
        masks = output["completion_mask"].bool()
        completion_ids = [ids[mask].tolist() for ids, mask in zip(output["completion_ids"], masks, strict=True)]
        rewards = rollout_rewards(self.reward_funcs, rows, completion_ids, self._tokenizer, self.state)
        return rewards.to(self.accelerator.device)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        turn = (prompt_ids, images, multimodal_fields, has_tool_images)
        _partners.check_prompt_ids(prompt_ids, self.model, self.partners, self._tokenizer)
        rule = self._rule if self.model.training else None
        if self.engine is not None:
            return self._draw_with_engine(self.engine, rule, *turn)
        if not self.model.training:
            return super()._generate_single_turn(*turn)
        if rule is None:
            with self._warmed_up_sampling():
                return super()._generate_single_turn(*turn)
        student = self.accelerator.unwrap_model(self.model_wrapped)
        with (
            evaluation_mode(student),  # dropout would draw tokens from another policy than the one of the budget
            blended_generation(
                student, self.partners or None, rule, eos=self.eos, vocab_size=self._num_tokens, record=True
            ) as session,
        ):
            completion_ids = super()._generate_single_turn(*turn)
        record = session.records[-1]
        self._behavior_logps = record.behavior_logps
        self._diagnostics.collect(record, [len(ids) for ids in completion_ids])
        self._table.add_turn(record, prompt_ids, completion_ids)
        return completion_ids

    def _draw_with_engine(
        self, engine: "_engine.BlendedVLLMGeneration", rule: BlendRule | None, *turn: Any
    ) -> list[list[int]]:
        blends = rule is not None
        tokens = self._num_tokens if blends else None
        engine.set_rule(rule, self.eos_token_ids, eos=self.eos, vocab_size=tokens, records=blends)
        completion_ids = super()._generate_single_turn(*turn)
        if rule is not None:
            sums = engine.take_statistics()
            self._diagnostics.collect_sums(sums)
            if isinstance(rule, TrustRegion) and "draft_acceptance" in sums:
                self._log_metrics("train", {"blend/draft_acceptance_bound": acceptance_bound(rule.kl_budget)})
        return completion_ids

    def decode_greedily(self, prompt_ids: list[list[int]], *, teacher: bool = False) -> list[list[int]]:
        """
        Greedy completions by the engine that draws the rollouts. Use it for a table of accuracy around a run.

        Args:
            prompt_ids (`list[list[int]]`):
                Token ids of the prompts of this process.
            teacher (`bool`, *optional*, defaults to `False`):
                Whether the teacher decodes, instead of the student.

        Returns:
            `list[list[int]]`: Token ids of the completions.

        Raises:
            [`~trl_blend.errors.ConfigError`]: Without such an engine.
        """
        if self.engine is None:
            raise ConfigError("No engine draws blended rollouts here. Decode with the model, or set `use_vllm=True`.")
        with _engine.greedy(self.engine):
            rule = LogitMixing(1.0) if teacher else None
            self.engine.set_rule(rule, self.eos_token_ids, eos=self.eos, vocab_size=self._num_tokens)
            return super()._generate_single_turn(prompt_ids, None, {})

    def _sampling_temperature(self) -> float:
        """Temperature of the student's training rollouts at this step; the loss keeps its own."""
        start, steps = self.args.temperature_warmup_start, self.args.temperature_warmup_steps
        if not steps:
            return self.temperature
        return self.temperature - linear(self.temperature - start, steps)(self.state.global_step)

    @contextmanager
    def _warmed_up_sampling(self) -> Iterator[None]:
        """Let the parent's rollouts, by transformers or vLLM, sample at the warmup's temperature."""
        temperature = self._sampling_temperature()
        if temperature == self.temperature:
            yield
            return
        engine = self.vllm_generation if self.use_vllm else self.generation_config
        settings = {**self.generation_kwargs, "temperature": temperature}
        with patch.object(engine, "temperature", temperature), patch.object(self, "generation_kwargs", settings):
            yield

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

    def compare_logits(self, model: Any) -> None:
        """The student's and the teacher's; see [`RunMixin`]."""
        common = {"layout": "left_padded", "vocab_size": min(self._vocab_sizes())}
        check_own_logits(model, "model", self._fused_log_probs(model, "student"), **common)
        fused = self._fused_log_probs(model, "teacher")
        if self.partners:
            check_own_logits(self.teacher_model, "teacher_model", fused, **common)
        else:
            check_own_logits(model, "teacher_model", fused, **common, disable_adapters=True)

    def _fused_log_probs(self, model: nn.Module, role: str) -> Fused:
        """How the loss computes the log-probabilities of one of the two models."""

        def fused(inputs: dict[str, Tensor]) -> Tensor:
            captured: list[Tensor] = []

            def keep(heads: _compat.DivergenceInputs) -> _compat.DivergenceResult:
                captured.append(head_log_probs(getattr(heads, role)))
                zeros = torch.zeros(heads.mask.numel(), device=heads.mask.device)
                return zeros, zeros

            rows, width = inputs["input_ids"].shape
            halves = {"prompt": slice(width // 2 - 1), "completion": slice(width // 2 - 1, None)}
            split = {
                f"{half}_{name}": inputs[key][:, part]
                for half, part in halves.items()
                for name, key in (("ids", "input_ids"), ("mask", "attention_mask"))
            }
            student = self.accelerator.unwrap_model(model)
            with self._whole_output_layers(), _compat.divergence_function(keep):
                self._forward_redirection(
                    model, student, super(TrustRegionOPDTrainer, self)._compute_loss, student, split, None
                )
            return captured[0].unflatten(0, (rows, -1))

        return fused

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        with self._diagnostics.of_loss(mode, inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        with self._whole_output_layers():
            return self._compute_divergence(unwrapped_student, inputs, num_items_in_batch)

    @contextmanager
    def _whole_output_layers(self) -> Iterator[None]:
        """Let the parent, which reads weights and configurations, find all that comes after hidden states."""
        configs = self.model.config, self.teacher_model.config
        with _compat.logit_fields(*configs), plain_outputs(self._plain_outputs):
            yield

    def _compute_divergence(self, unwrapped_student, inputs, num_items_in_batch):
        measures = self._diagnostics.measures_support("train" if self.model.training else "eval")
        if not measures and not self.uses_own_divergence:
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)

        def divergence(heads: _compat.DivergenceInputs) -> _compat.DivergenceResult:
            if measures:
                self._diagnostics.measure_support(heads, inputs["completion_ids"], self.eos)
            if self.model.training and self.args.distillation_objective == "iw_opd":
                return self._sampled_loss(heads, inputs)
            return self._divergence(heads) if self.uses_own_divergence else None

        with _compat.divergence_function(divergence):
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)

    def _divergence(self, heads: _compat.DivergenceInputs) -> tuple[Tensor, Tensor]:
        valid, student, teacher = valid_positions(heads)
        args, kept = self.args, None
        # Evaluation measures the distance to the teacher, whatever the way there
        of_training: dict[str, Any] = {}
        if self.model.training:
            of_training = {
                "reference": self._reference_head(student, valid),
                "target_weight": 1.0 if args.target_weight is None else args.target_weight,
                "veto_weight": self._veto_weight(self.state.global_step),
                "forward_kl_entropy": args.forward_kl_entropy,
            }
        result = reverse_kl(
            student,
            teacher,
            **of_training,
            temperature=heads.temperature,
            top_k=args.kl_top_k if args.kl_support == "student_top_k" else None,
            eos=self.eos,
            vocab_size=self._num_tokens and min(self._num_tokens, vocabulary_rows(self.teacher_model)),
            gather_parameters=_compat.gather_lm_head,
        )
        zeros, loss = result.loss.new_zeros(valid.shape), result.loss
        if self.model.training and args.token_selection == "tip":
            kept, scale = self._selected(valid, result)
            loss = torch.where(kept, scale * loss, 0.0)
        self._diagnostics.add_loss(result, kept)
        return zeros.masked_scatter(valid, loss), zeros.masked_scatter(valid, result.student_entropy)

    def _sampled_loss(self, heads: _compat.DivergenceInputs, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        valid, student, teacher = valid_positions(heads)

        def at_valid(values: Tensor) -> Tensor:
            return values.to(valid.device).reshape(-1)[valid]

        # Over all rows that both models have, as TRL's: any of them can have been drawn
        found = support_statistics(
            student,
            teacher,
            at_valid(inputs["completion_ids"]),
            temperature=heads.temperature,
            eos=self.eos,
            gather_parameters=_compat.gather_lm_head,
        )
        behavior = at_valid(inputs["behavior_logps"]) if "behavior_logps" in inputs else None
        result = sampled_token_loss(found.student_logps, found.teacher_logps, behavior)
        zeros = result.loss.new_zeros(valid.shape)
        advantages = zeros.masked_scatter(valid, result.advantage).view_as(heads.mask)
        weights = at_valid(iw_opd_weights(advantages, heads.mask, self.args.iw_opd_gamma))
        self._diagnostics.add_sampled_loss(result, weights)
        return zeros.masked_scatter(valid, weights * result.loss), zeros.masked_scatter(valid, found.student_entropy)

    def _reference_head(self, student: LMHead, valid: Tensor) -> LMHead | None:
        """The reference at the tokens that count: the student's architecture with other weights."""
        hidden, self._reference_hidden = self._reference_hidden, None
        if hidden is None:
            return None
        layer = self.accelerator.unwrap_model(self._reference).get_output_embeddings()
        bias = getattr(layer, "bias", None)
        return student._replace(
            hidden=hidden.to(valid.device).flatten(0, 1)[valid],
            weight=_compat.plain_tensor(layer.weight, hidden.dtype),
            bias=None if bias is None else _compat.plain_tensor(bias, bias.dtype),
        )

    def _selected(self, valid: Tensor, result: ReverseKL) -> tuple[Tensor, Tensor]:
        """
        Which of this process's tokens the loss keeps, and what each counts so that together they stand for all tokens.

        Quantiles and share are those of the micro-batch of all processes. Every rank must call it.
        """
        values = torch.full((1, 2, valid.numel()), torch.nan, device=valid.device)
        values[0][:, valid] = torch.stack([result.student_entropy, result.reverse_kl]).float()
        gathered = self.accelerator.gather(self.accelerator.pad_across_processes(values, dim=2, pad_index=torch.nan))
        kept = tip_selection(
            gathered[:, 0],
            gathered[:, 1],
            entropy_quantile=self.args.tip_entropy_quantile,
            divergence_quantile=self.args.tip_divergence_quantile,
        )
        scale = gathered[:, 0].isfinite().sum() / kept.sum().clamp(min=1)
        return kept[self.accelerator.process_index, : valid.numel()][valid], scale

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs` with the collected metrics, see [`~transformers.Trainer.log`]."""
        mode = "train" if self.model.training else "eval"
        self._diagnostics.log_losses(mode)
        with self._own_table():
            super().log(logs, start_time)

    @contextmanager
    def _own_table(self) -> Iterator[None]:
        """Write the completions table at the end of the context, instead of TRL's, where it has columns to add."""
        if not self._table.is_own:
            yield
            return
        with patch.object(self, "log_completions", False):
            yield
        if self.accelerator.is_main_process:
            self._table.write(self.state.global_step, list(self._logs["prompt"]), list(self._logs["completion"]))

    def _get_last_hidden_state(self, unwrapped_model, *args, **kwargs):
        if isinstance(unwrapped_model, BaseTeacher):
            with evaluation_mode(unwrapped_model.student, disable_adapters=True):
                return super()._get_last_hidden_state(unwrapped_model.student, *args, **kwargs)
        reads = self._reference is not None and self.model.training
        if reads and unwrapped_model is self.accelerator.unwrap_model(self.teacher_model):
            # Of the tokens that the teacher sees, and without a gradient as there
            reference = self.accelerator.unwrap_model(self._reference)
            self._reference_hidden = self._get_last_hidden_state(reference, *args, **kwargs)
        return super()._get_last_hidden_state(unwrapped_model, *args, **kwargs)

    # Checkpoints and card

    @staticmethod
    def rows_needed(args: TrustRegionOPDConfig) -> RowsNeeded:
        """Prompts of one generation batch."""
        rollouts, group = _cards.rows_per_step(args), args.num_rollouts_per_prompt
        return RowsNeeded(rollouts // group, f"{rollouts} rollouts, `num_rollouts_per_prompt={group}`")

    def run_parts(self) -> RunParts:
        """What the run is made of, in words."""
        (teacher,) = self.teacher_names() or ["the student's own base"]
        rewards = ", ".join(_compat.get_callable_name(function) for function in self.reward_funcs)
        return report.run_parts(self.args, teacher, rewards)

    def card_fields(self) -> dict[str, Any]:
        """Fields of `model_cards/trust_region_opd.md`."""
        (teacher,) = _cards.teachers(self)
        return report.card_fields(
            self.args,
            teacher=teacher,
            eos=self.eos,
            num_prompts=_cards.num_rows(self.train_dataset),
            log_history=self.state.log_history,
        )
