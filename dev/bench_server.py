"""Speed of serve.py: python dev/bench_server.py MODEL [--quantize=int8] [--vs=llama.cpp].

Starts the server, and llama.cpp's with the same weights (F32, for int8 Q8_0; pip install
xllamacpp), one process each, and sends 1, 8 and 16 streams at a time to each in turn: other prompts
each time, so that nothing is remembered. Prints tokens per second of all streams together, the
median of the rounds, the time to the first token, and the ratios.
"""
import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from core.formats import gguf  # noqa: E402
from core.run import models  # noqa: E402

ROOT = Path(__file__).parents[1]
PEER = '''
import sys, time, xllamacpp as x
p = x.CommonParams()
p.model.path, p.n_ctx, p.n_parallel = sys.argv[1], {ctx}, {slots}
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = {threads}
p.cont_batching = True
server = x.Server(p)
print(server.listening_address, flush=True)
time.sleep(1e6)
'''


class Started:
    """A server in a process of its own, and its address."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                        text=True, env=os.environ | {'PYTHONUNBUFFERED': '1'})
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if 'http://' in line:
                self.at = line[line.index('http://'):].split()[0].rstrip('/')
                return
        raise SystemExit(f'it did not start: {" ".join(lines)}')

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


async def stream(port: int, prompt: str, n: int) -> tuple[int, float]:
    """(tokens, seconds to the first) of an answer. Only its last chunk is parsed, so that the
    client takes little of the processor's time from the server."""
    began, first, tokens = time.perf_counter(), 0.0, 0
    body = json.dumps({'prompt': prompt, 'max_tokens': n, 'stream': True, 'temperature': 0,
                       'stream_options': {'include_usage': True}}).encode()
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    writer.write(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n'
                 b'Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s'
                 % (len(body), body))
    async for line in reader:
        if line.startswith(b'data: {'):
            first = first or time.perf_counter() - began
            if b'"completion_tokens"' in line:
                tokens = json.loads(line[6:])['usage']['completion_tokens']
    writer.close()
    return tokens, first


async def load(at: str, n_streams: int, n_tokens: int, salt: int) -> tuple[float, float]:
    """(tokens per second of all streams, median seconds to the first token)."""
    words = ('cold', 'warm', 'grey', 'windy', 'bright', 'long')
    prompts = [f'Chapter {salt}.{i}. On a {words[i % 6]} day in the year {1800 + salt + i} the old '
               'captain stood at the harbour, looked at the ships that came and went, and told the '
               'children what he had seen as a young man: first' for i in range(n_streams)]
    port, began = int(at.rpartition(':')[2]), time.perf_counter()
    found = await asyncio.gather(*(stream(port, p, n_tokens) for p in prompts))
    took = time.perf_counter() - began
    return sum(n for n, _ in found) / took, statistics.median(first for _, first in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model')
    parser.add_argument('--quantize', default='')
    parser.add_argument('--vs', default='')
    parser.add_argument('--streams', default='1,8,16')
    parser.add_argument('--tokens', type=int, default=64)
    parser.add_argument('--rounds', type=int, default=3)
    given = parser.parse_args()
    counts = [*map(int, given.streams.split(','))]
    ours = [sys.executable, str(ROOT / 'serve.py'), given.model, '--port=0',
            f'--slots={max(counts)}']
    with tempfile.TemporaryDirectory() as folder:
        servers = {'ours': Started(ours + [f'--quantize={given.quantize}'] * bool(given.quantize))}
        if given.vs == 'llama.cpp':
            model, tokenizer, _ = models.load_run(given.model)
            path = Path(folder) / 'model.gguf'
            gguf.save(model, tokenizer, path, 'q8_0' if given.quantize else 'f32', False, 'model')
            del model
            code = PEER.format(ctx=512 * max(counts), slots=max(counts), threads=os.cpu_count())
            servers['llama.cpp'] = Started([sys.executable, '-c', code, str(path)])
        try:
            speeds, firsts = {}, {}
            for r in range(-1, given.rounds):       # the first one is a warm-up
                for n in counts:
                    for name, server in servers.items():
                        speed, first = asyncio.run(load(server.at, n, given.tokens, 100 * r + n))
                        if r >= 0:
                            speeds.setdefault((name, n), []).append(speed)
                            firsts.setdefault((name, n), []).append(first)
        finally:
            for server in servers.values():
                server.end()
    result = {}
    for (name, n), found in speeds.items():
        median, one = statistics.median(found), statistics.median(speeds[name, counts[0]])
        first = statistics.median(firsts[name, n])
        result[f'{name} {n}'] = round(median, 1)
        print(f'{name:10} {n:3} streams {median:7.1f} tokens/s ({min(found):.1f} to '
              f'{max(found):.1f}), {median / one:.2f} times one; first token after {first:.2f} s')
    for n in counts:
        if 'llama.cpp' in servers:
            ratio = statistics.median(a / b for a, b in zip(speeds['ours', n],
                                                            speeds['llama.cpp', n]))
            result[f'ratio {n}'] = round(ratio, 3)
            print(f'{n} streams: ours {ratio:.2f} times llama.cpp')
    print(json.dumps(result))


if __name__ == '__main__':
    main()
