"""docs/chain.md to the letter: from a folder of text to a chat model that answers in llama.cpp and
on the served page, offline, in less than 15 minutes on two cores."""
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MIRROR = Path(os.environ.get('DATA_MIRROR', 'missing')).resolve()
NO_NETWORK = {name: 'http://127.0.0.1:9' for name in ('http_proxy', 'https_proxy', 'all_proxy')}
QUESTION = 'Name a fruit.'
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not MIRROR.is_dir(), reason='needs DATA_MIRROR')]


def blocks(language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', (ROOT / 'docs/chain.md').read_text('utf-8'),
                      flags=re.M | re.S)


def answer_on_the_page(url: str) -> str:
    """What the served page shows when a person asks."""
    api = pytest.importorskip('playwright.sync_api')
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if not chromium:
        pytest.skip('no chromium or google-chrome')
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        page = browser.new_page()
        page.goto(url)
        api.expect(page.locator('#send')).not_to_be_empty()     # it has asked for the model
        page.get_by_label('Your message', exact=True).fill(QUESTION)
        page.keyboard.press('Enter')
        api.expect(page.get_by_role('log')).to_contain_text('tokens/s', timeout=60_000)
        api.expect(page.locator('#send')).not_to_have_text('Stop', timeout=60_000)
        text = page.locator('[aria-label=Model] .text').inner_text()
        browser.close()
    return text


def test_chain(tmp_path, capsys):
    for module in ('gguf', 'xllamacpp', 'starlette', 'uvicorn'):
        pytest.importorskip(module)
    for path in [*ROOT.glob('*.py'), *ROOT.glob('*.html'), *ROOT.glob('c*/**/*.py')]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    shutil.copytree(MIRROR / 'austen', tmp_path / 'my_novels', copy_function=shutil.copyfile)
    env = os.environ | NO_NETWORK | {'DATA_MIRROR': str(MIRROR), 'PYTHONUNBUFFERED': '1'}
    env.pop('OMP_NUM_THREADS', None)
    times, (lines,) = [], blocks('sh')
    *lines, serve = lines.splitlines()
    for line in lines:
        began = time.monotonic()
        done = subprocess.run(line.replace('python', sys.executable, 1).split(), cwd=tmp_path,
                              env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f'{line}\n{done.stderr[-2000:]}'
        times.append((time.monotonic() - began, line))
    in_llama = subprocess.run([sys.executable, '-c', blocks('python')[0]], cwd=tmp_path, env=env,
                              capture_output=True, text=True, timeout=120, check=True).stdout
    began = time.monotonic()
    server = subprocess.Popen(serve.replace('python', sys.executable, 1).split() + ['--port=0'],
                              cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    try:
        url = next(line for line in server.stdout if line.startswith('http://')).split()[0]
        times.append((time.monotonic() - began, serve))
        on_the_page = answer_on_the_page(url)
    finally:
        server.terminate()
        server.wait(60)
    with capsys.disabled():
        for seconds, line in times:
            print(f'\n{seconds:7.1f} s  {line}', end='')
        print(f'\n{sum(s for s, _ in times):7.1f} s  together\nin llama.cpp: {in_llama!r}\n'
              f'on the page: {on_the_page!r}')
    assert len(in_llama.split()) > 1 and len(on_the_page.split()) > 1
    assert sum(seconds for seconds, _ in times) < 15 * 60
