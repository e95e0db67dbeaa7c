"""sample.py: prompts, streaming, stop strings, reproducibility, messages."""
import io
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

import dpo
import export
import finetune
import sample
import train
from core.net.engine import StopStrings
from core.run import models
from core.settings import Stop

ROOT = Path(sample.__file__).parent


@pytest.fixture(scope='module')
def trained(tmp_path_factory, text_file):
    """A folder with a run out/tiny in it, trained a little."""
    folder = tmp_path_factory.mktemp('trained')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in {**TINY, 'dataset': str(text_file), 'max_steps': 100,
                            'eval_interval': 100, 'optimizer': 'muon', 'CONFIG': 'tiny'}.items():
            patch.setattr(train, name, value)
        train.main()
    return folder


@pytest.fixture
def run_sample(trained, monkeypatch, tmp_path):
    """run_sample(**settings) on the trained run; standard input is not a terminal."""
    run_dir = 'out/tiny'
    shutil.copytree(trained / 'out', tmp_path / 'out')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.stdin', io.StringIO(''))

    def run(**settings):
        with monkeypatch.context() as patch:
            settings = {'run_dir': run_dir, 'device': 'cpu', 'max_new_tokens': 60, **settings}
            for name, value in settings.items():
                patch.setattr(sample, name, value)
            return sample.main()['texts']

    return run


def test_flag_file_and_standard_input_are_the_same(run_sample, monkeypatch, tmp_path, capsys):
    a, = run_sample(prompt='def ')
    out = capsys.readouterr()
    assert out.out == 'def ' + a + '\n' and 'tokens/s' in out.err
    (tmp_path / 'prompt.txt').write_text('def ')
    b, = run_sample(prompt_file='prompt.txt')
    monkeypatch.setattr('sys.stdin', io.StringIO('def '))
    c, = run_sample(prompt_file='-')
    monkeypatch.setattr('sys.stdin', io.StringIO('def '))
    d, = run_sample()
    assert a == b == c == d and len(a) == 60


def test_samples_have_seeds_of_their_own(run_sample):
    texts = run_sample(prompt='x', num_samples=3)
    assert len(set(texts)) == 3
    assert run_sample(prompt='x', num_samples=2, seed=1338) == texts[1:]


def test_empty_prompt_and_greedy(run_sample):
    assert run_sample(temperature=0.0, seed=1) == run_sample(temperature=0.0, seed=2)


def test_stop_strings(run_sample):
    whole, = run_sample(prompt='def ')
    cut = whole[10:13]
    text, = run_sample(prompt='def ', stop_strings=f'never there,{cut}')
    assert text == whole[:whole.index(cut)]


def test_colour(run_sample, capsys):
    """The same text, each character on the colour of its probability under the model."""
    plain, = run_sample(prompt='def ', seed=3, max_new_tokens=25)
    capsys.readouterr()
    assert run_sample(prompt='def ', seed=3, max_new_tokens=25, colour=True) == [plain]
    out = capsys.readouterr().out.removeprefix('def ').removesuffix('\n')
    model, tokenizer, _ = models.load_run('out/tiny')
    ids = tokenizer.encode('def ' + plain)
    with torch.no_grad():
        logs = model(torch.tensor([ids[:-1]]))[:, :, :len(tokenizer)].log_softmax(dim=-1)
    own = logs[0].gather(1, torch.tensor(ids[1:])[:, None])[3:, 0].tolist()
    assert out == ''.join(sample.shade(c, p) for c, p in zip(plain, own, strict=True))
    assert '48;5;230m' in out and '48;5;209m' in out
    assert sample.shade('a\nb', math.log(0.3)) == \
        '\x1b[38;5;16;48;5;230ma\x1b[0m\n\x1b[38;5;16;48;5;230mb\x1b[0m'


@pytest.mark.parametrize('pieces, expected, found', [
    (['ab', 'cSTO', 'P', 'de'], 'abc', True),
    (['abS', 'T', 'x', 'y'], 'abSTxy', False),
    (['SSTOP'], 'S', True),
    (['ST'], 'ST', False),
    (['xEND', 'STOP'], 'x', True),
])
def test_stop_strings_across_pieces(pieces, expected, found):
    stops = StopStrings(['STOP', 'END'])
    out = ''
    for piece in pieces:
        out += stops.feed(piece)
        if stops.found:
            break
    assert out + stops.rest() == expected and stops.found == found


