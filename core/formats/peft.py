"""Low-rank adapters in the files of PEFT, the library of Hugging Face."""
import json
from pathlib import Path

import torch

from core.formats import hf
from core.net.lora import adapters


def save(model, folder: Path, base: str, dropout: float) -> None:
    """Write the adapters as PEFT has them: adapter_config.json and adapter_model.safetensors.

    `base` is where the model is that they belong to, in Hugging Face's format. GPT-2's q, k and v
    are one matrix there: their adapters become one of the sum of their ranks, in blocks.
    """
    kind, found = hf.architecture(model.config), {}
    for name, layer in adapters(model).items():
        name = f'{name}.weight'
        module = hf.hf_name(name, kind).removesuffix('.weight')
        found.setdefault(module, {})[hf.third(name, kind)] = layer
    tensors, ranks = {}, {}
    for module, parts in found.items():     # {None: layer}, or some thirds of GPT-2's c_attn
        layer = next(iter(parts.values()))
        absent = torch.zeros(layer.out_features, 0)
        A = torch.cat([part.lora_A.detach().cpu() for part in parts.values()])
        B = torch.block_diag(*(parts[i].lora_B.detach().cpu() if i in parts else absent
                               for i in ([None] if None in parts else range(3))))
        tensors |= {f'base_model.model.{module}.lora_A.weight': A.contiguous(),
                    f'base_model.model.{module}.lora_B.weight': B.contiguous()}
        # two parts of the name, since GPT-2's attention and MLP both have a c_proj
        ranks['.'.join(module.split('.')[-2:])] = len(A)
    rank, scale = min(ranks.values()), next(iter(adapters(model).values())).scale
    larger = {target: n for target, n in ranks.items() if n != rank}
    config = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base,
              'r': rank, 'lora_alpha': scale * rank, 'rank_pattern': larger,
              'alpha_pattern': {target: scale * n for target, n in larger.items()},
              'target_modules': sorted(ranks), 'lora_dropout': dropout, 'bias': 'none',
              'fan_in_fan_out': kind == 'gpt2', 'inference_mode': True}
    folder.mkdir(parents=True, exist_ok=True)
    hf.save_file(tensors, folder / 'adapter_model.safetensors', metadata={'format': 'pt'})
    (folder / 'adapter_config.json').write_text(json.dumps(config, indent=1) + '\n',
                                                encoding='utf-8')
