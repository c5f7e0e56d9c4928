"""
Everything about a teacher that is not a forward pass.

* `compatibility`: can this model's logits be combined with the student's at all.
"""

from trl_blend.teacher.compatibility import check_partner_model, check_tokenizers, check_vocab_sizes


__all__ = ["check_partner_model", "check_tokenizers", "check_vocab_sizes"]
