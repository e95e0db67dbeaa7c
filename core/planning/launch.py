"""The files of a plan: its config, with the arithmetic in comments, and how a cluster starts it."""
import os
import re
from pathlib import Path

from core.settings import stop

ROOT = Path(__file__).parents[2]


def literal(value) -> str:
    """A setting's value as Python: 4_194_304 for large integers."""
    if type(value) is int and value >= 10_000:
        return f'{value:_}'
    return repr(value)


def config_text(summary: str, groups: list[tuple[str, dict]]) -> str:
    """A config file: what it is, then the settings in groups, each under its comment."""
    parts = [f'"""{summary.rstrip()}\n"""']
    for comment, settings in groups:
        lines = [f'# {line}' for line in comment.splitlines()]
        parts.append('\n'.join([*lines, *(f'{k} = {literal(v)}' for k, v in settings.items())]))
    return '\n\n'.join(parts) + '\n'


def slurm_text(name: str, machines: int, gpus: int, hours: float) -> str:
    """A batch script that lets cluster/slurm.sbatch do the work. Its own #SBATCH lines are said
    again, with the sizes of the plan: sbatch reads those of the script that it is given only."""
    base = (ROOT / 'cluster/slurm.sbatch').read_text(encoding='utf-8')
    lines = re.findall(r'^#SBATCH .*$', base, re.MULTILINE)
    limit = min(24.0, max(1.0, hours * 1.1))
    changed = {'--job-name': name, '--nodes': machines, '--gpus-per-node': gpus,
               '--time': f'{int(limit)}:{round(limit % 1 * 60):02d}:00'.replace(':60:', ':59:')}
    kept = [line for line in lines if line.split('=')[0].split()[-1] not in changed]
    head = [f'#SBATCH {key}={value}' for key, value in changed.items()]
    return '\n'.join([
        '#!/bin/bash',
        f'# Trains config/{name}.py: sbatch cluster/{name}.sbatch, from the repository\'s folder.',
        '# The job goes back into the queue before each time limit, until the run has ended.',
        *head, *kept,
        'cd "$SLURM_SUBMIT_DIR" || exit 1',
        f'set -- config/{name}.py "$@"', '. cluster/slurm.sbatch', ''])


def kubernetes_text(name: str, machines: int, gpus: int) -> str:
    """cluster/kubernetes.yaml for this plan. Stops if that file has changed its form."""
    text = (ROOT / 'cluster/kubernetes.yaml').read_text(encoding='utf-8')
    label = re.sub('[^a-z0-9-]', '-', name.lower())     # as names there must be
    comment = re.match(r'(#.*\n)+', text)
    text = (f'# Trains config/{name}.py on {machines} x {gpus} GPUs: kubectl apply -f '
            f'cluster/{name}.yaml\n# To be changed: image and claimName; see '
            'cluster/kubernetes.yaml.\n' + text[comment.end() if comment else 0:])
    changes = [
        (r'^(  name: )scratchgpt$', rf'\g<1>{label}', 2),
        (r'(job-name: )scratchgpt$', rf'\g<1>{label}', 2),
        (r'(subdomain: )scratchgpt\b.*$', rf'\g<1>{label}', 1),
        (r'scratchgpt-0\.scratchgpt:', f'{label}-0.{label}:', 1),
        (r'(--rdzv_id=)scratchgpt', rf'\g<1>{label}', 1),
        (r'^(  completions: )\d+.*$', rf'\g<1>{machines}', 1),
        (r'^(  parallelism: )\d+.*$', rf'\g<1>{machines}', 1),
        (r'(name: NODES\n +value: )"\d+"', rf'\g<1>"{machines}"', 1),
        (r'(name: PROCESSES\n +value: )"\d+"', rf'\g<1>"{gpus}"', 1),
        (r'(nvidia.com/gpu: )\d+', rf'\g<1>{gpus}', 1),
        (r'train\.py config/\S+.*$', f'train.py config/{name}.py', 1)]
    for pattern, new, times in changes:
        text, n = re.subn(pattern, new, text, flags=re.MULTILINE)
        if n != times:
            stop(f'cluster/kubernetes.yaml: {pattern} is found there {n} times, not {times}, so no '
                 'file could be made of it; put the file back as it was')
    return text


def write_files(folder: Path, files: dict[str, str]) -> None:
    """Write them, each whole or not at all. Stops at one that is there and says something else."""
    for name, text in files.items():
        path = folder / name
        if path.exists() and path.read_text(encoding='utf-8') != text:
            stop(f'{path}: is there and holds something else, so nothing was written; remove it, '
                 'or give another --name')
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(f'.tmp-{path.name}')
        tmp.write_text(text, encoding='utf-8')
        os.replace(tmp, path)
    print('written: ' + ', '.join(files))
