"""export.py: a run becomes a Hugging Face folder, or nothing at all."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import stopped_at_last as stopped

import classify
import dpo
import export
import finetune
import sample
from core.formats import hf
from core.run import models
from core.run.log import read_log

os.environ['HF_HUB_OFFLINE'] = '1'
ROOT = Path(export.__file__).parent
transformers = pytest.importorskip('transformers')


@pytest.fixture
def run_export(monkeypatch):
    """run_export(**settings): export.main() with these settings."""
    def run(**settings):
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setattr(export, name, value)
            return export.main()
    return run


def left_behind() -> list[str]:
    return sorted(path.name for path in Path('out').iterdir() if path.suffix != '.lock')


@pytest.mark.parametrize('tokenizer', ['char', 'byte', 'bpe'])
def test_a_run_in_transformers(run_train, run_export, capsys, tokenizer):
    size = 500 if tokenizer == 'bpe' else 0
    run_dir = run_train(tokenizer=tokenizer, vocab_size=size, max_steps=3)['run_dir']
    found = run_export(run_dir=run_dir)
    assert found['folder'] == f'{run_dir}-hf' and left_behind() == ['tiny', 'tiny-hf']
    assert found['differences']['read back'] == 0 and found['differences']['in transformers'] < 1e-4
    assert 'as qwen3, f32' in capsys.readouterr().out
    model, tok, _ = models.load_run(run_dir)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(found['folder'])
    again = transformers.AutoTokenizer.from_pretrained(found['folder'])
    text = 'import sys\n  # argparse'
    assert again(text).input_ids == tok.encode(text)
    ids = torch.tensor([tok.encode(text)])
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4


def test_half_precision_in_shards(run_train, run_export):
    run_dir = run_train(max_steps=2)['run_dir']
    found = run_export(run_dir=run_dir, dtype='bfloat16', shard_gb=1e-5, export_dir='there/x')
    folder = Path(found['folder'])
    assert folder == Path('there/x') and len(list(folder.glob('*.safetensors'))) > 2
    assert json.loads((folder / 'config.json').read_text())['dtype'] == 'bfloat16'


def test_the_folder_is_a_model_again(run_train, run_export, monkeypatch, capsys):
    """sample.py writes the same from the run and from its export, and export.py takes it too."""
    run_dir = run_train(max_steps=4)['run_dir']
    folder = run_export(run_dir=run_dir)['folder']
    texts = []
    for place in (run_dir, folder):
        with monkeypatch.context() as patch:
            for name, value in dict(run_dir=place, prompt='import ', max_new_tokens=40).items():
                patch.setattr(sample, name, value)
            texts.append(sample.main()['texts'])
    assert texts[0] == texts[1] and texts[0][0]
    again = run_export(run_dir=folder, export_dir='out/again')['folder']
    for file in ('config.json', 'tokenizer.json', 'tokenizer_config.json', hf.WEIGHTS):
        assert (Path(again) / file).read_bytes() == (Path(folder) / file).read_bytes()


@pytest.fixture
def tuned(run_stage, chats):
    """A chat model."""
    return run_stage(finetune, dataset=str(chats), max_steps=2, answers=0)['run_dir']


@pytest.mark.parametrize('way', ['ours', 'jinja', 'theirs', 'base'])
def test_a_chat_model_comes_back(tuned, base, run_export, monkeypatch, capsys, way):
    """In every stage, with someone else's template, too; and a base model stays one."""
    folder = Path(run_export(run_dir=base if way == 'base' else tuned)['folder'])
    path = folder / 'tokenizer_config.json'
    found = json.loads(path.read_text())
    assert ('chat_template' in found) == (way != 'base')
    if way == 'jinja':      # as transformers 5 writes it
        (folder / 'chat_template.jinja').write_text(found.pop('chat_template'))
    elif way == 'theirs':
        found['chat_template'] = found['chat_template'].replace('<|end|>', '<|im_end|>')
    path.write_text(json.dumps(found))
    capsys.readouterr()
    model, tokenizer, state = models.load_run(str(folder))
    assert (state['task'] == 'chat') == (way != 'base')
    assert bool(tokenizer.template) == (way == 'theirs') and not capsys.readouterr().err
    seen = []
    monkeypatch.setattr(sample, 'steps_of', lambda model, prompts, wanted, **options: (
        seen.append((prompts[0], wanted[0].stop_tokens)) or iter([[(None, [1], 'n')],
                                                                  [(None, [2], '')]])))
    monkeypatch.setattr(sample, 'run_dir', str(folder))
    monkeypatch.setattr(sample, 'prompt', 'x')
    texts = sample.main()['texts']
    if state['task'] == 'chat':
        assert texts == ['n'] and tokenizer.special['<|end|>'] in seen[0][1]
        assert seen[0][0] == tokenizer.encode_chat([{'role': 'user', 'content': 'x'}], reply=True)
    else:
        assert seen[0][0] == tokenizer.encode('x') and seen[0][1] == {tokenizer.eos}


