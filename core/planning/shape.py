"""Width, depth and heads for a wanted number of parameters, and all settings that go with it."""
import math
from dataclasses import dataclass, replace

from core.data import named
from core.net.weights import padded
from core.planning import laws
from core.planning.memory import Layout
from core.planning.wishes import shown
from core.settings import stop

# Settings of train.py that a plan decides.
FOLLOWS = {'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_hidden', 'head_dim', 'depth', 'arch',
           'init_from', 'max_steps', 'tied', 'mlp', 'bias', 'qk_norm', 'norm', 'position'}
# ... and those that say how it lies on the GPUs.
LAYOUT = {'tp', 'pp', 'zero', 'replicas', 'sequence_parallel', 'pp_schedule', 'micro_batch_size',
          'activation_checkpointing', 'save_interval'}


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    n_hidden: int
    vocab_size: int
    tied: bool

    def parameters(self) -> int:
        """Of Qwen3's architecture: per block q and o (C x C), k and v (C x kv), three matrices of
        the MLP, two norms and those of q and k; tables; the last norm."""
        C, D = self.n_embd, self.n_embd // self.n_head
        block = 2 * C * C + 2 * C * self.n_kv_head * D + 3 * C * self.n_hidden + 2 * C + 2 * D
        return self.n_layer * block + (1 if self.tied else 2) * self.vocab_size * C + C

    def flops_per_token(self, T: int) -> int:
        """Of a forward and a backward pass, as model.flops_per_token counts them: 6 for each weight
        that multiplies, and 12 L C T for attention."""
        C, D = self.n_embd, self.n_embd // self.n_head
        block = 2 * C * C + 2 * C * self.n_kv_head * D + 3 * C * self.n_hidden
        return 6 * (self.n_layer * block + self.vocab_size * C) + 12 * self.n_layer * C * T


def width_per_layer(N: float) -> float:
    """Channels for each layer in models that are in use: 64 (GPT-2 small, 124M) to 128 (Llama 2 7B
    and 13B; 102 in 70B). The loss hardly depends on it (Kaplan et al. 2020, figure 5)."""
    return 64 + 64 * min(1, max(0, math.log(N / 124e6) / math.log(7e9 / 124e6)))


