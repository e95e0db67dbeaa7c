"""Scaling laws: the loss of a model of N parameters after D tokens, and the best use of C FLOPs.

C = 6 N D throughout (Kaplan et al. 2020, section 2.1), with N counting every parameter, as Hoffmann
et al. 2022 ("Chinchilla") count. Losses are in nats per token of their data and their tokenizer:
compare them with each other, not with a loss of yours. `python plan.py fit` finds your own law.
"""
import math
from dataclasses import dataclass

import numpy as np

# Hoffmann et al. 2022, tables 3 and A3: parameters and tokens of compute-optimal models.
SIZES = (400e6, 1e9, 10e9, 67e9)
TOKENS = {1: (8.0e9, 20.2e9, 205.1e9, 1.5e12),     # minima over training curves
          2: (7.7e9, 20.0e9, 219.5e9, 1.7e12)}     # parabolas through runs of equal FLOPs


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 2)."""
    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, N: float, D: float) -> float:
        """Nats per token."""
        return self.E + self.A / N ** self.alpha + self.B / D ** self.beta

    def optimum(self, C: float) -> tuple[float, float]:
        """N and D of the least loss for C FLOPs (their equation 4)."""
        a = self.beta / (self.alpha + self.beta)
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        N = G * (C / 6) ** a
        return N, C / 6 / N

    def tokens_of(self, N: float) -> float:
        """D for which N is the optimum: there the two terms' slopes by ln C are equal."""
        return (self.beta * self.B / (self.alpha * self.A)) ** (1 / self.beta) \
            * N ** (self.alpha / self.beta)

    def size_of(self, D: float) -> float:
        """N for which D is the optimum."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / self.alpha) \
            * D ** (self.beta / self.alpha)

    def tokens_for(self, N: float, loss: float) -> float:
        """D after which N parameters have this loss; infinite if they never do."""
        left = loss - self.E - self.A / N ** self.alpha
        return (self.B / left) ** (1 / self.beta) if left > 0 else math.inf

    def compute_for(self, loss: float) -> float:
        """Least FLOPs for a loss; infinite below E."""
        if loss <= self.E:
            return math.inf
        low, high = 0.0, 100.0      # powers of ten; the loss falls with C
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self.loss(*self.optimum(10 ** middle)) > loss else (
                low, middle)
        return 10 ** high


# Besiroglu et al. 2024 (arXiv 2404.10102), who fit the third approach again, to the runs in the
# figures of Hoffmann et al. It gives 20 tokens per parameter at Chinchilla's budget, as approaches
# 1 and 2 do. The published constants do not (93 as printed, about 70 before rounding): the
# optimizer had stopped too early, as it averaged the losses that it should have summed.
CORRECTED = Law(E=1.8172, A=482.01, alpha=0.3478, B=2085.43, beta=0.3658)
PUBLISHED = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)

# Muennighoff et al. 2023 (arXiv 2305.16264), appendix A: how fast repeated tokens, and parameters
# beyond those that the unique tokens are worth, lose their value.
REPEATED_TOKENS, EXCESS_PARAMETERS = 15.387756, 5.309743


def tokens_by_table(N: float, approach: int) -> float:
    """D for N parameters by approach 1 or 2: a line through the table's logarithms."""
    slope, height = np.polyfit(np.log(SIZES), np.log(TOKENS[approach]), 1)
    return math.exp(height + slope * math.log(N))


def worth(n: float, unique: float, constant: float) -> float:
    """What n tokens of which `unique` are different are worth in fresh ones:
    U + U R* (1 - exp(-R / R*)), R = n / U - 1 (Muennighoff et al. 2023, equation 5)."""
    if n <= unique:
        return n
    repeats = n / unique - 1
    return unique + unique * constant * (1 - math.exp(-repeats / constant))


def loss_repeated(law: Law, N: float, D: float, unique: float) -> float:
    """The loss where only `unique` of D tokens are different (Muennighoff et al. 2023, equation 6):
    tokens and parameters count for what they are worth."""
    if D <= unique:
        return law.loss(N, D)
    return law.loss(worth(N, min(N, law.size_of(unique)), EXCESS_PARAMETERS),
                    worth(D, unique, REPEATED_TOKENS))


def overtrained(law: Law, N: float, D: float, part: float) -> tuple[float, float, float]:
    """A model of part * N parameters with the loss of (N, D): its tokens, the factor on the FLOPs
    of training, and after how many served tokens it has saved what it cost more (2 N FLOPs each;
    Sardana et al. 2024, arXiv 2401.00448, equation 2)."""
    small = part * N
    tokens = law.tokens_for(small, law.loss(N, D))
    extra = 6 * (small * tokens - N * D)
    return tokens, small * tokens / (N * D), extra / (2 * (N - small))


def batch_tokens(C: float) -> float:
    """Tokens per step near the best (Bi et al. 2024, "DeepSeek LLM", arXiv 2401.02954, equation 1:
    AdamW, C from 1e17 to 2e19): a value to start from."""
    return 0.2920 * C ** 0.3271


def learning_rate(C: float) -> float:
    """AdamW's peak rate near the best, from the same equation: a value to start from."""
    return 0.3118 * C ** -0.1250


def vocabulary(C: float, n_embd: int) -> float:
    """Tokens in a vocabulary near the best: its parameters are 0.20 C^0.42 (Tao et al. 2024,
    arXiv 2407.13623, section 4.1, which is fit from 33 million to 3 billion parameters)."""
    return 0.20 * C ** 0.42 / n_embd
