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
        texts, slots, num_slots = memory.slot_range(0, len(inputs)) if isinstance(memory, Texts) else memory
        rows, passed = [], {}
        for number, (slot, own) in enumerate(zip(slots, inputs.tolist(), strict=False)):
            before = texts.committed[slot]
            if number < num_slots:
                passed[slot] = own
            else:  # the block after the one that this pass runs in the row of the slot
                before = before + passed[slot]
            rows.append(self.denoiser.hidden(torch.tensor([before + own]), visibility)[0, -len(own) :])
        texts.passed |= passed
        return torch.stack(rows)


class Texts:
    def __init__(self, last_rows):
        self.committed, self.passed, self.last_rows = [[] for _ in last_rows], {}, last_rows

    @property
    def lengths(self):
        return [len(text) for text in self.committed]

    def slot_range(self, first, count):
        return self, range(first, first + count), count

    def with_lookahead(self, num_slots, slots, num_tokens, num_rows):
        assert num_rows == len(slots), "only calls of fixed shapes have padding"
        return self, [*range(num_slots), *slots], num_slots

    def commit(self, slot, num_tokens, last_row):
        self.committed[slot] = self.committed[slot] + self.passed[slot][:num_tokens]
        self.last_rows[slot] = last_row

    def fork(self, source, target):
        self.committed[target], self.last_rows[target] = self.committed[source], self.last_rows[source]

    def release(self, slot):
        self.committed[slot] = []
