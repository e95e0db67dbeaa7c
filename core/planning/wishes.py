"""What a user wishes and has, and the parameters and tokens that follow."""
import math
import re
from dataclasses import dataclass

import numpy as np

from core.data import named
from core.planning import laws, machines
from core.planning.machines import GPU
from core.settings import stop

UNITS = {'': 1, 'k': 1e3, 'm': 1e6, 'b': 1e9, 't': 1e12}
FEWEST = 1.0        # tokens per parameter: below it nothing is learnt (GPT-3 had 1.7)
MOST = 1e14         # parameters: beyond any GPT
MOST_EPOCHS = 16.0  # Muennighoff et al. 2023, figure 5: reading the same more often brings little


def amount(text: str, name: str) -> float:
    """7b, 1.4T, 300_000 or 1e21 as a number; 0 for ''. Stops at anything else."""
    found = re.fullmatch(r'([0-9_]*\.?[0-9]+(?:e\+?[0-9]+)?)([kmbt]?)', text.strip().lower())
    if not text:
        return 0.0
    value = float(found[1].replace('_', '')) * UNITS[found[2]] if found else 0.0
    most = 1e35 if name == 'flops' else 1e16
    if not 1 <= value <= most:
        stop(f'{name}={text}: must be a number from 1 to {most:g}, such as 125m, 7b, 1.4t or 1e21')
    return value


def shown(x: float) -> str:
    """A number in words: 6.99 billion is 6.99B."""
    for unit, size in (('T', 1e12), ('B', 1e9), ('M', 1e6), ('k', 1e3)):
        if abs(x) >= 0.9995 * size:
            return f'{float(f"{x / size:.3g}"):g}{unit}'
    return f'{x:.3g}'


