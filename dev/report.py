"""The tables of docs/benchmarks.md, from JSON lines: python dev/report.py.

    python dev/report.py NAME ... [--nanogpt=DIR] [--smollm2=FILE]

measures what MEASURED names: it runs the commands of NAME and appends what they found to
docs/measured.jsonl, a line each, with machine, date and commit. Then the tables between
<!-- NAME --> and <!-- end --> are written anew from the newest line of each command. Where a line
has no commit, it was typed in from an earlier page.
"""
import argparse
import datetime
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from core.device import cpu_count, cpu_info  # noqa: E402
from core.run.log import git_hash, read_log  # noqa: E402

PAGE, LINES = ROOT / 'docs/benchmarks.md', ROOT / 'docs/measured.jsonl'
SMALL = '--n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --vocab_size=65 ' \
        '--bias=False'
LARGE = '--batch_size=4 --block_size=1024 --bias=False --vocab_size=50304'
KINDS = '--weights=float32,int8,int4'


def seeds(preset: str) -> list[tuple[str, str]]:
    return [(f'{preset}, seed {seed}', f'train.py config/{preset}.py --seed={seed} '
             f'--out_dir=out/report-{preset}-{seed}') for seed in (1337, 1, 2)]


# Name of a table -> (label, command) of its rows, or of the commands that give them.
MEASURED = {
    'runs': [*seeds('shakespeare'),
             ('shakespeare_lstm', 'train.py config/shakespeare_lstm.py --out_dir=out/report-lstm')],
    'runs-bpe': seeds('shakespeare_bpe'),
    'runs-best': seeds('shakespeare_best'),
    'step': [('compiled', f'bench.py train {SMALL} --rounds=9 --vs=NANOGPT'),
             ('eager', f'bench.py train {SMALL} --compile=False --rounds=9 --vs=NANOGPT')],
    'large-step': [('eager', f'bench.py train {LARGE} --compile=False --rounds=3 --steps=2 '
                    '--warmup=1 --vs=NANOGPT')],
    'memory': [('eager', f'bench.py memory {LARGE} --compile=False --vs=NANOGPT'),
               ('compiled', f'bench.py memory {LARGE} --vs=NANOGPT')],
    'race': [('', 'dev/race.py config/shakespeare_quick.py --vs=NANOGPT --tuned_steps=480 '
              '--peer_learning_rates=4e-3')],
    'decode': [('', f'bench.py decode --vs=llama.cpp {KINDS} --rounds=9')],
    'decode-smollm2': [('', f'bench.py decode SMOLLM2 --vs=llama.cpp {KINDS} --rounds=9')],
    'decode-transformers': [('', 'bench.py decode --vocab_size=50257 --vs=transformers '
                             '--rounds=9')],
    'decode-rows': [('', 'bench.py decode --vs=llama.cpp --rows=8,32 --rounds=3 '
                     '--weights=float32,bfloat16,int8,int4')],
    'prefill': [('', 'bench.py decode --vs=llama.cpp --weights=float32,int8 --prompt_tokens=512 '
                 '--new_tokens=1 --rounds=9')],
}


def measure(label: str, command: str, places: dict[str, str]) -> dict:
    """Run a command; what it found, with what one must know to compare it."""
    words = [re.sub('NANOGPT|SMOLLM2', lambda m: places[m[0]], word) for word in command.split()]
    print(f'python {" ".join(words)}', flush=True)
    run = ROOT / words[-1].partition('=')[2] if words[0] == 'train.py' else None
    if run:
        shutil.rmtree(run, ignore_errors=True)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f'error: {command}: ended with status {done.returncode}; see above')
    if run:
        last, start = read_log(run, 'eval')[-1], read_log(run, 'start')[0]
        nats = last['bits_per_byte'] * math.log(2)      # of a byte, here the same as a character
        found = {'loss': nats, 'seconds': last['seconds'], 'parameters': start['parameters']}
    else:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    machine = f'{cpu_count()} cores of {cpu_info("model name")}'
    return {'label': label, 'command': command, 'machine': machine, 'commit': git_hash()[:8],
            'date': datetime.date.today().isoformat(), 'result': found}


# ---------------------------------------------------------------------------------------------
# Tables


def ratio(found: dict, name: str) -> str:
    """A median ratio with its range, '' if there is none."""
    spread = found.get(name.replace('ratio', 'range'), ())
    return f'{found.get(name, 0):.2f} ({" to ".join(f"{x:.2f}" for x in spread)})' if spread else \
        f'{found[name]:.2f}' if name in found else ''


