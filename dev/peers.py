"""Other people's code, run beside ours on the same work: nanoGPT, transformers and llama.cpp. None
of it is here: it is installed, or the folder of a checkout is given.
"""
import contextlib
import importlib.util
import math
import multiprocessing
import signal
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from core.formats import gguf, hf
from core.settings import stop
from model import count_parameters

# ---------------------------------------------------------------------------------------------
# A process of its own


class Apart:
    """A function in a process of its own, which nothing that ours sets for its process (memory that
    is kept, deterministic algorithms) helps or hinders: make(*args) makes it there.

    The process ends with this object. Stops if it ends sooner; why, it has said itself.
    """

    def __init__(self, make, *args):
        processes = multiprocessing.get_context('spawn')
        self.pipe, theirs = processes.Pipe()
        self.process = processes.Process(target=serve, daemon=True, args=(
            theirs, torch.get_num_threads(), torch.get_float32_matmul_precision(), make, args))
        self.process.start()
        theirs.close()
        self.receive()

    def __call__(self, *args):
        with contextlib.suppress(ConnectionError):  # nobody is there: receive says so
            self.pipe.send(args)
        return self.receive()

    def __del__(self):
        self.process.terminate()
        self.process.join()     # what is timed next has the machine for itself

    def receive(self):
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            stop(f'the process of a peer ended with status {self.process.exitcode}; see above')


def serve(pipe, threads: int, precision: str, make, args) -> None:
    """Call what make(*args) returns with whatever comes through the pipe, and send what it returns,
    until nobody is at the other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C ends ours, which ends this process
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    function = make(*args)
    pipe.send(None)
    while True:
        try:
            args = pipe.recv()
        except EOFError:
            return
        pipe.send(function(*args))


# ---------------------------------------------------------------------------------------------
# nanoGPT


@dataclass
class NanoRecipe:
    """Settings of nanoGPT's train.py, under its names."""
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int
    max_iters: int
    dropout: float = 0.0
    bias: bool = False
    learning_rate: float = 1e-3
    warmup_iters: int = 100
    weight_decay: float = 0.1
    beta2: float = 0.99
    grad_clip: float = 1.0
    compile: bool = False
    autocast: bool = False

    def factor(self, step: int) -> float:
        """get_lr of its train.py, over learning_rate: a warm-up, then half a cosine to a tenth."""
        if step < self.warmup_iters:
            return (step + 1) / (self.warmup_iters + 1)
        progress = (step - self.warmup_iters) / (self.max_iters - self.warmup_iters)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


# What its README says for tiny Shakespeare, on a CPU and on a GPU.
NANO_RECIPES = {
    'cpu': NanoRecipe(4, 4, 128, 64, 12, 2000),
    'gpu': NanoRecipe(6, 6, 384, 256, 64, 5000, dropout=0.2, compile=True, autocast=True)}


def nanogpt_like(preset, config, compiled: bool) -> NanoRecipe:
    """nanoGPT's model of the same shape, trained with the same settings in the same dtype."""
    return NanoRecipe(
        config.n_layer, config.n_head, config.n_embd, config.block_size, preset.batch_size,
        preset.max_steps, config.dropout, config.bias, preset.learning_rate, preset.warmup_steps,
        preset.weight_decay, preset.beta2, preset.grad_clip, compiled, True)


def check_size(vs: str, theirs: int, ours: int) -> None:
    """Stop if the peer's model has another number of parameters than ours."""
    if theirs != ours:
        stop(f'vs={vs}: its model has {theirs:,} parameters, ours {ours:,}; compare at the GPT-2 '
             'architecture (no preset)')


def nanogpt_source(folder: str) -> Path:
    """The model in a checkout of nanoGPT. Stops if there is none."""
    path = Path(folder) / 'model.py'
    if not path.is_file():
        stop(f'vs={folder}: there is no model.py in it; give a checkout of nanoGPT')
    return path


