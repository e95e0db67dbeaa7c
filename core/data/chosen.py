"""The dataset that train.py's settings ask for, made if it is missing: the same on all ranks."""
from pathlib import Path
from types import SimpleNamespace

from core.data import named
from core.data.build import build
from core.ranks import processes
from core.ranks.processes import print0
from core.read.download import NoNetwork
from core.run import models
from core.run.begin import from_model, tokenizer_wanted
from core.settings import stop, warn


def get_data(settings: SimpleNamespace, ranks) -> tuple[Path, dict, bool]:
    """The dataset's folder, its meta.json, and whether it is the fallback, because there is no
    network. Rank 0 decides; the others wait, then find the dataset, or make it on their machine.
    """
    chosen = choose_dataset(settings) if ranks.rank == 0 else None
    name, fell_back = processes.broadcast(chosen, patient=True)
    data = build_dataset(settings, name, fell_back)
    meta = named.read_meta(data)
    if processes.broadcast(meta['sha256'], patient=True) != meta['sha256']:
        stop(f'{data} on this machine is not what rank 0 has; copy one of them to all machines')
    if fell_back:
        print0(f'*** THIS IS NOT {settings.dataset.upper()}: without a network the run uses {data} '
               '***')
    return data, meta, fell_back


def choose_dataset(settings: SimpleNamespace) -> tuple[str, bool]:
    """The dataset, made if it is missing, or the fallback where there is no network; and which."""
    if from_model(settings):    # downloaded before all ranks ask for it
        models.find_model(settings.init_from, settings.data_dir, setting='init_from')
    try:
        build_dataset(settings, settings.dataset, False)
        return settings.dataset, False
    except NoNetwork as e:
        if not settings.fallback_dataset:
            stop(named.no_network(settings.dataset, e))
        warn(str(e))
        return settings.fallback_dataset, True


def build_dataset(settings: SimpleNamespace, name: str, fell_back: bool) -> Path:
    """The folder of a dataset with the tokenizer that the settings ask for; the fallback's own."""
    return build(name, settings.data_dir, vocab_size=settings.vocab_size,
                 tokenizer='' if fell_back else tokenizer_wanted(settings))
