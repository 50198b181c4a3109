"""The papers' mathematics: schedules, draws, visibility, objectives, the bound, samplers. torch and nothing else; knows nothing of text.

Legend of every module here: B batch rows, L positions of a row, V vocabulary, D width, R scored positions of a micro-batch, N
rows of logits.
"""