def test_a_classifier(run_stage, run_export, texts, monkeypatch, capsys):
    """It becomes a sequence classification model: transformers and we say the same of each text."""
    run = run_stage(classify, dataset=str(texts), max_steps=20, learning_rate=1e-2)['run_dir']
    found = run_export(run_dir=run)
    folder = found['folder']
    assert found['differences']['in transformers'] < 1e-4
    Path('two.txt').write_text('rise number 500\nfall number 501 and more\n')
    said = []
    for place in (run, folder):
        with monkeypatch.context() as patch:
            for name, value in dict(run_dir=place, classify_file='two.txt', device='cpu').items():
                patch.setattr(sample, name, value)
            said.append(sample.main()['classes'])
    theirs = transformers.pipeline('text-classification', folder)(
        ['rise number 500', 'fall number 501 and more'])
    for ours, again, other in zip(*said, theirs, strict=True):
        assert ours == again and ours['label'] == other['label']
        assert ours['probability'] == pytest.approx(other['score'], abs=1e-5)
    again = run_export(run_dir=folder, export_dir='out/again')['folder']
    assert (Path(again) / hf.WEIGHTS).read_bytes() == (Path(folder) / hf.WEIGHTS).read_bytes()
    assert 'is a classifier' in stopped(capsys, lambda: run_export(run_dir=run, to='gguf'))
    assert 'is a classifier' in stopped(capsys, lambda: models.load_run(folder))
    path = Path(folder) / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'id2label': {'0': 'up'}}))
    assert 'id2label' in stopped(capsys, lambda: models.load_run(folder, classifier=True))


def test_model_card(tuned, base, run_export, monkeypatch):
    """What the records of all stages say; of what is not recorded it says so."""
    page = (Path(run_export(run_dir=tuned)['folder']) / 'README.md').read_text()
    assert page.startswith('---\nlibrary_name: transformers\n')
    end = read_log(base, 'eval')[-1]
    identity = read_log(base, 'start')[0]['identity']
    for said in ('It answers messages', f'## Training: {tuned}', f'- goes on from {base}',
                 f'## Training: {base}', f'{identity["data"]["sha256"]}', 'your own text',
                 f'| {end["step"]} | {end["tokens"]:,} | {end["val_loss"]:.5g} |',
                 '2 steps', '`interval` is half', '![losses](loss.png)', 'nothing'):
        assert said in page, said
    assert 'not recorded here' not in page and 'None' not in page
    shutil.rmtree('data')
    Path(base).rename('elsewhere')
    page = (Path(run_export(run_dir=tuned, export_dir='again')['folder']) / 'README.md').read_text()
    assert 'How the model that this began with was trained is not recorded here' in page
    page = (Path(run_export(run_dir='elsewhere')['folder']) / 'README.md').read_text()
    assert 'licence, size and what was removed: not known here' in page


@pytest.mark.parametrize('mask', [0o022, 0o027])
def test_files_have_the_mode_that_the_umask_gives(run_stage, run_export, chats, preferences, mask):
    before = os.umask(mask)
    try:
        tuned = run_stage(finetune, dataset=str(chats), max_steps=2, answers=0, lora_rank=2,
                          save_adapters=True, out_dir='out/tuned')['run_dir']
        run_stage(dpo, run_dir=tuned, dataset=str(preferences), max_steps=2, out_dir='out/dpo')
        run_export(run_dir=tuned)
    finally:
        os.umask(before)
    files = [path for path in Path('out').rglob('*') if path.is_file() and path.suffix != '.py'
             and not str(path).startswith('out/base')]      # made before
    assert len({path.name for path in files if path.suffix == '.safetensors'}) == 5
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}


