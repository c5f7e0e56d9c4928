"""A task, three tiny trained models and an evaluation on which RL and distillation can be seen to work on a CPU."""
