"""Programs that a model has written, run where they can do no harm, and cannot cheat.

    python core/eval/sandbox.py program | checker

Each program runs in two processes. The one of the program has only the program; the tests are in
the other, the checker, which calls the program's function through a pipe. What goes through the
pipe is JSON, so an answer is a plain number, text or list of such: it cannot compare itself with
anything. The verdict is the checker's. What the program does to its own process (leave early, read
its frames, change == or print) changes nothing there.

Each process is the first of namespaces of its own (Linux: users, processes, network, mounts), in
which all file systems are read-only; it may start no other process; its memory, time and files are
limited. When it ends, or is out of time, the kernel ends all that is left.
"""
import contextlib
import ctypes
import errno
import functools
import json
import os
import platform
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from typing import Any

SECONDS, MEMORY, ANSWER = 10.0, 512 << 20, 1 << 20     # of a program: time, bytes, bytes of a line
UNSHARE = ('unshare', '--user', '--map-root-user', '--net', '--ipc', '--pid', '--fork',
           '--kill-child', '--mount', '--mount-proc')
PASSED = 'passed'

# ---------------------------------------------------------------------------------------------
# What the stage calls


@functools.cache
def refusal() -> str:
    """Why programs cannot be run on this machine; '' if they can."""
    if platform.system() != 'Linux' or platform.machine() not in CALLS:
        return 'it needs Linux on x86-64 or arm64: namespaces, and a filter of system calls'
    if not shutil.which('unshare'):
        return 'the program unshare is not installed (package util-linux)'
    found = run('def f(x):\n    return x + 1\n', 'def check(f):\n    assert f(1) == 2\n', 'f')
    return '' if found == PASSED else f'namespaces are not allowed here ({found})'


def run(program: str, test: str, name: str, prompt: str = '') -> str:
    """PASSED if the function `name` of a program passes check(function) of a test, or why not.
    What the prompt defines is known to the test, too."""
    to_program, to_checker = os.pipe(), os.pipe()
    command = [*UNSHARE, sys.executable, '-I', '-S', '-B', __file__]
    processes, pipes = [], [to_program[0], to_checker[1], to_checker[0], to_program[1]]
    try:
        for role, given, fds in (('program', [program, name], pipes[:2]),
                                 ('checker', [prompt, test, name], pipes[2:])):
            out = subprocess.DEVNULL if role == 'program' else subprocess.PIPE
            processes.append(subprocess.Popen(
                [*command, role, *map(str, fds)], stdin=subprocess.PIPE, stdout=out, stderr=out,
                pass_fds=fds, start_new_session=True))
            for fd in fds:
                os.close(fd)
                pipes.remove(fd)
            with contextlib.suppress(BrokenPipeError):
                processes[-1].stdin.write(json.dumps(given).encode())
                processes[-1].stdin.close()
        return verdict(processes[1])
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            for end in (process.stdin, process.stdout, process.stderr):
                if end:
                    with contextlib.suppress(BrokenPipeError):
                        end.close()
            process.wait()
        for fd in pipes:
            os.close(fd)


def verdict(checker) -> str:
    """What the checker says, within the time."""
    ends, said = time.monotonic() + SECONDS, b''
    os.set_blocking(checker.stdout.fileno(), False)
    while time.monotonic() < ends:
        with contextlib.suppress(BlockingIOError):
            said += os.read(checker.stdout.fileno(), 4096)
        if checker.poll() is not None or len(said) > 4096:
            break
        time.sleep(0.005)
    else:
        return f'more than {SECONDS:g} s'
    with contextlib.suppress(BlockingIOError):
        said += os.read(checker.stdout.fileno(), 4096)
    if said.strip():
        return said.decode(errors='replace').strip()[:300]
    why = checker.stderr.read(300).decode(errors='replace').strip().split('\n')[-1]
    return why or f'the checker ended with status {checker.returncode}'


# ---------------------------------------------------------------------------------------------
# Inside: what is plain, as JSON


def pack(value):
    """A value as JSON, types kept. Raises TypeError for what is not plain."""
    kind = type(value)
    if kind in (str, bool, type(None)):
        return value
    if kind in (int, float):
        return {'number': kind.__name__, 'value': repr(value) if kind is float else hex(value)}
    if kind in (list, tuple, set):
        return {'list': kind.__name__, 'value': [pack(part) for part in value]}
    if kind is dict:
        return {'list': 'dict', 'value': [[pack(k), pack(v)] for k, v in value.items()]}
    raise TypeError(f'{kind.__name__} is no plain value')


def unpack(found) -> Any:
    """The inverse of `pack`."""
    if not isinstance(found, dict):
        return found
    if 'number' in found:
        return float(found['value']) if found['number'] == 'float' else int(found['value'], 16)
    if found['list'] == 'dict':
        return {unpack(k): unpack(v) for k, v in found['value']}
    return {'list': list, 'tuple': tuple, 'set': set}[found['list']](map(unpack, found['value']))


def serve(program: str, name: str, read: int, write: int) -> None:
    """The program's process: run it, then call its function as asked."""
    known: dict = {'__name__': 'program'}
    exec(compile(program, 'program', 'exec'), known)   # this is what the process is for
    with os.fdopen(read, 'rb') as asked, os.fdopen(write, 'wb') as answers:
        for line in asked:
            try:
                said = {'value': pack(known[name](*unpack(json.loads(line))))}
            except Exception as e:
                said = {'error': type(e).__name__}
            answers.write(json.dumps(said).encode() + b'\n')
            answers.flush()