def rows_of(name: str, line: dict) -> list[list[str]]:
    """The cells of a line's rows."""
    found, label = line['result'], line['label']
    if name.startswith('runs'):
        return [[label, f'{found["parameters"]:,}', f'{found["loss"]:.4f}',
                 f'{found["seconds"]:.0f}']]
    if name in ('step', 'large-step'):
        return [[label, f'{found["ours_tokens_per_second"]:,}', f'{found["ours_mfu"]:.0%}', *(
            f'{found[f"{peer}_tokens_per_second"]:,}; {ratio(found, f"{peer}_ratio")}'
            if f'{peer}_ratio' in found else '' for peer in ('nanogpt_eager', 'nanogpt_compiled'))]]
    if name == 'memory':
        return [[label, f'{found["ours_peak_mib"]:,.0f}', f'{found["nanogpt_peak_mib"]:,.0f}',
                 f'{found["ratio"]:.3f}']]
    if name == 'race':
        return [[{'stock': 'as its README says', 'tuned': 'the best of the learning rates'}[kind],
                 f'{one["learning_rate"]:g}', f'{one["nanogpt"]["loss"]:.4f}',
                 *(f'{one[side]["seconds"]:.1f}' for side in ('nanogpt', 'ours')),
                 *(f'{one[f"{spent}_ratio"]:.1f}' for spent in ('seconds', 'tokens', 'flops'))]
                for kind, one in found.items() if kind in ('stock', 'tuned')]
    vs, cells = found['vs'], []
    for run in found['runs']:
        speed = [f'{run[f"{side}_tokens_per_second"]:.1f}' if f'{side}_tokens_per_second' in run
                 else '' for side in ('ours', 'ours_compiled', vs)]
        cells.append([str(run['rows']), run['weights'], *speed,
                      f'{run["ours_mbu"]:.0%}' if 'ours_mbu' in run else '',
                      *(ratio(run, f'{vs}_ratio{way}') for way in ('', '_compiled'))])
    return cells


HEADS = {'runs': '| | parameters | validation loss | seconds of training |',
         'step': '| | ours, tokens/s | of the matrix rate | nanoGPT eager; ratio | nanoGPT '
                 'compiled; ratio |',
         'memory': '| | ours, MiB at most | nanoGPT | ratio |',
         'race': '| nanoGPT | learning rate | its loss | its seconds | ours, seconds | ratio of '
                 'seconds | of tokens | of FLOPs |',
         'decode': '| rows | weights | ours, eager | ours, compiled | the other | share of what '
                   'memory allows, eager | ratio, eager | ratio, compiled |'}


def table(name: str, lines: list[dict]) -> str:
    """The Markdown of a table, and below it where its figures come from."""
    head = HEADS[{'large-step': 'step', 'prefill': 'decode'}.get(name, name.partition('-')[0])]
    newest = {line['command']: line for line in lines if line['table'] == name}
    if not newest:
        return 'Not measured yet.'
    cells = [row for line in newest.values() for row in rows_of(name, line)]
    facts = sorted({f'{line["machine"]}, {line["date"]}, commit {line["commit"] or "not recorded"}'
                    for line in newest.values()})
    commands = [f'python {line["command"]}' for line in newest.values()]
    return '\n'.join([head, '|' + '---|' * (head.count('|') - 1),
                      *(f'| {" | ".join(row)} |' for row in cells), '', '```sh',
                      *commands, '```', '', *(f'- {fact}' for fact in facts)])


def page(text: str, lines: list[dict]) -> str:
    """docs/benchmarks.md with its tables written anew."""
    return re.sub(r'(<!-- ([\w-]+) -->\n).*?(<!-- end -->)', lambda m: m[1] + (
        table(m[2], lines) if m[2] in MEASURED else m[0]) + '\n' + m[3], text, flags=re.S)


def read_lines() -> list[dict]:
    return [json.loads(line) for line in LINES.read_text(encoding='utf-8').splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', metavar='NAME', help=', '.join(MEASURED))
    parser.add_argument('--nanogpt', default='../nanoGPT', help='a checkout of it')
    parser.add_argument('--smollm2', default='smollm2.gguf', help='SmolLM2-135M-Instruct')
    given = parser.parse_args()
    places = {'NANOGPT': given.nanogpt, 'SMOLLM2': given.smollm2}
    for name in given.names:
        if name not in MEASURED:
            parser.error(f'{name}: must be some of {", ".join(MEASURED)}')
        for label, command in MEASURED[name]:
            found = {'table': name} | measure(label, command, places)
            with open(LINES, 'a', encoding='utf-8') as f:
                f.write(json.dumps(found) + '\n')
    PAGE.write_text(page(PAGE.read_text(encoding='utf-8'), read_lines()), encoding='utf-8')


if __name__ == '__main__':
    main()
