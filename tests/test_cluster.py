"""cluster/: the Slurm script on a real Slurm of one machine, Kubernetes' file by its schema."""
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import TINY
from forked import run_script

from core.run.log import read_log

ROOT = Path(__file__).parent.parent

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmctldPort={ctld}
SlurmdPort={slurmd}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerType=sched/builtin
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=30
MinJobAge=300
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm of this machine; its folder."""
    if not (shutil.which('slurmctld') and shutil.which('slurmd')) or os.getuid():
        pytest.skip('needs Slurm (apt-get install slurm-wlm) and to be root')
    folder = tmp_path / 'slurm'
    for name in ('state', 'spool'):
        (folder / name).mkdir(parents=True)
    conf = folder / 'slurm.conf'
    conf.write_text(CONF.format(host=socket.gethostname(), ctld=free_port(), slurmd=free_port(),
                                folder=folder, cpus=os.cpu_count()))
    (folder / 'gres.conf').write_text('Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n')
    monkeypatch.setenv('SLURM_CONF', str(conf))
    daemons = [subprocess.Popen([name, '-D', *flags], stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)
               for name, flags in (('slurmctld', ['-i']), ('slurmd', []))]
    end = time.monotonic() + 60
    while 'idle' not in subprocess.run(['sinfo', '-h', '-o', '%t'], capture_output=True,
                                       text=True).stdout:
        assert time.monotonic() < end, [path.read_text()[-2000:] for path in folder.glob('*.log')]
        time.sleep(0.5)
    yield folder
    subprocess.run(['scancel', '--user=root', '--signal=KILL'], check=False)
    time.sleep(1)
    for daemon in daemons:
        daemon.terminate()
        daemon.wait(30)


@pytest.mark.slow
def test_slurm_requeues_before_the_time_limit(tmp_path, text_file, slurm):
    """Two processes, a limit of two minutes; the run needs longer, and ends all the same."""
    place = tmp_path / 'place'      # as a checkout, with its own out/
    place.mkdir()
    for path in ROOT.iterdir():
        if path.name not in ('out', 'data', '.git'):
            (place / path.name).symlink_to(path)
    settings = {**TINY, 'dataset': text_file, 'out_dir': 'out/a', 'batch_size': 64,
                'micro_batch_size': 4, 'block_size': 64, 'n_embd': 64, 'save_interval': 100_000,
                'eval_interval': 100_000, 'max_steps': 1700}
    flags = [f'--{key}={value}' for key, value in settings.items()]
    env = {**os.environ, 'PYTHON': sys.executable, 'PROCESSES': '2', 'PORT': str(free_port()),
           'OMP_NUM_THREADS': '1'}
    answer = subprocess.run(['sbatch', '--parsable', '--time=2', '--signal=B:USR1@45',
                             'cluster/slurm.sbatch', *flags], cwd=place, env=env, text=True,
                            capture_output=True, check=True)
    output, run = place / f'scratchgpt-{answer.stdout.strip()}.txt', place / 'out/a'
    end = time.monotonic() + 1200
    while not read_log(run, 'end'):
        assert time.monotonic() < end, output.read_text()[-3000:]
        time.sleep(1)
    text = output.read_text()
    starts = 1 + text.count('back into the queue')
    assert starts >= 2 and text.count('the time limit is near: the run is saved') == starts - 1
    assert f'start {starts}, 1 x 2 processes' in text
    resumed = read_log(run, 'resume')
    assert len(resumed) == starts - 1 and 'Traceback (most recent call last):\n  File "' + str(
        place) not in text
    losses = [event['step'] for event in read_log(run, 'step')]
    assert losses == list(range(1, 1701))       # each step once: nothing was lost at the limit
    saved = [int(line.split('stopped after step ')[1].split(',')[0]) for line in text.splitlines()
             if 'stopped after step ' in line]
    assert saved == [event['step'] for event in resumed]


def test_slurm_script_is_valid_bash():
    subprocess.run(['bash', '-n', ROOT / 'cluster/slurm.sbatch'], check=True)


def test_kubernetes_schema():
    check_kubernetes((ROOT / 'cluster/kubernetes.yaml').read_text())


def check_kubernetes(text: str) -> None:
    """Its schema, and that its parts agree."""
    validate = pytest.importorskip('kubernetes_validate')
    documents = list(yaml.safe_load_all(text))
    assert [document['kind'] for document in documents] == ['Service', 'Job']
    for document in documents:
        validate.validate(document, '1.31', strict=True)
    service, job = documents
    pod = job['spec']['template']
    assert service['spec']['selector'].items() <= pod['metadata']['labels'].items()
    assert pod['spec']['subdomain'] == service['metadata']['name']
    container, = pod['spec']['containers']
    env = {item['name']: item['value'] for item in container['env']}
    assert int(env['NODES']) == job['spec']['completions'] == job['spec']['parallelism']
    assert int(env['PROCESSES']) == container['resources']['limits']['nvidia.com/gpu']
    name = f'{job["metadata"]["name"]}-0.{service["metadata"]["name"]}'
    port = service['spec']['ports'][0]['port']
    assert f'--rdzv_endpoint={name}:{port} ' in container['args'][0]


def script_of(kind: str, folder: Path) -> tuple[list[str], Path]:
    """The command that cluster/'s file runs on a machine, and a folder of programs that it calls:
    Slurm's, and a python that prints the interfaces instead of training."""
    programs = folder / 'bin'
    programs.mkdir()
    for name, lines in {
            'srun': 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
            'scontrol': 'echo here', 'pip': 'true',
            'python': 'echo "$GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME $*"'}.items():
        (programs / name).write_text(f'#!/bin/bash\n{lines}\n')
        (programs / name).chmod(0o755)
    if kind == 'slurm':
        return ['bash', str(ROOT / 'cluster/slurm.sbatch'), 'config/1b.py', '--zero=2'], programs
    _, job = yaml.safe_load_all((ROOT / 'cluster/kubernetes.yaml').read_text())
    container, = job['spec']['template']['spec']['containers']
    return [*container['command'], *container['args']], programs