class NanoGPT:
    """nanoGPT's model and its training step, as its train.py writes it."""

    def __init__(self, folder: str, recipe: NanoRecipe, vocab_size: int, dev, seed: int = 1337):
        spec = importlib.util.spec_from_file_location('nanogpt', nanogpt_source(folder))
        nanogpt = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nanogpt)
        torch.manual_seed(seed)
        self.model = nanogpt.GPT(nanogpt.GPTConfig(
            block_size=recipe.block_size, vocab_size=vocab_size, n_layer=recipe.n_layer,
            n_head=recipe.n_head, n_embd=recipe.n_embd, dropout=recipe.dropout, bias=recipe.bias))
        self.model.to(dev.name)
        self.recipe = recipe
        self.dev = dev if recipe.autocast else replace(dev, dtype='float32')
        self.optimizer = self.model.configure_optimizers(
            recipe.weight_decay, recipe.learning_rate, (0.9, recipe.beta2), dev.kind)
        self.scaler = torch.amp.GradScaler(dev.kind, enabled=self.dev.dtype == 'float16')
        self.trained = torch.compile(self.model) if recipe.compile else self.model
        if recipe.compile:      # as torch has it; core/ranks/parallel.py may have changed it
            from torch._functorch import config
            config.ban_recompute_materialized_backward = True

    def step(self, batches, factor: float = 1.0) -> None:
        """One optimizer step on micro-batches (x, y, ...)."""
        for group in self.optimizer.param_groups:
            group['lr'] = self.recipe.learning_rate * factor
        for x, y, *_ in batches:
            with self.dev.autocast():
                _, loss = self.trained(x.to(self.dev.name), y.to(self.dev.name))
                loss = loss / len(batches)
            self.scaler.scale(loss).backward()
        if self.recipe.grad_clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def batch(self, ids) -> tuple:
        """get_batch of its train.py, of a split's ids (n,), a memory map: random windows."""
        n, size = self.recipe.batch_size, self.recipe.block_size
        at = torch.randint(len(ids) - size, (n,)).tolist()
        x = torch.stack([torch.from_numpy(ids[i:i + size].astype('int64')) for i in at])
        y = torch.stack([torch.from_numpy(ids[i + 1:i + 1 + size].astype('int64')) for i in at])
        return x, y

    def loss_sum(self, x, y) -> torch.Tensor:
        """The sum of the losses of targets (B, T), -100 where there is none."""
        logits, _ = self.model(x, y.clamp(min=-1))  # its number for no target
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=-100,
                               reduction='sum')

    def flops_per_token(self) -> int:
        """As model.flops_per_token counts ours."""
        n = sum(p.numel() for name, p in self.model.named_parameters()
                if p.ndim > 1 and 'wpe' not in name)
        recipe = self.recipe
        return 6 * n + 12 * recipe.n_layer * recipe.n_embd * recipe.block_size


def nanogpt_steps(folder: str, recipe: NanoRecipe, vocab_size: int, dev, batches: list):
    """A function n -> (parameters, FLOPs per token) of nanoGPT's model, after n more steps, each on
    all of the micro-batches."""
    peer = NanoGPT(folder, recipe, vocab_size, dev)

    def run(n):
        for _ in range(n):
            peer.step(batches)
        dev.synchronize()
        return count_parameters(peer.model), peer.flops_per_token()
    return run


# ---------------------------------------------------------------------------------------------
# Decoding by transformers and llama.cpp


def decoder(vs: str, model, tokenizer, kind: str, rows: int, size: int, dev) -> Apart | None:
    """A function (prompts, n_new) -> ids, B lists of n_new, or None where the peer does not tell
    them: greedy decoding of our model by a peer, with weights as `kind` of GGUF. None if the peer
    has no such weights. Stops if it is not installed."""
    package = vs.replace('llama.cpp', 'xllamacpp')
    if not importlib.util.find_spec(package):
        stop(f'vs={vs}: it is not installed: pip install {package}')
    if vs == 'transformers' and kind not in ('f32', 'bf16'):
        return None
    with tempfile.TemporaryDirectory() as folder:
        if vs == 'transformers':
            hf.save(model, tokenizer, Path(folder) / 'hf')
            return Apart(transformers_generate, Path(folder) / 'hf', dev)
        path = Path(folder) / 'model.gguf'
        gguf.save(model, tokenizer, path, kind, False, 'model')
        return Apart(llama_cpp_generate, path, rows, size)


def transformers_generate(folder: Path, dev):
    """The function of `decoder` for a Hugging Face folder, with transformers' KV cache."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder).to(dev.name).eval()
    model.generation_config.eos_token_id = None     # as many tokens as ours

    @torch.no_grad()
    def run(prompts, n_new):
        idx = torch.tensor(prompts, device=dev.name)
        with dev.autocast():
            ids = model.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False,
                                 max_new_tokens=n_new, pad_token_id=0, use_cache=True)
        return ids[:, idx.size(1):].tolist()
    return run


def llama_cpp_generate(path: Path, rows: int, size: int):
    """The function of `decoder` for a GGUF file, by llama.cpp's server within this process, with as
    many slots as rows and as many threads as torch has."""
    xllamacpp = importlib.import_module('xllamacpp')
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx = str(path), rows, rows * (size + 64)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)

    def run(prompts, n_new):
        found = server.handle_completions({
            'prompt': prompts if rows > 1 else prompts[0], 'n_predict': n_new, 'temperature': 0,
            'ignore_eos': True, 'cache_prompt': False, 'return_tokens': True, 'verbose': True})
        if found['usage']['completion_tokens'] != n_new:
            raise RuntimeError(f'llama.cpp gave {found["usage"]} instead of {n_new} tokens')
        return [found['__verbose']['tokens']] if rows == 1 else None
    return run