def test_long_prompt_warns(run_sample, capsys):
    run_sample(prompt='x = 1\n' * 20)
    warning = 'warning: the prompt has 120 tokens, the model sees the last 32'
    assert warning in capsys.readouterr().err


def test_weights_that_are_no_numbers(run_sample, monkeypatch, capsys):
    real = models.load_run

    def load(*args, **options):
        model, *more = real(*args, **options)
        model.lm_head.weight.data.fill_(math.nan)
        return model, *more
    monkeypatch.setattr(models, 'load_run', load)
    with pytest.raises(Stop) as e:
        run_sample(prompt='a')
    assert 'the logits are not finite' in e.value.message


def test_interactive(run_sample, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr('sys.stdin', Terminal('class \né\ndef \n'))
    assert run_sample() == []
    out = capsys.readouterr()
    assert 'class ' in out.out and 'tokens/s' in out.err
    assert "character 'é'" in out.err and 'def ' in out.out  # it is said, and the session goes on


def test_prompt_that_is_no_utf8(trained):
    done = subprocess.run([sys.executable, ROOT / 'sample.py', 'out/tiny'], cwd=trained,
                          input=b'\xff', capture_output=True, timeout=120)
    assert done.returncode == 2
    message, = done.stderr.decode().strip().splitlines()
    assert message.startswith('error: the text given is not valid UTF-8 (')


@pytest.mark.parametrize('flag, value', [('chat', True), ('system', 'Be brief.')])
def test_a_base_model_does_not_chat(run_sample, monkeypatch, capsys, flag, value):
    monkeypatch.setattr(sample, 'FLAGS', (flag,))
    with pytest.raises(Stop):
        run_sample(**{flag: value}, prompt='def ')
    assert f'{flag}={value}: does nothing here: out/tiny continues' in capsys.readouterr().err
    assert run_sample(**{flag: value, 'chat': False}, prompt='def ') if flag == 'chat' else True


@pytest.mark.parametrize('stage', [sample, export, finetune, dpo], ids=lambda x: x.__name__)
def test_no_model_given(run_sample, monkeypatch, capsys, stage):
    monkeypatch.setattr(stage, 'run_dir', '')
    Path('out/my run').mkdir()
    Path('out/my run/log.jsonl').touch()
    with pytest.raises(Stop):
        stage.main()
    message = capsys.readouterr().err
    assert f"python {stage.__name__}.py 'out/my run'" in message
    assert "there are 'out/my run', out/tiny" in message


@pytest.mark.parametrize('settings', [dict(prompt='x\udce9'), dict(system='x\udce9'),
                                      dict(classify='x\udce9')])
def test_a_flag_that_is_no_utf8(run_sample, capsys, settings):
    with pytest.raises(Stop):
        run_sample(**settings)
    (name, _), = settings.items()
    assert capsys.readouterr().err == f'error: {name}=x\\udce9: is not valid UTF-8\n'


@pytest.mark.parametrize('settings, parts', [
    (dict(prompt='é'), ["'é'", 'U+00E9', 'offset 0']),
    (dict(run_dir='out/none'), ['out/none', 'out/tiny']),
    (dict(step=7), ['step=7', '100']),
    (dict(temperature=-1.0), ['temperature=-1.0', 'at least 0']),
    (dict(top_p=0.0), ['top_p=0.0']),
    (dict(prompt='a', prompt_file='b'), ['prompt_file']),
    (dict(prompt_file='none.txt'), ['none.txt', 'No such file']),
])
def test_bad_input(run_sample, capsys, settings, parts):
    with pytest.raises(Stop):
        run_sample(**settings)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    for part in ['error: ', *parts]:
        assert part in message


def test_text_streams_to_a_pipe(run_sample, tmp_path):
    """In a process of its own: text on standard output only, the rest on standard error."""
    done = subprocess.run([sys.executable, ROOT / 'sample.py', 'out/tiny', '--max_new_tokens=5'],
                          cwd=tmp_path, input='def ', capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith('def ')
    assert len(done.stdout) == len('def ') + 5 + 1
    assert 'tokens/s' in done.stderr
