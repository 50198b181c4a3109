"""The oracle of the KV cache.

A denoiser whose cache holds the committed ids, and which runs every text from its start in every call.
"""

import torch


class Recomputing:
    def __init__(self, denoiser, width=None):
        self.denoiser, self.mask_id = denoiser, denoiser.mask_id
        self.rows_for, self.reduce_logits = denoiser.rows_for, denoiser.reduce_logits
        self.last_rows = torch.zeros(1, width) if width else denoiser.embedding[:1]

    def new_cache(self, num_slots, capacity_tokens, *, fixed_shapes=False):
        return Texts(self.last_rows.new_zeros(num_slots, self.last_rows.shape[1]))

    def hidden(self, inputs, visibility, memory):
        texts, first = memory.slot_range(0, len(inputs)) if isinstance(memory, Texts) else memory
        rows = []
        for slot, own in enumerate(inputs.tolist(), start=first):
            texts.passed[slot] = own
            rows.append(self.denoiser.hidden(torch.tensor([texts.committed[slot] + own]), visibility)[0, -len(own) :])
        return torch.stack(rows)


class Texts:
    def __init__(self, last_rows):
        self.committed, self.passed, self.last_rows = [[] for _ in last_rows], {}, last_rows

    @property
    def lengths(self):
        return [len(text) for text in self.committed]

    def slot_range(self, first, count):
        return self, first

    def commit(self, slot, num_tokens, last_row):
        self.committed[slot] = self.committed[slot] + self.passed[slot][:num_tokens]
        self.last_rows[slot] = last_row

    def fork(self, source, target):
        self.committed[target], self.last_rows[target] = self.committed[source], self.last_rows[source]

    def release(self, slot):
        self.committed[slot] = []
