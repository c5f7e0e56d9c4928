"""
Everything about a teacher that is not a forward pass, and the data that are made with one.

* `compatibility`: can this model's logits be combined with the student's at all.
* `store`, `shards`, `manifest`, `columns`, `validation`, `lightning`: rollouts with log-probabilities on disk.
* `rollouts`, `scoring`: how they are made, with transformers (`local_*`) or vLLM (`vllm_*`), resumable.
* `fingerprint`, `provenance`, `consistency`: which models made them, and whether these belong together.

Import from these modules, or the public names from `trl_blend`.
"""

from trl_blend.teacher.compatibility import check_partner_model, check_tokenizers, check_vocab_sizes


__all__ = ["check_partner_model", "check_tokenizers", "check_vocab_sizes"]
