"""Damaged, hostile and foreign files where a checkpoint is expected."""
import json
import random
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import TINY
from harness import PROCESSES, assert_same, bits, note
from safetensors.torch import load_file, save_file

import train
from core.net.weights import build_model
from core.read.download import file_hash
from core.run import checkpoint, models
from core.settings import Stop
from model import GPTConfig

SETTINGS = dict(max_steps=8, eval_interval=4, save_interval=2, dropout=0.1, optimizer='muon')


@pytest.fixture(scope='module')
def runs(tmp_path_factory, text_file):
    """out/whole, finished, and out/cut, ended by a signal after step 6: steps 4 and 6 are there."""
    folder = tmp_path_factory.mktemp('damage')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in {**TINY, **SETTINGS, 'dataset': str(text_file)}.items():
            patch.setattr(train, name, value)
        for run, n in (('whole', 8), ('cut', 6)):
            real = train.train_step

            def step(*args, real=real, n=n, **options):
                result = real(*args, **options)
                return result._replace(asked=args[2] == n - 1 and n < 8)
            patch.setattr(train, 'train_step', step)
            patch.setattr(train, 'out_dir', f'out/{run}')
            train.main()
            patch.setattr(train, 'train_step', real)
    assert checkpoint.steps(folder / 'out/cut') == [4, 6]
    return folder


@pytest.fixture
def run(runs, tmp_path):
    """A copy of both runs, and the run in the middle."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    return tmp_path / 'out/cut'


def assert_found(run, path, capsys) -> None:
    """The newest checkpoint is passed over, with a warning that names it and the file."""
    capsys.readouterr()
    assert checkpoint.newest(run) == 4
    err = capsys.readouterr().err
    assert err.startswith('warning: ') and 'step-00000006 is damaged' in err and path.name in err


def test_every_damage_is_found(run, capsys):
    rng = random.Random(0)
    files = sorted((run / 'step-00000006').iterdir())
    assert {path.name for path in files} == {'model.safetensors', 'optimizer.safetensors',
                                             'state.json', 'tokenizer.json', 'manifest.json'}
    originals = {path: path.read_bytes() for path in files}
    counts = {'truncated': 0, 'one bit flipped': 0, 'deleted': 0, 'emptied': 0}

    def try_out(kind, path, damaged):
        if damaged is None:
            path.unlink()
        else:
            path.write_bytes(damaged)
        assert_found(run, path, capsys)
        path.write_bytes(originals[path])
        counts[kind] += 1

    for i in range(100):
        path = files[i % len(files)]
        try_out('truncated', path, originals[path][:rng.randrange(len(originals[path]))])
    for i in range(200):
        path = files[i % len(files)]
        damaged = bytearray(originals[path])
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        try_out('one bit flipped', path, bytes(damaged))
    for path in files:
        try_out('deleted', path, None)
        try_out('emptied', path, b'')
    assert checkpoint.newest(run) == 6
    for kind, n in counts.items():
        note(f'a file of the newest checkpoint {kind}', n, 'all found, the one before it used')


def test_every_bit_of_the_manifest_counts(run, capsys):
    path = run / 'step-00000006/manifest.json'
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert checkpoint.damage(path.parent), bit
    note('each bit of manifest.json flipped', 8 * len(whole), 'all found')


def test_the_run_goes_on_from_the_one_before(run, run_train, capsys):
    """... to the same end, and the damaged one is replaced."""
    path = run / 'step-00000006/optimizer.safetensors'
    path.write_bytes(path.read_bytes()[:1000])
    out = run_train(out_dir=str(run), **SETTINGS)
    captured = capsys.readouterr()
    assert 'step-00000006 is damaged (optimizer.safetensors has 1,000 bytes' in captured.err
    assert f'resuming {run} after step 4' in captured.out
    assert out['run_dir'] == str(run)
    assert_same(run.with_name('whole'), run)


@pytest.mark.parametrize('init_from', ['scratch', 'resume'])
def test_all_damaged_is_refused(run, run_train, capsys, init_from):
    for step in (4, 6):
        (checkpoint.step_folder(run, step) / 'state.json').unlink()
    before = {path: path.stat().st_mtime_ns for path in run.rglob('*')}
    capsys.readouterr()
    with pytest.raises(Stop) as e:
        run_train(out_dir=str(run), init_from=init_from, **SETTINGS)
    assert f'{run}: every checkpoint asked for is damaged; nothing was changed' in e.value.message
    err = capsys.readouterr().err
    assert 'step-00000006 is damaged' in err and 'step-00000004 is damaged' in err
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob('*')}


def test_later_stages_pass_over_a_damaged_best_one(run, capsys):
    """And do not hash the optimizer's state, which they do not read."""
    whole = run.with_name('whole')
    best = checkpoint.read_state(whole, 8)['best_step']
    path = checkpoint.step_folder(whole, best) / 'optimizer.safetensors'
    path.write_bytes(bytes(path.stat().st_size))
    assert models.load_run(str(whole))[2]['step'] == best
    path = path.with_name('model.safetensors')
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(Stop) as e:
        models.load_run(str(whole), step=best)
    assert 'damaged' in e.value.message
    others = [step for step in checkpoint.steps(whole) if step != best]
    assert models.load_run(str(whole))[2]['step'] == others[-1]
    assert 'model.safetensors is not what was written' in capsys.readouterr().err