@dataclass
class Wishes:
    """Numbers; 0 where nothing was given."""
    params: float
    tokens: float
    flops: float
    target_loss: float
    hours: float
    budget: float
    gpus: int
    card: GPU
    price: float
    mfu: float
    unique: float = math.inf        # different tokens that there are

    @classmethod
    def read(cls, settings: dict, card: GPU) -> 'Wishes':
        """From the settings of plan.py, and those of train.py that were given. Stops if nothing is
        wished."""
        s = settings
        found = cls(amount(s['params'], 'params'), amount(s['tokens'], 'tokens'),
                    amount(s['flops'], 'flops'), s['target_loss'], s['hours'], s['budget'],
                    s['gpus'], card, s['price'] or card.price, s['mfu'])
        for name in ('hours', 'budget'):
            if 0 < s[name] < 0.01:
                stop(f'{name}={s[name]:g}: must be 0.01 at least')
        if s['data']:
            meta = named.read_meta(named.find(s['data'], s.get('data_dir', 'data')))
            found.unique = float(meta['train_tokens'])
        if not any((found.params, found.tokens, found.flops, found.target_loss, found.budget,
                    found.hours, s['data'])):
            stop('give what you wish: --params=7b, --tokens=300b, --flops=1e21, --budget=900, '
                 '--target_loss=2.2, --data=data/x, or --gpus=8 with --hours=24')
        if found.hours and not (found.gpus or found.params or found.tokens or found.flops
                                or found.budget or found.target_loss):
            stop(f'hours={s["hours"]:g}: on how many GPUs? Give --gpus')
        return found

    def rate(self, N: float) -> float:
        """FLOP/s of one GPU for N parameters."""
        return self.card.peak * (self.mfu or machines.expected_mfu(self.card, N)[0])

    def allowed(self, N: float) -> tuple[float, str]:
        """The FLOPs that time or money allows for N parameters, and which of them; infinite if
        neither is given."""
        limits = [(math.inf, '')]
        if self.flops:
            limits.append((self.flops, f'flops={self.flops:g}'))
        if self.hours and self.gpus:
            limits.append((self.gpus * self.hours * 3600 * self.rate(N),
                           f'gpus={self.gpus}, hours={self.hours:g}'))
        if self.budget:
            limits.append((self.budget / self.price * 3600 * self.rate(N),
                           f'budget={self.budget:g}'))
        return min(limits)

    def solve(self, law: laws.Law) -> tuple[float, float]:
        """N and D. Stops if the wishes contradict each other, saying what would do."""
        N, D, limit = self.params or 7e9, 0.0, ''
        for _ in range(20):     # the rate depends on N, which depends on the rate
            before = N
            C, limit = self.allowed(N)
            N, D = self.split(law, C, limit)
            if abs(math.log(N / before)) < 1e-9:
                break
        if N > MOST:
            stop(f'{limit or "your wish"}: asks for {N:.1e} parameters; wish for less')
        if D / N < FEWEST:
            need = law.tokens_of(N)
            best = law.optimum(6 * N * D)[0]
            stop(f'{limit or f"tokens={D:g}"}: enough for {shown(D)} tokens with {shown(N)} '
                 f'parameters, {D / N:.2g} for each, from which nothing is learnt; --params='
                 f'{shown(best).lower()} would be balanced, or {need / D:,.0f} times as much of it')
        if D > MOST_EPOCHS * self.unique:
            stop(f'data: has {shown(self.unique)} tokens, of which {shown(D)} are '
                 f'{D / self.unique:,.0f} readings; more than {MOST_EPOCHS:g} bring little. Give '
                 f'--tokens={shown(MOST_EPOCHS * self.unique).lower()} at most, or more text')
        return N, D

    def split(self, law: laws.Law, C: float, limit: str) -> tuple[float, float]:
        """N and D within C FLOPs."""
        N, D = self.params, self.tokens
        if N and D:
            if 6 * N * D > C * 1.0001:
                stop(f'{limit}: {shown(N)} parameters and {shown(D)} tokens take '
                     f'{6 * N * D / C:,.1f} times as much; with this, {shown(C / 6 / N)} tokens '
                     f'would do, or {shown(C / 6 / D)} parameters')
            if self.target_loss and law.loss(N, D) > self.target_loss:
                stop(f'target_loss={self.target_loss:g}: {shown(N)} parameters and {shown(D)} '
                     f'tokens reach {law.loss(N, D):.3f}; leave one of the three out')
            return N, D
        if self.target_loss:
            return self.to_loss(law, C, limit)
        if math.isinf(C):
            if N:
                return N, law.tokens_of(N)
            D = D or 4 * self.unique    # almost as good as as many new ones
            return law.size_of(min(D, 4 * self.unique)), D
        if N:
            return N, C / 6 / N
        if D:
            return C / 6 / D, D
        return self.best(law, C)

    def best(self, law: laws.Law, C: float) -> tuple[float, float]:
        """The least loss of C FLOPs, where tokens may repeat."""
        if law.optimum(C)[1] <= self.unique:
            return law.optimum(C)
        sizes = np.geomspace(law.optimum(C)[0] / 100, law.optimum(C)[0] * 100, 2001)
        fitting = [N for N in sizes if C / 6 / N <= MOST_EPOCHS * self.unique] or [sizes[-1]]
        N = min(fitting, key=lambda N: laws.loss_repeated(law, N, C / 6 / N, self.unique))
        return float(N), C / 6 / float(N)

    def to_loss(self, law: laws.Law, C: float, limit: str) -> tuple[float, float]:
        """The cheapest way to the loss that is wished."""
        loss = self.target_loss
        N, D = self.params, self.tokens
        if N:
            D = law.tokens_for(N, loss)
        elif D:
            N = laws.Law(law.E, law.B, law.beta, law.A, law.alpha).tokens_for(D, loss)
        else:
            need = law.compute_for(loss)
            N, D = law.optimum(need) if math.isfinite(need) else (math.inf, math.inf)
        if not math.isfinite(N * D):
            stop(f'target_loss={loss:g}: no number of tokens leads there'
                 + (f' with {shown(self.params)} parameters' if self.params else '')
                 + f'; the law ends at {law.E:.3f}')
        if 6 * N * D > C:
            reached = law.loss(*law.optimum(C))
            stop(f'target_loss={loss:g}: takes {6 * N * D:.2e} FLOP, and {limit} allows {C:.2e}; '
                 f'with this, {reached:.3f} would do')
        return N, D

    def gpus_for(self, N: float, flops: float) -> int:
        """As many GPUs as were given, or as the hours ask for, in whole machines; else one for
        what it does in two days, or eight."""
        if self.gpus:
            return self.gpus
        hours = flops / self.rate(N) / 3600
        if self.hours:
            n = math.ceil(hours / self.hours - 1e-9)
            return 2 ** math.ceil(math.log2(n)) if n <= 8 else 8 * math.ceil(n / 8)
        return 1 if hours < 48 else 8
