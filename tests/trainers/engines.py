"""Stand-ins for vLLM, which the default tier does not have: an engine for the trainers, and `LLM` for our engine."""

from trl_blend.serving.statistics import OF_DRAFTS, Statistic


COMPLETION = [7, 8, 9]


class PlainEngine:
    """In the shape of TRL's `VLLMGeneration`: remembers its calls, completes every prompt with the same tokens."""

    def __init__(self, **kwargs):
        self.temperature, self.generation_kwargs = kwargs["temperature"], dict(kwargs["generation_kwargs"] or {})
        self.top_p, self.top_k, self.min_p = kwargs["top_p"], kwargs["top_k"], kwargs["min_p"]
        self.calls, self.syncs = [], 0

    def sync_weights(self):
        self.syncs += 1

    def generate(self, prompts, images, num_generations, profiler):
        self.calls.append((len(prompts), num_generations, self.temperature))
        logps = [[[-0.5 - token / 100] for token in COMPLETION] for _ in prompts]
        return None, [list(COMPLETION) for _ in prompts], logps, None


class Engine(PlainEngine):
    """In the shape of `BlendedVLLMGeneration`: remembers what it is told, too."""

    def __init__(self, *, partners, blend, partners_stop, draft_tokens, **kwargs):
        super().__init__(**kwargs)
        self.partners, self.blend, self.partners_stop = partners, blend, partners_stop
        self.draft_tokens = draft_tokens
        self.rules, self.settings, self.sent = [], [], None

    def send_partners(self, partners):
        self.sent = partners

    def set_rule(self, rule, stop_token_ids, **settings):
        self.rules.append(rule)
        self.settings.append({"stop_token_ids": list(stop_token_ids), **settings})

    def take_statistics(self):
        names = ["kl_behavior_student", "kl_behavior_teacher_0", "teacher_logp_0", "teacher_entropy_0"]
        sums = {name: Statistic(4.0 + index, 8, 1.0) for index, name in enumerate(names)}
        if hasattr(self.rules[-1], "kl_budget"):
            sums |= {"teacher_weight": Statistic(2.0, 8, 0.75), "kl_behavior_teacher": Statistic(16.0, 8, 3.0)}
        if self.draft_tokens:
            sums |= {name: Statistic(1.0 + index, 4, 1.0) for index, name in enumerate(OF_DRAFTS)}
        return sums


class Output:
    """One completion, in the shape of vLLM's."""

    def __init__(self):
        self.token_ids, self.logprobs = list(COMPLETION), None


class Request:
    """One prompt with its completion, in the shape of vLLM's."""

    def __init__(self, prompt):
        self.prompt_token_ids, self.outputs = prompt["prompt_token_ids"], [Output()]


class LLM:
    """In the shape of `vllm.LLM` in this process: keeps what it was started with and every call, in order."""

    def __init__(self, **kwargs):
        self.started_with, self.events = kwargs, []
        self.llm_engine = self.engine_core = self.scheduler = self
        self.dynamic_sd_lookup = [0, 0, 1, 2]
        self.answers = {"take_blend_statistics": {"kl_behavior_student": [2.0, 4, 1.0]}, "student_share": 0.15}
        self.model_executor = self.driver_worker = self.model_runner = self.model = self

    def load_weights(self, weights):
        self.events += [("student", name) for name, _ in weights]

    def load_partner_weights(self, index, weights):
        self.events += [(f"partner_{index}", name, tensor.clone()) for name, tensor in weights]

    def apply_model(self, function):
        return [function(self)]

    def collective_rpc(self, method, args=()):
        self.events.append((method, *args))
        return [self.answers.get(method)]

    def reset_prefix_cache(self):
        self.events.append("reset")

    def sleep(self, level):
        self.events.append("sleep")

    def wake_up(self, tags):
        self.events.append(f"wake {tags[0]}")

    def generate(self, prompts, sampling_params, use_tqdm):
        self.events.append(("generate", sampling_params["temperature"]))
        return [Request(prompt) for prompt in prompts]