@pytest.mark.parametrize('given', [{}, {'GLOO_SOCKET_IFNAME': 'ib0'},
                                   {'GLOO_SOCKET_IFNAME': 'ib0', 'NCCL_SOCKET_IFNAME': 'ib1'}])
@pytest.mark.parametrize('kind', ['slurm', 'kubernetes'])
def test_machines_listen_on_the_default_route(tmp_path, kind, given):
    """Not where the machine's own name leads; and what the environment names is kept."""
    route = Path('/proc/net/route')
    rows = [line.split() for line in route.read_text().splitlines()] if route.is_file() else []
    default = next((row[0] for row in rows if row[1] == '00000000'), '')
    command, programs = script_of(kind, tmp_path)
    env = {'PATH': f'{programs}:{os.environ["PATH"]}', 'PYTHON': 'python', 'NODES': '2',
           'PROCESSES': '8', 'SLURM_SUBMIT_DIR': str(tmp_path), 'SLURM_JOB_ID': '7',
           'SLURM_NNODES': '2', 'SLURM_JOB_NODELIST': 'here', **given}
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    gloo, nccl, *rest = said.splitlines()[-1].split(' ')
    assert gloo == given.get('GLOO_SOCKET_IFNAME', default)
    assert nccl == given.get('NCCL_SOCKET_IFNAME', default)
    assert rest[:2] == ['-m', 'torch.distributed.run'] and rest[-2:] == ['config/1b.py', '--zero=2']


# ---------------------------------------------------------------------------------------------
# The files of plan.py --write


SMALL = ['--n_layer=4', '--n_head=4', '--n_kv_head=4', '--n_embd=32', '--n_hidden=64',
         '--block_size=32', '--batch_size=8', '--micro_batch_size=1', '--max_steps=3',
         '--warmup_steps=1', '--log_interval=1', '--device=cpu', '--compile=False',
         '--eval_tokens=200']


