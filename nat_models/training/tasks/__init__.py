"""What can be learnt; nat_models.training.task says what a task is."""
