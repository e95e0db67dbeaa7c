"""What a trained character model has inside: python dev/pictures.py [out/shakespeare].

Writes docs/guide/data/: shakespeare.json (the run's log), attention_patterns.json (the weights of
heads on one line of text), residual_norms.json (length of the residual stream after each block),
embeddings.json (characters in two dimensions) and loss_by_position.json; dev/figures.py draws them.
"""
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import model as model_module  # noqa: E402
from core.data.dataset import open_shard  # noqa: E402
from core.data.named import find  # noqa: E402
from core.run import log, models  # noqa: E402

TARGET = ROOT / 'docs/guide/data'
LINE = 'ROMEO:\nO, speak again, bright angel!'


def write(name: str, **found) -> None:
    command = f'python dev/pictures.py {" ".join(sys.argv[1:])}'.strip()
    TARGET.mkdir(parents=True, exist_ok=True)
    (TARGET / f'{name}.json').write_text(json.dumps({'command': command, **found}) + '\n')
    print(f'docs/guide/data/{name}.json')


def rounded(x: torch.Tensor, digits: int = 4) -> list:
    """Nested lists of numbers with few digits."""
    return x.double().mul(10 ** digits).round().div(10 ** digits).tolist()


@torch.no_grad()
def attention_weights(model, ids: list[int]) -> torch.Tensor:
    """(L, H, T, T): what each head looks at. The model's `attend` is replaced meanwhile by its
    plain form, which keeps the weights."""
    found, attend = [], model_module.attend

    def plain(q, k, v, mask, dropout):
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        scores = q @ k.mT / q.size(-1) ** 0.5
        future = torch.ones(q.size(2), q.size(2), dtype=torch.bool).triu(1)
        found.append(scores.masked_fill(future, -torch.inf).softmax(dim=-1))
        return found[-1] @ v

    model_module.attend = plain
    try:
        model(torch.tensor([ids]))
    finally:
        model_module.attend = attend
    return torch.cat(found)


def two_heads(weights: torch.Tensor) -> list[tuple[int, int]]:
    """The head that looks most at the last three characters, and the one that looks farthest back:
    (layer, head) each."""
    T = weights.size(-1)
    place = torch.arange(T, dtype=torch.float32)
    distance = (weights * (place[:, None] - place).clamp(min=0)).sum(dim=-1)[..., T // 2:].mean(-1)
    return [divmod(int(i), weights.size(1)) for i in (distance.argmin(), distance.argmax())]


@torch.no_grad()
def residual_norms(model, ids: torch.Tensor) -> list[float]:
    """Root mean square of the residual stream of ids (B, T) behind the embedding and each block."""
    found = []
    hooks = [part.register_forward_hook(lambda module, args, out: found.append(
        out.square().mean().sqrt().item())) for part in (model.wte, *model.h.values())]
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


def write_log(run: str) -> None:
    """The losses and learning rates of a run, and what it ended with."""
    start, = log.read_log(run, 'start')
    end, = log.read_log(run, 'end')
    steps, evals = log.read_log(run, 'step'), log.read_log(run, 'eval')
    write('shakespeare', run='python train.py config/shakespeare.py',
          device=start['device'], parameters=start['parameters'],
          val_loss=round(evals[-1]['val_loss'], 4), seconds=round(evals[-1]['seconds'], 1),
          step=[e['step'] for e in steps], train_loss=[round(e['train_loss'], 4) for e in steps],
          learning_rate=[e['learning_rate'] for e in steps],
          eval_step=[e['step'] for e in evals], eval_loss=[round(e['val_loss'], 4) for e in evals],
          best_val_loss=round(end['best_val_loss'], 4))


def main(run: str) -> None:
    write_log(run)
    model, tokenizer, _ = models.load_run(run)
    model.eval()
    ids = tokenizer.encode(LINE)
    weights = attention_weights(model, ids)
    write('attention_patterns', text=LINE.replace('\n', '/'), heads=[
        {'layer': layer + 1, 'head': head + 1, 'weights': rounded(weights[layer, head], 3)}
        for layer, head in two_heads(weights)])

    ids = torch.from_numpy(open_shard(find('shakespeare') / 'val-00000.bin').astype('int64'))
    size = model.config.block_size
    n = (len(ids) - 1) // size
    x, y = ids[:n * size].view(n, size), ids[1:n * size + 1].view(n, size)
    write('residual_norms', rms=[round(r, 4) for r in residual_norms(model, x[:16])])

    with torch.no_grad():
        losses = torch.cat([model(*part, reduction='none') for part in zip(x.split(16),
                                                                           y.split(16))])
    write('loss_by_position', loss=rounded(losses.mean(dim=0)), windows=n)

    table = model.wte.weight.detach()[:len(tokenizer)]
    table = table - table.mean(dim=0)
    places = table @ torch.linalg.svd(table, full_matrices=False)[2][:2].T
    characters = [token.decode('utf-8', 'replace') for token in tokenizer.tokens]
    write('embeddings', characters=characters, places=rounded(places))


if __name__ == '__main__':
    main(sys.argv[1] if sys.argv[1:] else 'out/shakespeare')
