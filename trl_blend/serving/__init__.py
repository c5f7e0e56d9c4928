"""
Blended decoding inside vLLM: one engine that holds a student and its partners and draws from their blend.

* `plugin`: makes vLLM know the architecture; named by the entry point `vllm.general_plugins`.
* `blend`: what an engine draws from, as data: it travels to an engine and into one that runs.
* `folder`: what an exported mixed policy is a blend of.
* `drafts`: how many tokens the student drafts, in an engine that runs.
* `arguments`: the settings an engine is started with.
* `model`: the vLLM model, a tower per model; the only module here that imports vLLM when it is loaded.
* `statistics`: sums of what the rule reports, over the tokens that the engine draws.
* `worker`: the calls that reach an engine between two generations.
"""

ARCHITECTURE = "TrlBlendForCausalLM"
"""Name that `architectures` of a configuration has to hold for vLLM to build a blend."""