def test_tensors_in_several_files(run):
    """As several writers would leave them."""
    folder = run / 'step-00000006'
    whole = bits_of(models.load_run(str(run), step=6)[0])
    tensors = load_file(folder / 'model.safetensors')
    names = sorted(tensors)
    for i in range(3):
        save_file({name: tensors[name] for name in names[i::3]},
                  folder / f'model-{i + 1:05d}-of-00003.safetensors')
    (folder / 'model.safetensors').unlink()
    seal(folder)
    assert bits_of(models.load_run(str(run), step=6)[0]) == whole
    (folder / 'model-00002-of-00003.safetensors').unlink()
    seal(folder)
    with pytest.raises(Stop) as e:
        models.load_run(str(run), step=6)
    assert 'is missing in model' in e.value.message


def bits_of(model) -> dict[str, bytes]:
    return {name: bits(p.detach()) for name, p in model.named_parameters()}


# ---------------------------------------------------------------------------------------------
# Files of others, with a manifest that fits them


def seal(folder: Path) -> None:
    """Write the manifest that belongs to the files as they are."""
    files = {path.name: {'size': path.stat().st_size, 'sha256': file_hash(path)}
             for path in sorted(folder.iterdir()) if path.name != checkpoint.MANIFEST}
    (folder / checkpoint.MANIFEST).write_text(checkpoint.manifest(files))


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __reduce__(self):
        import os
        return os.mkdir, ('executed',)


