"""The calls that reach an engine between two generations: in this process, or a server through `/collective_rpc`."""

from typing import Any

import torch

from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.serving.blend import Blend


EXTENSION = "trl_blend.serving.worker.BlendWorkerExtension"
"""Value of vLLM's `worker_extension_cls`."""


class ObservedSampler:
    """
    In front of the sampler of an engine that drafts: tells the model how many tokens were drawn for each request.

    Args:
        sampler:
            `RejectionSampler` of either of vLLM's model runners.
        model ([`~trl_blend.serving.model.BlendForCausalLM`]):
            Whose `sums` are told.
    """

    def __init__(self, sampler: Any, model: Any) -> None:
        self._sampler, self._model = sampler, model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._sampler(*args, **kwargs)
        if hasattr(output, "num_sampled"):  # the second runner: logits, batch, draft logits
            self._model.sums.settle(args[1].cu_num_logits[1:], output.num_sampled)
        else:  # the first: metadata, …
            self._model.sums.settle(args[0].cu_num_sampled_tokens, (output.sampled_token_ids >= 0).sum(dim=-1))
        return output


class RestingDraftModel:
    """
    In front of the draft model of an engine, which vLLM runs once for each token also where none is drafted, so that
    its cache goes on: while it rests it does not run, and prefixes that it has not seen must not be reused after that.

    Args:
        drafter:
            `DraftModelProposer` or `PlainDraftModelSpeculator` of vLLM's model runners.
    """

    def __init__(self, drafter: Any) -> None:
        self._model, self._width, self._dtype = drafter.model, drafter.hidden_size, drafter.dtype
        self.rests = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.rests:
            return self._model(*args, **kwargs)
        ids = kwargs["input_ids"]
        return torch.zeros(len(ids), self._width, dtype=self._dtype, device=ids.device)


class BlendWorkerExtension:
    """
    What vLLM adds to the worker of each device (`worker_extension_cls`). Arguments and results fit into JSON, which is
    how they travel to a server.
    """

    def set_blend(self, blend: dict[str, Any]) -> None:
        """Draw from another [`~trl_blend.serving.blend.Blend`] from here on, given as [`Blend.to_dict`] gives it."""
        given = Blend.from_dict(blend)
        self._blend_model().set_blend(given)
        if given.draft_tokens is not None:
            self._limit_drafts(given.draft_tokens)

    def _limit_drafts(self, number: int) -> None:
        runner = self.model_runner  # type: ignore[attr-defined]
        drafter = getattr(runner, "speculator", None) or runner.drafter
        if not isinstance(drafter.model, RestingDraftModel):
            drafter.model = RestingDraftModel(drafter)
        drafter.model.rests = number == 0
        if hasattr(drafter, "num_speculative_steps"):  # of the second runner, which does not ask the scheduler
            drafter.num_speculative_steps = max(number, 1)

    def student_share(self) -> float:
        """How many of the bytes of the weights of all models are the student's, as a fraction."""
        model = self._blend_model()
        student, all_models = (sum(one.nbytes for one in part.parameters()) for part in (model.student, model))
        return float(student / all_models)

    def describe_blend(self) -> dict[str, Any]:
        """What the engine holds: the names of its partners, and the blend that it draws from."""
        model = self._blend_model()
        return {"partners": [partner.model for partner in model.partners], "blend": model.blend.to_dict()}

    def lead_drafts(self) -> bool:
        """
        Let the draft model follow the student's weights, and count what is accepted of its drafts. `False` where the
        engine drafts nothing.
        """
        draft_model = self.get_draft_model()  # type: ignore[attr-defined]
        if draft_model is None:
            return False
        model, runner = self._blend_model(), self.model_runner  # type: ignore[attr-defined]
        model.lead(draft_model)
        if not isinstance(runner.rejection_sampler, ObservedSampler):
            runner.rejection_sampler = ObservedSampler(runner.rejection_sampler, model)
        return True

    def check_takes_weights(self, tower: str) -> None:
        """
        Refuse to send weights to a model, `"student"` or `"partner_0"`, whose experts vLLM has laid out for a kernel:
        it would take them for what they are not, and say nothing.

        Raises:
            [`~trl_blend.errors.UnsupportedError`]: With the kernel.
        """
        for module in getattr(self._blend_model(), tower).modules():
            backend = getattr(getattr(module, "quant_method", None), "unquantized_backend", None)
            if backend is not None and "TRITON" not in backend.name:
                raise UnsupportedError(
                    f"vLLM lays the experts of `{tower}` out for a kernel ({backend.value}), where the weights of a "
                    "trainer do not fit. Draw on a GPU that has vLLM's Triton kernels, with `vllm_mode='server'`, or "
                    "with `use_vllm=False`; a teacher that is passed by its name is sent no weights."
                )

    def take_blend_statistics(self) -> dict[str, list[float]]:
        """Total, count and largest value of each statistic since the last call or the last [`set_blend`]."""
        return {name: list(sums) for name, sums in self._blend_model().sums.pop().items()}

    def _blend_model(self) -> Any:
        model = self.get_model()  # type: ignore[attr-defined]
        if not hasattr(model, "set_blend"):
            raise ConfigError(
                f"The engine serves a {type(model).__name__}, which blends nothing. Start it with the settings that "
                "`trl_blend.serving.arguments.engine_arguments` gives."
            )
        return model