def check(prompt: str, test: str, name: str, read: int, write: int) -> None:
    """The checker's process: print PASSED, or what failed."""
    with os.fdopen(read, 'rb') as answers, os.fdopen(write, 'wb') as asked:
        def function(*given):
            """The program's function: its arguments go through the pipe, and the answer back."""
            asked.write(json.dumps(pack(list(given))).encode() + b'\n')
            asked.flush()
            line = answers.readline(ANSWER)
            if not line.endswith(b'\n'):
                raise EOFError('the program has ended, or said too much')
            said = json.loads(line)
            if 'error' in said:
                raise RuntimeError(f'the program raised {str(said["error"])[:40]}')
            return unpack(said['value'])
        try:
            known: dict = {'__name__': 'test'}
            exec(compile(prompt, 'prompt', 'exec'), known)     # of the benchmark, not of the model
            known[name] = function      # some tests call it by name
            exec(compile(test, 'test', 'exec'), known)
            known['check'](function)
        except BaseException as e:
            print(f'{type(e).__name__}: {str(e)[:200]}'.strip(': '), flush=True)
        else:
            print(PASSED, flush=True)


# ---------------------------------------------------------------------------------------------
# Inside: what is taken away

# Numbers of the system calls that start a process or a program; that leave its group, or what ends
# it with its parent; that make sockets, which reach listeners in the file system, or memory that is
# not counted; that change namespaces and mounts.
CALLS = {
    'x86_64': (0xC000003E, 56, {
        'fork': 57, 'vfork': 58, 'execve': 59, 'socket': 41, 'connect': 42, 'socketpair': 53,
        'setpgid': 109, 'setsid': 112, 'prctl': 157, 'shmget': 29, 'semget': 64, 'msgget': 68,
        'ptrace': 101, 'pivot_root': 155, 'chroot': 161, 'mount': 165, 'umount2': 166,
        'unshare': 272, 'setns': 308, 'execveat': 322, 'bpf': 321, 'memfd_create': 319,
        'userfaultfd': 323, 'open_tree': 428, 'move_mount': 429, 'fsopen': 430,
        'io_uring_setup': 425, 'clone3': 435, 'mount_setattr': 442}),
    'aarch64': (0xC00000B7, 220, {
        'execve': 221, 'socket': 198, 'connect': 203, 'socketpair': 199, 'setpgid': 154,
        'setsid': 157, 'prctl': 167, 'shmget': 194, 'semget': 190, 'msgget': 186, 'ptrace': 117,
        'pivot_root': 41, 'chroot': 51, 'mount': 40, 'umount2': 39, 'unshare': 97, 'setns': 268,
        'execveat': 281, 'bpf': 280, 'memfd_create': 279, 'userfaultfd': 282, 'open_tree': 428,
        'move_mount': 429, 'fsopen': 430, 'io_uring_setup': 425, 'clone3': 435,
        'mount_setattr': 442})}
CLONE_THREAD = 0x10000


def confine() -> None:
    """Make all file systems read-only, give up all privileges, refuse the CALLS, set limits."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(what, *args):
        if what(*args) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    read_only = struct.pack('QQQQ', 1, 0, 0, 0)     # mount_setattr(2) with MOUNT_ATTR_RDONLY
    call(libc.syscall, 442, -100, b'/', 0x8000, read_only, ctypes.c_size_t(len(read_only)))
    for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0),
                         (resource.RLIMIT_CPU, int(SECONDS)), (resource.RLIMIT_CORE, 0),
                         (resource.RLIMIT_NOFILE, 32)):
        resource.setrlimit(limit, (value, value))
    call(libc.prctl, 38, 1, 0, 0, 0)                # PR_SET_NO_NEW_PRIVS
    header, nothing = struct.pack('Ii', 0x20080522, 0), bytes(24)
    call(libc.capset, header, nothing)
    code = (ctypes.c_char * len(FILTER)).from_buffer_copy(FILTER)
    program = struct.pack('HxxxxxxQ', len(FILTER) // 8, ctypes.addressof(code))
    call(libc.prctl, 22, 2, program)                # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def seccomp() -> bytes:
    """A filter (seccomp(2), a classic BPF program) that answers the CALLS with EPERM, clone3 with
    ENOSYS, so that the C library takes clone, and clone with EPERM unless it makes a thread."""
    architecture, clone, calls = CALLS[platform.machine()]
    load, equal, at_least, bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill),
            (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (answer, 0, 0, kill)]
    for name, number in calls.items():
        why = errno.ENOSYS if name == 'clone3' else errno.EPERM
        code += [(equal, 0, 1, number), (answer, 0, 0, refuse | why)]
    code += [(equal, 0, 3, clone), (load, 0, 0, 16), (bits, 1, 0, CLONE_THREAD),
             (answer, 0, 0, refuse | errno.EPERM), (answer, 0, 0, allow)]
    return b''.join(struct.pack('HBBI', *line) for line in code)


FILTER = seccomp() if platform.machine() in CALLS else b''

if __name__ == '__main__':
    _role, _ends = sys.argv[1], [int(fd) for fd in sys.argv[2:4]]
    _given = json.load(sys.stdin.buffer)
    confine()
    (serve if _role == 'program' else check)(*_given, *_ends)