def choose(N: float, vocab_size: int) -> Shape:
    """The shape nearest to N parameters: of every width with the depth that goes with it, that
    whose MLP has then nearest to three times as many channels. (8/3 makes its three matrices as
    large as GPT-2's two; Llama 3 has 3.5.) Heads have 128 channels from a width of 1,024 on, below
    it 64, below 256 16 to 32; from 4,096 on 8 heads have keys and values (as in Llama 3); embedding
    and head share a matrix below a billion parameters."""
    tied, best = N < 1e9, None
    step = 16 if N < 3e6 else 64 if N < 200e6 else 256 if N < 1.5e9 else 512 if N < 30e9 else 1024
    for C in range(step, 32_769, step):
        head = next(size for size, least in ((128, 1024), (64, 256), (32, 32), (16, 0))
                    if C >= least and C % size == 0)
        layers = 1 if N < 1e9 else 4        # in fours, so that pipelines can have stages
        n_layer = layers * max(1, round(C / width_per_layer(N) / layers))
        n_kv_head = 8 if C >= 4096 and C // head % 8 == 0 else C // head
        none = Shape(n_layer, C, C // head, n_kv_head, 0, vocab_size, tied)
        unit = 256 if C >= 1024 else 8
        n_hidden = unit * round((N - none.parameters()) / (3 * C * n_layer) / unit)
        if n_hidden > 0:
            away = abs(math.log(n_hidden / C / 3))
            if best is None or away < best[0]:
                best = away, replace(none, n_hidden=n_hidden)
    if best is None:
        stop(f'{N:,.0f} parameters: too few for a vocabulary of {vocab_size:,}; give a smaller '
             '--vocab_size, or wish for more')
    if best[1].n_hidden > 8 * best[1].n_embd and N > 1e9:
        stop(f'{N:.3g} parameters: more than a GPT of 32,768 channels has; wish for fewer')
    return best[1]


def settings_for(N: float, D: float, data: str, given: dict, most_flops: float = math.inf
                 ) -> tuple[dict, list]:
    """train.py's settings for N parameters and D tokens, or as many as most_flops allow (fewer, as
    attention is not in 6 N D); and the same in groups with their comments, for a config file.
    `data` is a prepared dataset or '', `given` are train.py's settings that the user has set."""
    if clash := FOLLOWS & given.keys():
        stop(f'{min(clash)}={given[min(clash)]}: follows from what you wish; leave it out, or plan '
             'for a config file that says what is trained')
    C = 6 * N * D
    block = given.get('block_size') or (4096 if N >= 1e9 else 2048 if N >= 3e8 else 1024
                                        if N >= 3e7 else 256)
    dataset = data or given.get('dataset', 'fineweb-edu' if N >= 3e7 else 'tinystories')
    chosen: dict = {'dataset': dataset}
    if N < 3e7 and not data and 'tokenizer' not in given and 'vocab_size' not in given:
        chosen |= {'tokenizer': 'bpe', 'vocab_size': 4096 if N >= 2e6 else 512}
    vocab = given.get('vocab_size') or chosen.get('vocab_size') or known_vocabulary(
        data, dataset, given)
    shape = choose(N, vocab)
    sequences = given.get('batch_size') or max(8, 2 ** round(math.log2(
        laws.batch_tokens(C) / block)))
    D = min(D, most_flops / shape.flops_per_token(block))
    steps = max(1, math.floor(D / (sequences * block)))
    rate = laws.learning_rate(C)
    best = laws.vocabulary(C, shape.n_embd)
    groups = [
        (f'a vocabulary of about {best:,.0f} would be best (Tao et al. 2024)', chosen),
        (f'{shown(D)} tokens / ({sequences:,} x {block:,}) = {steps:,} steps; a batch near '
         f'0.292 C^0.327 = {shown(laws.batch_tokens(C))} tokens (Bi et al. 2024)',
         {'batch_size': sequences, 'block_size': block, 'max_steps': steps}),
        ('Qwen3\'s architecture: ' + arithmetic(shape),
         {'n_layer': shape.n_layer, 'n_head': shape.n_head, 'n_kv_head': shape.n_kv_head,
          'n_embd': shape.n_embd, 'n_hidden': shape.n_hidden, 'norm': 'rmsnorm', 'norm_eps': 1e-6,
          'position': 'rope', 'rope_theta': 500_000.0 if block > 2048 else 10_000.0,
          'mlp': 'swiglu', 'qk_norm': True, 'tied': shape.tied, 'bias': False}),
        (f'rates to start from, not tuned: AdamW\'s is 0.312 C^-0.125 = {rate:.1e} (Bi et al. 2024)'
         ',\nMuon\'s that of the presets',
         {'optimizer': 'muon', 'muon_learning_rate': 0.02, 'muon_weight_decay': 0.05,
          'learning_rate': float(f'{rate:.2g}'), 'weight_decay': 0.0, 'schedule': 'wsd',
          'warmup_steps': min(1000, max(1, steps // 50)), 'min_lr_fraction': 0.0})]
    groups = [(comment, {k: given.get(k, v) for k, v in group.items()})
              for comment, group in groups]
    more = {k: v for k, v in given.items()
            if k not in LAYOUT and not any(k in group for _, group in groups)}
    groups += [('as you gave it', more)] * bool(more)
    return {k: v for _, group in groups for k, v in group.items()}, groups


def known_vocabulary(data: str, dataset: str, given: dict) -> int:
    """Tokens in a dataset's vocabulary, rounded up as train.py does."""
    folder = given.get('data_dir', 'data')
    n = named.read_meta(named.find(data, folder)).get('vocab_size', 0) if data else \
        named.count_tokens(dataset, given.get('tokenizer', ''), 0)
    return padded(n or 50_257)


def arithmetic(shape) -> str:
    """Where the parameters are."""
    head = shape.n_embd // shape.n_head
    return (f'{shape.n_layer} x ({shape.n_embd:,} x (2 x {shape.n_embd:,} + 2 x '
            f'{shape.n_kv_head * head:,})\n+ 3 x {shape.n_embd:,} x {shape.n_hidden:,}), and '
            f'{"one table" if shape.tied else "two tables"} of {shape.vocab_size:,} x '
            f'{shape.n_embd:,}')


def layout_settings(layout: Layout) -> dict:
    """The settings of train.py that make this layout."""
    found = {'zero': layout.zero, 'tp': layout.tp, 'pp': layout.pp,
             'replicas': layout.replicas if layout.zero and layout.replicas > 1 else 0,
             'sequence_parallel': layout.sequence_parallel,
             'activation_checkpointing': layout.recompute, 'micro_batch_size': layout.rows}
    if layout.chunks > 1:
        found['pp_schedule'] = layout.pp_schedule
    return {k: v for k, v in found.items() if v not in (0, False) and (k, v) not in (
        ('tp', 1), ('pp', 1))}
