"""The recurrent language model that transformers replaced, behind the interface of model.GPT."""
import math

import torch.nn as nn

from core.net.kernels import Linear, lm_loss, tail


class State:
    """Takes the place of the KV cache: hidden and cell state, whose size never grows."""
    hidden = None

    def room(self):
        return math.inf


class LSTM(nn.Module):
    """Embedding, LSTM, linear head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False      # a setting of GPT, whose blocks it is about
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.lstm = nn.LSTM(config.n_embd, config.n_embd, config.n_layer, batch_first=True,
                            dropout=config.dropout if config.n_layer > 1 else 0.0)
        self.lm_head = Linear(config.n_embd, config.n_classes or config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, idx, targets=None, *, doc=None, cache=None, n_logits=0, reduction='mean'):
        """As GPT.forward, with a `State` for the cache. A row holds one document; -1 in `doc` marks
        padding at its end."""
        x, n_real, state = self.wte(idx), None, cache.hidden if cache is not None else None
        if doc is None:
            x, state = self.lstm(x, state)
        else:
            if bool((doc.clamp(min=0) != doc[:, :1]).logical_and(doc >= 0).any()):
                raise ValueError('an LSTM cannot keep apart documents packed in one row')
            n_real = (doc >= 0).sum(dim=1)
            packed = nn.utils.rnn.pack_padded_sequence(     # a row of padding has a token, too
                x, n_real.clamp(min=1).cpu(), True, enforce_sorted=False)
            x, state = self.lstm(packed, state)
            x, _ = nn.utils.rnn.pad_packed_sequence(x, True, total_length=idx.size(1))
        if cache is not None:
            cache.hidden = state
        if targets is not None:
            return lm_loss(self.lm_head, x, targets, reduction)
        return self.lm_head(tail(x, n_logits, n_real) if n_logits else x)
