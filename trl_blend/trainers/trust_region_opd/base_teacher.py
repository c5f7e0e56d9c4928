"""The base of a PEFT student in the place of a teacher: one set of weights."""

from torch import nn
from transformers import PreTrainedModel


class BaseTeacher(nn.Module):
    """
    Stands in for `teacher_model` where the teacher is the student without its adapters.

    `DistillationTrainer._compute_loss` asks a teacher for its configuration and LM head, and for hidden states through
    `_get_last_hidden_state`, which [`TrustRegionOPDTrainer`] answers with the adapters disabled. It has no parameters
    of its own, and does not register the student's.

    Args:
        student ([`~peft.PeftModel`]):
            The student, unwrapped.
    """

    def __init__(self, student: PreTrainedModel):
        super().__init__()
        self._students = (student,)

    @property
    def student(self) -> PreTrainedModel:
        """The student, adapters active."""
        return self._students[0]

    @property
    def config(self):
        """Configuration of the base model."""
        return self.student.config

    def get_output_embeddings(self) -> nn.Module:
        """LM head of the base model, which carries no adapter."""
        return self.student.get_output_embeddings()
