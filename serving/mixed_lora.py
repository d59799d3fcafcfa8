"""LoRA for batches whose rows ask different adapters, in a few matrix products a layer.

PEFT computes such a batch adapter by adapter, and with ten adapters spends more time between its
small products than in them. Here the matrices of the rows' adapters are stacked and multiplied at
once. Layers that are no plain LoRA of a linear layer (embeddings, quantized weights, a bias) are
left to PEFT.
"""

import threading
from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import LoraLayer

from engine import is_plain_lora

BASE_ROWS = "__base__"  # PEFT's name of no adapter in a mixed batch


class MixedRows:
    """Tells the LoRA layers of a model which adapter each row of a batch asks.

    Each thread says it for itself (`asking`), so several batches can be under way at once.
    """

    def __init__(self):
        self._thread = threading.local()  # .names: of the rows' adapters
        self._layers = set()  # layers that are told

    @contextmanager
    def asking(self, names):
        """Inside the block the rows of this thread's batch ask these adapters, None: the base."""
        self._thread.names = [BASE_ROWS if name is None else name for name in names]
        try:
            yield
        finally:
            del self._thread.names

    def tell(self, model):
        """Tell every LoRA layer of the model, also those that an adapter has brought."""
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and layer not in self._layers:
                layer.forward = self._forward_of(layer)
                self._layers.add(layer)

    def _forward_of(self, layer):
        peft_forward = layer.forward

        def forward(x, *arguments, **named):
            names = self._thread.names
            if not is_plain_lora(layer):
                return peft_forward(x, *arguments, adapter_names=names, **named)
            return add_updates(layer, layer.base_layer(x, *arguments, **named), x, names)

        return forward


def add_updates(layer, output, x, names):
    """`output`, changed in place: to each row is added what its adapter gives, B A x · scaling.

    x: (rows, T, in); output: (rows, T, out), of the linear layer itself; names: the rows' adapters.
    """
    ranks = {}  # rank: rows; matrices of one rank can be stacked
    for row, name in enumerate(names):
        if name in layer.lora_A:
            ranks.setdefault(layer.r[name], []).append(row)
    for rows in ranks.values():
        all_rows = len(rows) == len(names)
        asked = [names[row] for row in rows]
        distinct = list(dict.fromkeys(asked))
        if len(distinct) == 1:
            down, up = layer.lora_A[asked[0]].weight, layer.lora_B[asked[0]].weight
            scaling = layer.scaling[asked[0]]
        else:
            of_row = [distinct.index(name) for name in asked]
            down = torch.stack([layer.lora_A[name].weight for name in distinct])[of_row]
            up = torch.stack([layer.lora_B[name].weight for name in distinct])[of_row]
            scaling = down.new_tensor([layer.scaling[name] for name in asked])[:, None, None]
        inner = (x if all_rows else x[rows]).to(down.dtype) @ down.mT  # (rows, T, r)
        update = ((inner * scaling) @ up.mT).to(output.dtype)
        if all_rows:
            output += update
        else:
            output[rows] += update
    return output
