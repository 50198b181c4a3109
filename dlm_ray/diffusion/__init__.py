"""The mathematics of the papers: schedules, draws, visibility, objectives, the bound, samplers. It needs only torch.

Symbols in every module here: B sequences of a batch, L positions of a sequence, V vocabulary, D width, R scored
positions of a micro-batch, N rows of logits.
"""