def test_pickles_are_refused_by_name(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pickle = tmp_path / 'ckpt.pt'
    torch.save({'model': Payload()}, pickle)
    (tmp_path / 'foreign').mkdir()
    shutil.copy(pickle, tmp_path / 'foreign')
    for path, part in ((pickle, 'ckpt.pt'), (tmp_path / 'foreign', 'ckpt.pt')):
        with pytest.raises(Stop) as e:
            models.load_run(str(path))
        assert part in e.value.message and 'pickle' in e.value.message
    folder = run / 'step-00000006'
    for name in ('model.safetensors', 'state.json', 'tokenizer.json'):
        shutil.copytree(run, tmp_path / 'hostile')
        shutil.copy(pickle, tmp_path / 'hostile' / folder.name / name)
        seal(tmp_path / 'hostile' / folder.name)
        with pytest.raises(Stop) as e:
            models.load_run(str(tmp_path / 'hostile'), step=6)
        assert name in e.value.message
        shutil.rmtree(tmp_path / 'hostile')
    assert not (tmp_path / 'executed').exists()
    note('a pickle with a payload in place of a run, model, state or tokenizer', 5,
         'refused by name, nothing executed')


def mutate_header(data: bytes, rng) -> bytes:
    """A safetensors file with another header: its length, its JSON or its numbers changed."""
    n = struct.unpack('<Q', data[:8])[0]
    header, body = data[8:8 + n], data[8 + n:]
    kind = rng.randrange(6)
    if kind == 0:       # another length
        n = rng.choice([0, 1, n - 1, n + 1, n + len(body), 2 ** 31, 2 ** 63, 2 ** 64 - 1,
                        rng.getrandbits(64)])
        return struct.pack('<Q', n) + header + body
    if kind == 1:       # some bytes
        header = bytearray(header)
        for _ in range(rng.randrange(1, 8)):
            header[rng.randrange(len(header))] = rng.randrange(256)
        return data[:8] + bytes(header) + body
    tensors = json.loads(header)
    name = rng.choice([name for name in tensors if name != '__metadata__'])
    number = rng.choice([-1, 0, 1, 2 ** 31, 2 ** 40, 2 ** 63, 2 ** 64, 1e300, None, 'x', [], {}])
    if kind == 2:
        tensors[name][rng.choice(['shape', 'data_offsets'])] = rng.choice(
            [number, [number], [number, number], [0] * 1000, [2 ** 32] * 4])
    elif kind == 3:
        tensors[name]['dtype'] = rng.choice(['F64', 'BF16', 'I8', 'F8_E4M3', 'O', '', 1, None])
    elif kind == 4:
        tensors[rng.choice(['', '../x', 'a' * 100_000, '__class__', '\0'])] = tensors.pop(name)
    else:
        header = b'[' * rng.randrange(1, 100_000)
        return struct.pack('<Q', len(header)) + header + body
    header = json.dumps(tensors).encode()
    return struct.pack('<Q', len(header)) + header + body


def load_mutants(folder: str, n: int, output: str) -> None:
    """In a process of its own, with little memory: load n mutants; what each came to."""
    rng, run = random.Random(1), Path(folder)
    path = run / 'step-00000006/model.safetensors'
    original = path.read_bytes()
    config = GPTConfig(**checkpoint.read_state(run, 6)['config'])
    model = build_model(config)
    used = 1024 * int(next(line for line in open('/proc/self/status')
                           if line.startswith('VmSize')).split()[1])
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), resource.RLIM_INFINITY))
    found = {'refused': 0, 'loaded': 0}
    for i in range(n):
        if i % 100 == 0:    # the original always loads, or the refusals would mean nothing
            path.write_bytes(original)
            models.load_weights(model, run, 6)
        path.write_bytes(mutate_header(original, rng))
        try:
            models.load_weights(model, run, 6)
            found['loaded'] += 1
        except Stop as e:
            assert str(path) in e.message or path.parent.name in e.message, e.message
            assert '\n' not in e.message, e.message
            found['refused'] += 1
    Path(output).write_text(json.dumps(found))


@pytest.mark.parametrize('n', [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_hostile_safetensors(run, tmp_path, n):
    output = tmp_path / 'found.json'
    process = PROCESSES.Process(target=load_mutants, args=(str(run), n, str(output)))
    process.start()
    process.join(100 + n / 10)
    assert process.exitcode == 0
    found = json.loads(output.read_text())
    assert found['refused'] > 0.9 * n
    note('a mutated safetensors header, 256 MiB of memory', n,
         f'{found["refused"]:,} refused by name, {found["loaded"]} harmless, no crash')


@pytest.mark.parametrize('name', ['state.json', 'tokenizer.json'])
def test_hostile_json(run, name):
    """Changed in one place, with a manifest that fits: loaded, or refused by name."""
    rng, path = random.Random(2), run / 'step-00000006' / name
    original, refused = path.read_bytes(), 0
    for _ in range(300):
        damaged = bytearray(original)
        damaged[rng.randrange(len(damaged))] = rng.choice(b'"{}[],:x-\xff\x00\n')
        path.write_bytes(damaged)
        seal(path.parent)
        try:
            models.load_run(str(run), step=6)
        except Stop as e:
            assert 'step-00000006' in e.message or str(run) in e.message, e.message
            refused += 1
    assert refused > 30
    note(f'a byte of {name} changed, with a manifest that fits', 300,
         f'{refused} refused by name, the others harmless')
