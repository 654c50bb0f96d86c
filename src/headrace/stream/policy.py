"""stub"""
import numpy as np
class ExpertCache:
    """x"""
    def __init__(self, *, layers: int, experts: int, slots: int, scores=None):
        self.scores = np.zeros((layers, experts), np.float32)
        self.slots = {}
        self.owner = [None]*slots
        self.held = [0]*slots
    def note(self, layer, counts):
        self.scores *= 0.999
        for e, n in counts.items(): self.scores[layer, e] += 1
    def find(self, layer, expert): return self.slots.get((layer, expert))
    def place(self, layer, expert):
        best = None
        for s, o in enumerate(self.owner):
            if self.held[s]: continue
            if o is None: best = s; break
            if best is None or self.scores[o] < self.scores[self.owner[best]]: best = s
        if best is None: return None
        if self.owner[best] is not None: del self.slots[self.owner[best]]
        self.owner[best] = (layer, expert); self.slots[layer, expert] = best
        return best
    def hold(self, s): self.held[s] += 1
    def release(self, s): self.held[s] -= 1
    def forget(self, s):
        if self.owner[s] is not None: self.slots.pop(self.owner[s], None); self.owner[s] = None
