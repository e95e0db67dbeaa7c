"""dev/: races, peers in processes of their own, the tokenizer's benchmark."""
import json
import re

import pytest
import torch
from test_bench import peer, refused

from core import device as hardware
from core.settings import Stop
from dev import bench_tokenizer, peers, planted_faults, race, report


def deterministic():
    """A function (ends) -> whether its process is asked for deterministic algorithms."""
    def run(ends):
        if ends:
            raise MemoryError('a peer needs more memory')
        return torch.are_deterministic_algorithms_enabled()
    return run


def test_a_peer_has_a_process_of_its_own(capsys, monkeypatch):
    """Nothing that is set for ours is set there, and it ends with the object."""
    monkeypatch.setattr(hardware, 'choose_compile', lambda *_: (True, ''))
    hardware.choose('cpu', 'float32')
    assert torch.are_deterministic_algorithms_enabled()
    peer = peers.Apart(deterministic)
    process = peer.process
    assert peer(False) is False and peer(False) is False and process.is_alive()
    del peer
    assert not process.is_alive()
    peer = peers.Apart(deterministic)
    for ends in (True, False):      # the second one finds nobody there
        with pytest.raises(Stop):
            peer(ends)
        assert 'the process of a peer ended with status 1' in capsys.readouterr().err


def test_race(run_bench, capsys, monkeypatch, tmp_path, text_file):
    """Ours stops at the first look at which it is as good as the peer's end."""
    monkeypatch.setattr(peers, 'NANO_RECIPES', {'cpu': peers.NanoRecipe(
        1, 1, 8, 16, 4, max_iters=6, warmup_iters=2, learning_rate=1e-9)})
    monkeypatch.chdir(tmp_path)
    run_bench.preset |= dict(dataset=str(text_file), tokenizer='char', max_steps=40,
                             learning_rate=1e-2, warmup_steps=0, vocab_size=0)
    found = run_bench(race, vs=peer(tmp_path / 'peer', 1), seeds=2, eval_every=5,
                      peer_learning_rates='1e-8', tuned_steps=30)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    for kind in ('stock', 'tuned'):
        ours, theirs = found[kind]['ours'], found[kind]['nanogpt']
        assert found[kind]['reached'] == 2 and ours['loss'] <= theirs['loss']
        step = ours_tokens(run_bench.preset)
        assert theirs['tokens'] == 6 * 4 * 16 and ours['tokens'] % (5 * step) == 0
        assert 0 < ours['first_step_seconds'] < ours['seconds']
    assert 'needs a peer' in refused(capsys, run_bench, script=race, vs='')
    assert 'peer_learning_rates=2e-3,fast: must be numbers' in refused(
        capsys, run_bench, script=race, vs=str(tmp_path / 'peer'), peer_learning_rates='2e-3,fast')


def ours_tokens(preset: dict) -> int:
    return preset['batch_size'] * preset['block_size']


def test_clock_stops_at_the_target():
    losses = iter([3.0, 2.0, 1.9, 1.0])
    steps, cpu = [], hardware.choose('cpu', 'float32', False)
    found = race.clocked(steps.append, lambda: next(losses), 8, 2, cpu, target=1.95)
    assert steps == [*range(6)] and found['steps'] == 6 and found['loss'] == 1.9
    assert [(n, loss) for n, _, loss in found['curve']] == [(2, 3.0), (4, 2.0), (6, 1.9)]
    missed = race.clocked(steps.append, lambda: 5.0, 5, 2, cpu, target=1.0)
    assert missed['steps'] == 5 and [n for n, *_ in missed['curve']] == [2, 4, 5]


def test_nanogpt_schedule():
    """get_lr of its train.py by hand: 1e-3 x 51/101 in the warm-up, the middle, the end."""
    recipe = peers.NANO_RECIPES['cpu']
    assert recipe.factor(50) == pytest.approx(51 / 101)
    assert recipe.factor(100) == pytest.approx(1.0)
    assert recipe.factor(1050) == pytest.approx(0.55) and recipe.factor(2000) == pytest.approx(0.1)


@pytest.mark.slow
def test_tokenizer(monkeypatch, capsys):
    """Both trainers on a megabyte, each in its process; encoding beside tiktoken."""
    pytest.importorskip('tokenizers')
    for name, value in dict(corpus_mb=1, n_tokens=400, rounds=1).items():
        monkeypatch.setattr(bench_tokenizer, name, value)
    result = bench_tokenizer.main()
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == result and len(result['sha256']) == 64
    ours, theirs = (result['training'][side] for side in ('ours', 'tokenizers'))
    assert 1e6 <= result['bytes'] < 1.3e6
    assert ours['bytes_per_token'] == pytest.approx(theirs['bytes_per_token'], rel=2e-3)
    assert ours['seconds'] > 0 and ours['peak_mb'] >= 0 and theirs['peak_mb'] >= 0
    assert result['ours_encoding_mb_per_second'] > 0.5 * result['tiktoken_encoding_mb_per_second']


def test_no_minbpe(monkeypatch, capsys, tmp_path):
    for name, value in dict(corpus_mb=1, n_tokens=300, rounds=1,
                            vs=str(tmp_path)).items():
        monkeypatch.setattr(bench_tokenizer, name, value)
    with pytest.raises(Stop):
        bench_tokenizer.main()
    assert 'no minbpe/' in capsys.readouterr().err


def test_faults_can_be_planted():
    """The text that a fault replaces stands once in its file."""
    faults = planted_faults.FAULTS
    assert len({*faults}) == len(faults) == int(re.search(r'\d+', planted_faults.__doc__)[0])
    for name, old, new in faults:
        assert (planted_faults.ROOT / name).read_text(encoding='utf-8').count(old) == 1, old
        assert old != new


def test_the_page_has_what_was_measured(tmp_path, monkeypatch):
    """docs/benchmarks.md says what docs/measured.jsonl holds; a new line of a command counts."""
    text, lines = report.PAGE.read_text(encoding='utf-8'), report.read_lines()
    assert report.page(text, lines) == text
    names = re.findall(r'<!-- ([\w-]+) -->', text)
    assert {name for name in names if name != 'end'} == {*report.MEASURED}
    known = {(name, *row) for name, rows in report.MEASURED.items() for row in rows}
    assert all((line['table'], line['label'], line['command']) in known for line in lines)
    newer = json.loads(json.dumps(lines[0]))
    newer['result']['loss'] = 0.1234
    assert '0.1234' in report.page(text, [*lines, newer])
