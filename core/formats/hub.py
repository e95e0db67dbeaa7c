"""Where a Hugging Face model is: on disk, in DATA_MIRROR, or on the hub."""
import os
import re
from pathlib import Path

from core.formats.hf import INDEX, shards
from core.read.download import fetch
from core.settings import stop

# The names of openai-community: layers, heads, channels.
GPT2_SIZES = {'gpt2': (12, 12, 768), 'gpt2-medium': (24, 16, 1024), 'gpt2-large': (36, 20, 1280),
              'gpt2-xl': (48, 25, 1600)}
COMPLETE = '.complete'      # in a downloaded folder: all of it is there


def find(name: str, downloads: str | Path = 'data/downloads', weights: bool = True) -> Path | None:
    """The folder of a model: a path, a name in DATA_MIRROR, or one on the hub ('Qwen/Qwen3-0.6B').

    From the hub come only JSON and safetensors files, by plain HTTPS (HF_ENDPOINT for a mirror of
    it, HF_TOKEN for what needs a login), without `weights` only the JSON. None if `name` cannot be
    a model's; stops if the hub has no such model, raises NoNetwork if it cannot be reached.
    """
    full = f'openai-community/{name}' if name in GPT2_SIZES else name
    places = [Path(name)]
    if mirror := os.environ.get('DATA_MIRROR'):
        places += [Path(mirror) / name, Path(mirror) / full]
    for place in places:
        if (place / 'config.json').is_file():
            return place
    organization = re.fullmatch(r'([\w-][\w.-]*)/[\w-][\w.-]*', full)
    # a misspelt path, such as out/shakespear, is not asked for on the hub
    if not organization or organization[1] == 'out' or Path(organization[1]).exists():
        return None
    folder = Path(downloads) / full
    last = COMPLETE if weights else 'tokenizer_config.json'     # the file that is written last
    if not (folder / COMPLETE).is_file() and not (folder / last).is_file():
        download(full, downloads, weights)
    return folder


def endpoint() -> tuple[str, dict]:
    """Where Hugging Face's hub is, and the headers of a request to it: HF_ENDPOINT, HF_TOKEN."""
    token = os.environ.get('HF_TOKEN')
    return (os.environ.get('HF_ENDPOINT', 'https://huggingface.co'),
            {'Authorization': f'Bearer {token}'} if token else {})


def download(name: str, downloads, weights: bool) -> None:
    """Bring a model from the hub into the folder `name` in `downloads`."""
    folder = Path(downloads) / name
    url, headers = endpoint()
    url = f'{url}/{name}/resolve/main'
    get = lambda file, optional: fetch(f'{name}/{file}', f'{url}/{file}', downloads,
                                       headers=headers, optional=optional, mirrored=False)
    for file in ('config.json', 'tokenizer.json'):
        get(file, False)
    for file in ('tokenizer_config.json', *([INDEX] if weights else [])):
        get(file, True)
    if weights:
        for file in shards(folder):
            if not get(file, True).is_file():
                stop(f'{url}/{file}: not there; the model may be kept as a pickle (.bin), which '
                     'could run anything and is never loaded: convert it where you trust it')
        (folder / COMPLETE).touch()
