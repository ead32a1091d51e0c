"""Training: masked-gene pretraining."""
