"""DIFFender (Kang et al., ECCV 2024) in pure PyTorch: find adversarial patches, paint them over.

The files follow the paper: schedule, diffusion (Sec. 3.1), localize and restore (3.2), prompts and losses (3.3),
pipeline (the whole defence), attacks, evaluation.
"""
