"""A busy machine: python dev/bench_busy.py [--rounds=5] [--sides=train,finetune,decode,prepare].

Each side is measured on the idle machine and beside one process that computes in plain Python, in
turn: steps per second of training and of tuning, tokens per second of decoding GPT-2's shape (eager
and compiled), datasets per minute of preparing Python's standard library. The last line is JSON.
"""
import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = 20        # steps at the beginning, which compile and warm up
SHORT = ['--eval_interval=100000', '--eval_tokens=2048', '--log_interval=1', '--sample_tokens=1']


def python(folder: Path, *words) -> str:
    """What a script of the project prints, run in a folder; its error ends this program."""
    done = subprocess.run([sys.executable, ROOT / words[0], *words[1:]], cwd=folder, text=True,
                          capture_output=True)
    if done.returncode:
        raise SystemExit(f'{words}: {done.stderr[-2000:]}')
    return done.stdout


def rate(run: Path) -> float:
    """Steps per second of a run, after those that are SKIPPED."""
    events = map(json.loads, (run / 'log.jsonl').read_text(encoding='utf-8').splitlines())
    steps = [event for event in events if event['event'] == 'step']
    first, last = steps[SKIPPED], steps[-1]
    return (last['step'] - first['step']) / (last['seconds'] - first['seconds'])


def train(folder: Path) -> dict[str, float]:
    python(folder, 'train.py', ROOT / 'config/shakespeare.py', '--max_steps=120', *SHORT,
           '--out_dir=out/train')
    return {'train': rate(folder / 'out/train')}


def finetune(folder: Path) -> dict[str, float]:
    if not (folder / 'base').exists():
        python(folder, 'train.py', ROOT / 'config/python.py', '--max_steps=1', *SHORT,
               '--out_dir=base')
    python(folder, 'finetune.py', ROOT / 'config/tune/sft_python.py', '--run_dir=base',
           '--max_steps=60', '--answers=0', '--eval_interval=100000', '--log_interval=1',
           '--max_records=2000', '--out_dir=out/tuned')
    return {'finetune': rate(folder / 'out/tuned')}


def decode(folder: Path) -> dict[str, float]:
    said = python(folder, 'bench.py', 'decode', '--vocab_size=50257', '--rounds=3')
    found, = json.loads(said.splitlines()[-1])['runs']
    return {f'decode{name}': found[f'ours_tokens_per_second{name}'] for name in ('', '_compiled')
            if f'ours_tokens_per_second{name}' in found}


def prepare(folder: Path) -> dict[str, float]:
    shutil.rmtree(folder / 'data', ignore_errors=True)
    began = time.perf_counter()
    python(folder, 'prepare.py', 'python')
    return {'prepare': 60 / (time.perf_counter() - began)}


SIDES = {'train': train, 'finetune': finetune, 'decode': decode, 'prepare': prepare}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--sides', default=','.join(SIDES))
    asked = parser.parse_args()
    result = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side in asked.sides.split(','):
            found = {}      # what is measured -> ('idle' or 'busy' -> rates)
            SIDES[side](folder)     # once before, so that all is downloaded, made and compiled
            for _ in range(asked.rounds):
                for state in ('idle', 'busy'):
                    shutil.rmtree(folder / 'out', ignore_errors=True)
                    other = state == 'busy' and subprocess.Popen(
                        [sys.executable, '-c', 'while True: pass'])
                    try:
                        for what, value in SIDES[side](folder).items():
                            found.setdefault(what, {}).setdefault(state, []).append(value)
                    finally:
                        if other:
                            other.kill()
            for what, of in found.items():
                idle, busy = (statistics.median(of[state]) for state in ('idle', 'busy'))
                result[what] = {'idle': idle, 'busy': busy, 'ratio': busy / idle,
                                'ranges': {state: [min(x), max(x)] for state, x in of.items()}}
                print(f'{what}: {idle:.2f} idle, {busy:.2f} busy, {busy / idle:.2f}', flush=True)
    print(json.dumps(result))


if __name__ == '__main__':
    main()
