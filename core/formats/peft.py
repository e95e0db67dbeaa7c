"""Low-rank adapters in the files of PEFT, the library of Hugging Face."""
import json
from pathlib import Path

import torch
import torch.nn as nn

from core.formats import hf
from core.net.lora import adapters


def save(model: nn.Module, folder: Path, base: str, dropout: float) -> None:
    """Write the adapters as PEFT has them: adapter_config.json and adapter_model.safetensors.

    `base` is where the model is that they belong to, in Hugging Face's format. GPT-2's q, k and v
    are one matrix there: their adapters become one of the sum of their ranks, in blocks.
    """
    kind, layers = hf.architecture(model.config), adapters(model)
    found = {}      # Hugging Face's module -> our adapters in it, in the order of its rows
    for name, layer in layers.items():
        found.setdefault(hf.hf_name(f'{name}.weight', kind).removesuffix('.weight'), []).append(
            (hf.third(f'{name}.weight', kind), layer))
    tensors, ranks, alphas, targets = {}, {}, {}, set()
    for name, parts in found.items():
        rank = len(parts[0][1].lora_A)
        B = torch.zeros(parts[0][1].out_features * (1 if parts[0][0] is None else 3),
                        rank * len(parts))
        for i, (part, layer) in enumerate(parts):
            at = (part or 0) * layer.out_features
            B[at:at + layer.out_features, i * rank:(i + 1) * rank] = layer.lora_B.detach()
        A = torch.cat([layer.lora_A.detach().cpu() for _, layer in parts])
        tensors |= {f'base_model.model.{name}.lora_A.weight': A.contiguous(),
                    f'base_model.model.{name}.lora_B.weight': B.contiguous()}
        target = '.'.join(name.split('.')[-2:])     # GPT-2's attention and MLP both have a c_proj
        targets.add(target)
        ranks[target], alphas[target] = len(A), parts[0][1].scale * len(A)
    rank = min(ranks.values())
    config = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base,
              'r': rank, 'lora_alpha': next(iter(layers.values())).scale * rank,
              'rank_pattern': {k: n for k, n in ranks.items() if n != rank},
              'alpha_pattern': {k: alphas[k] for k, n in ranks.items() if n != rank},
              'target_modules': sorted(targets), 'lora_dropout': dropout, 'bias': 'none',
              'fan_in_fan_out': kind == 'gpt2', 'inference_mode': True}
    folder.mkdir(parents=True, exist_ok=True)
    hf.save_file(tensors, folder / 'adapter_model.safetensors', metadata={'format': 'pt'})
    (folder / 'adapter_config.json').write_text(json.dumps(config, indent=1) + '\n',
                                                encoding='utf-8')