def test_what_is_refused(run_train, run_export, capsys):
    run_dir = run_train(max_steps=2)['run_dir']
    assert stopped(capsys, run_export).startswith('no model given')
    assert 'out/tiny' in stopped(capsys, lambda: run_export(run_dir='out/none'))
    assert stopped(capsys, lambda: run_export(run_dir=run_dir, to='onnx')).startswith('to=onnx')
    assert stopped(capsys, lambda: run_export(run_dir=run_dir, dtype='int8')).startswith('dtype=')
    assert 'step=7' in stopped(capsys, lambda: run_export(run_dir=run_dir, step=7))
    (Path(run_dir).parent / 'tiny-hf').mkdir()
    assert 'is there already' in stopped(capsys, lambda: run_export(run_dir=run_dir))
    assert 'is there already' in stopped(capsys, lambda: run_export(run_dir=run_dir,
                                                                    export_dir=run_dir))
    (Path(run_dir) / 'file').write_text('')
    message = stopped(capsys, lambda: run_export(run_dir=run_dir, export_dir=f'{run_dir}/file/x'))
    assert 'nothing was exported' in message
    assert left_behind() == ['tiny', 'tiny-hf'] and not list(Path('out/tiny-hf').iterdir())


@pytest.mark.parametrize('to', ['hf', 'gguf'])
def test_two_at_once(run_train, run_export, capsys, monkeypatch, to):
    """The second is refused before it touches what the first is writing."""
    run_dir, real = run_train(max_steps=2)['run_dir'], export.some_ids

    def some_ids(*args):
        monkeypatch.setattr(export, 'some_ids', real)
        message = stopped(capsys, lambda: export.main())
        assert 'is being exported by another process; wait for it' in message
        return real(*args)
    monkeypatch.setattr(export, 'some_ids', some_ids)
    assert Path(run_export(run_dir=run_dir, to=to)['folder']).exists()
    assert export.some_ids is real and len(left_behind()) == 2


def test_an_lstm_is_refused(run_train, run_export, capsys):
    run_dir = run_train(arch='lstm', qk_norm=False, max_steps=2)['run_dir']
    assert stopped(capsys, lambda: run_export(run_dir=run_dir)).startswith('arch=lstm: no ')
    assert left_behind() == ['tiny']


@pytest.mark.parametrize('broken', ['weights', 'logits', 'tokenizer'])
def test_an_export_that_is_wrong_gets_no_name(run_train, run_export, capsys, monkeypatch, broken):
    run_dir = run_train(max_steps=2)['run_dir']
    if broken == 'weights':
        right = hf.to_hf
        monkeypatch.setattr(hf, 'to_hf', lambda model: {
            key: p.flip(0) if 'q_proj' in key else p for key, p in right(model).items()})
    elif broken == 'logits':    # the same tensors, another meaning
        monkeypatch.setattr(hf, 'config_json', lambda *args, right=hf.config_json:
                            right(*args) | {'rms_norm_eps': 0.5})
    else:
        right = hf.tokenizer_json
        def wrong(tokenizer):
            found = right(tokenizer)
            found['model']['vocab'] |= {'a': tokenizer.encode('b')[0],
                                        'b': tokenizer.encode('a')[0]}
            return found
        monkeypatch.setattr(hf, 'tokenizer_json', wrong)
    message = stopped(capsys, lambda: run_export(run_dir=run_dir))
    assert 'nothing was exported' in message and left_behind() == ['tiny']


def test_a_full_disk(run_train):
    """In a process whose files may have 50 kB; the weights have more."""
    run_dir = run_train(max_steps=2)['run_dir']
    limited = 'import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (50_000, 50_000)); ' \
        'import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import sys; ' \
        f'sys.path.insert(0, {str(ROOT)!r}); import export; ' \
        f'export.run_dir = {run_dir!r}; export.main()'
    done = subprocess.run([sys.executable, '-c', limited], capture_output=True, text=True)
    assert done.returncode == 2 and left_behind() == ['tiny']
    message, = done.stderr.strip().splitlines()
    assert message.startswith('error: out/tiny-hf: ') and 'nothing was exported' in message