@pytest.fixture
def planned(tmp_path):
    """A function that writes the files of a plan in a copy of the repository; their name."""
    place = tmp_path / 'place'
    place.mkdir()
    for path in ROOT.iterdir():
        if path.name in ('config', 'cluster'):
            shutil.copytree(path, place / path.name)
        elif path.name == 'plan.py':
            shutil.copy(path, place)
        elif path.name not in ('out', 'data', '.git'):
            (place / path.name).symlink_to(path)

    def write(*wishes) -> tuple[Path, str]:
        done = run_script(['plan.py', *wishes, '--write'], place)
        assert done.returncode == 0, done.stderr[-2000:]
        written, = (line for line in done.stdout.splitlines() if line.startswith('written: '))
        return place, Path(written.split(', ')[1]).stem
    return write


def test_planned_kubernetes_file(planned):
    """The schema's, and consistent in itself, on 8 machines of 8 GPUs."""
    place, name = planned('--params=7b', '--gpus=64', '--zero=3', '--tp=1', '--pp=1',
                          '--name=planned_seven')
    text = (place / f'cluster/{name}.yaml').read_text()
    check_kubernetes(text)
    _, job = yaml.safe_load_all(text)
    assert job['spec']['completions'] == 8 and 'train.py config/planned_seven.py' in \
        job['spec']['template']['spec']['containers'][0]['args'][0]
    for path in (place / 'cluster').glob('*.sbatch'):
        subprocess.run(['bash', '-n', path], check=True)
    head = (place / f'cluster/{name}.sbatch').read_text()
    assert '#SBATCH --nodes=8\n#SBATCH --gpus-per-node=8\n' in head and '#SBATCH --requeue' in head


@pytest.mark.slow
@pytest.mark.parametrize('wishes', [('--params=7b', '--gpus=4', '--gpu=h200'),
                                    ('--params=30b', '--gpus=4', '--gpu=b200', '--hours=9999')])
def test_planned_config_trains_in_its_layout(planned, text_file, wishes):
    """Three steps at reduced size, on as many CPU ranks as GPUs were planned."""
    place, name = planned(*wishes, '--name=planned_here')
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=4',
         'train.py', f'config/{name}.py', f'--dataset={text_file}', '--tokenizer=byte', *SMALL],
        cwd=place, capture_output=True, text=True, timeout=300,
        env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    run, = (place / 'out').glob('planned_here*/log.jsonl')
    losses = [event['train_loss'] for event in read_log(run.parent, 'step')]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert '4 processes: ' in done.stdout


@pytest.mark.slow
def test_planned_slurm_file(planned, text_file, slurm):
    """sbatch takes it as it stands on a machine with two GPUs, and runs it."""
    place, name = planned('--params=100m', '--gpus=2', '--name=planned_two')
    env = {**os.environ, 'PYTHON': sys.executable, 'PORT': str(free_port()),
           'OMP_NUM_THREADS': '1'}
    batch = f'cluster/{name}.sbatch'
    asked = subprocess.run(['sbatch', '--test-only', batch], cwd=place, env=env, text=True,
                           capture_output=True)
    assert asked.returncode == 0 and 'to start at' in asked.stderr, asked.stderr
    answer = subprocess.run(['sbatch', '--parsable', batch, f'--dataset={text_file}',
                             '--tokenizer=byte', '--out_dir=out/tiny', *SMALL], cwd=place, env=env,
                            text=True, capture_output=True, check=True)
    output, end = place / f'{name}-{answer.stdout.strip()}.txt', time.monotonic() + 300
    while not read_log(place / 'out/tiny', 'end'):
        assert time.monotonic() < end, output.read_text()[-3000:]
        time.sleep(1)
    assert '1 x 2 processes: train.py config/planned_two.py' in output.read_text()
