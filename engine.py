"""The engine under the classifier and the fine-tuning: what prompts share is computed once.

The prompts of a task differ in their text only. The keys and values of the tokens before the text
are computed once and put in front of every batch of the rest (`SharedPrefix`; with gradients in
training), and only the positions that predict an answer reach the output head
(`next_token_logits`). They alone, too, go through what the last layer computes after its keys and
values (`prune_last_layer`). `Engine` runs the batches: longest rows first, a bounded number of
tokens each, several at a time on a CPU, halved where memory runs out. Whether a model's cache can
be shared is found out by comparing with its plain forward pass (`sharing_problem`).
"""

import ctypes
import math
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path

import psutil
import torch
from torch.nn.functional import linear
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from settings import UserError

CPU_BATCH_TOKENS = 1024  # measured: 512 to 2,048 are equally fast, beyond them caches overflow
GPU_BATCH_TOKENS = 16384
WORTH_A_PASS = 150  # tokens: measured, with fewer a forward pass costs more than its padding would
WORTH_PADDING = 0.8  # of the longest row: a shorter one starts the next batch
MEMORY_SHARE = 0.25  # of the free memory, for the activations of all batches under way
LARGE = 1e9  # parameters from which one batch keeps every core of a CPU busy
MAX_WORKERS = 16  # Python itself is the limit beyond
KEPT_PREFIXES = 8
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h> of glibc
# Modules of a decoder layer that read and write each position for itself, and of whose output in
# the last layer no other position learns: the feed-forward part, queries, attention's output.
POSITION_WISE = re.compile(
    r"mlp|feed_forward|(self_attn|attn|self_attention|attention)\.(q|o|c|out)_proj|"
    r"(self_attn|self_attention|attention)\.dense"
)
# What a comparison with the plain forward pass may raise in an architecture that does not allow it.
UNFIT = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)


class PrefixLayer(CacheLayerMixin):
    """Keys and values of one layer for the prefix, (1, heads, P, D); never written to.

    `update` returns them in front of those of a batch and keeps nothing, so batches and threads
    share one layer and memory holds one layer's copies at a time.
    """

    def __init__(self, layer):
        super().__init__()
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True
        self.is_sliding, self._layer = layer.is_sliding, layer

    def lazy_initialization(self, key_states, value_states):
        raise AssertionError("a prefix layer is full from the start")

    def update(self, key_states, value_states, *args, **kwargs):
        rows = len(key_states)
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2),
        )

    def get_mask_sizes(self, query_length):
        return self._layer.get_mask_sizes(query_length)

    def get_seq_length(self):
        return self._layer.get_seq_length()

    def get_max_length(self):
        return self._layer.get_max_length()


class SharedPrefix(Cache):
    """The cache of the tokens `ids`, with which every row of a batch begins."""

    def __init__(self, ids, layers):
        super().__init__(layers=[PrefixLayer(layer) for layer in layers])
        self.ids = list(ids)

    def begins(self, sequence):
        """Whether a sequence of token ids has this prefix and more."""
        return len(sequence) > len(self.ids) and sequence[: len(self.ids)] == self.ids


def shared_prefix(model, ids):
    """`SharedPrefix` of token ids, with gradients where they are enabled.

    None where the model remembers more of a prefix than keys and values (state-space layers).
    """
    output = model(
        input_ids=torch.tensor([ids], device=model.device), logits_to_keep=1, use_cache=True
    )
    layers = getattr(getattr(output, "past_key_values", None), "layers", [])
    if not layers or any(type(x) not in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers):
        return None
    return SharedPrefix(ids, layers)


def next_token_logits(model, sequences, positions=None, prefix=None):
    """Logits of the token after each wanted position, (N, V) float32, row by row.

    sequences: lists of token ids. positions: for every row those wanted, ascending; by default its
    last one. prefix: a `SharedPrefix` with which every row begins. Rows are padded on the right:
    attention is causal, so the padding changes nothing before it and needs no mask. Only the wanted
    positions reach the output head, and the last layer where it is pruned; of a model spread over
    devices, where a mask would lie on another one than the hidden states, all from the first wanted
    one on. The last layer is not pruned where the backward pass computes activations again.
    Raises UserError for a model without `logits_to_keep`.
    """
    if positions is None:
        positions = [[len(ids) - 1] for ids in sequences]
    skip = len(prefix.ids) if prefix is not None else 0
    tails = [ids[skip:] for ids in sequences]
    shape = len(tails), max(map(len, tails))  # (B, T)
    batch, wanted = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for row, ids in enumerate(tails):
        batch[row, : len(ids)] = torch.tensor(ids)
        wanted[row, [p - skip for p in positions[row]]] = True
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    first = int(wanted.any(0).nonzero()[0])
    whole = spread or (torch.is_grad_enabled() and model.is_activation_checkpointing)
    with nullcontext() if whole else only_wanted(wanted, model.device):
        logits = model(
            input_ids=batch.to(model.device),
            logits_to_keep=shape[1] - first if spread else wanted.to(model.device),
            **({"use_cache": False} if prefix is None else {"past_key_values": prefix}),
        ).logits
    if spread and logits.shape[:-1] == (shape[0], shape[1] - first):
        logits = logits[wanted[:, first:].to(logits.device)]
    if logits.shape[:-1] != (sum(map(len, positions)),):
        raise UserError(
            f"{type(model).__name__} ignores logits_to_keep, which this program needs; choose "
            "another model"
        )
    return logits.float()


class UnderWay(threading.local):
    """The batch that this thread has under way; several may go through one model side by side.

    wanted: None where the whole last layer is needed, else ((B, T), index of k positions a row).
    """

    wanted = None


UNDER_WAY = UnderWay()


@contextmanager
def only_wanted(wanted, device):
    """Inside the block this thread's batch needs the last layer at `wanted`, (B, T) bool, alone.

    All of it where rows want different numbers of positions, or every position.
    """
    (rows, length), counts = wanted.shape, wanted.sum(1)
    k = int(counts[0])
    if k == length or not bool((counts == k).all()):
        yield
        return
    columns = wanted.nonzero()[:, 1].view(rows, k).to(device)
    place = torch.arange(rows, device=device)[:, None], columns
    UNDER_WAY.wanted = wanted.shape, place
    try:
        yield
    finally:
        UNDER_WAY.wanted = None


def gather(_, inputs):
    """Forward pre-hook: (B, T, H) → (B, k, H), the wanted positions of each row."""
    if (wanted := UNDER_WAY.wanted) is None:
        return None
    shape, place = wanted
    return tuple(x[place] if begins_as(x, shape) else x for x in inputs)


def scatter(module, inputs, output):
    """Forward hook: (B, k, H) → (B, T, H), zeros where nobody looks."""
    if (wanted := UNDER_WAY.wanted) is None:
        return None
    if isinstance(output, tuple):
        return tuple(scatter(module, inputs, part) for part in output)
    shape, place = wanted
    if not begins_as(output, place[1].shape):
        return output
    whole = output.new_zeros(*shape, *output.shape[2:])
    whole[place] = output
    return whole


def begins_as(x, shape):
    return isinstance(x, torch.Tensor) and x.shape[:2] == shape


def position_wise(model):
    """Modules of the model's last decoder layer that are `POSITION_WISE`."""
    stacks = [x for x in model.get_decoder().children() if isinstance(x, torch.nn.ModuleList)]
    *_, last = max(stacks, key=len)
    return [part for name, part in last.named_modules() if POSITION_WISE.fullmatch(name)]


def prune_last_layer(model, prompts, tolerance):
    """From now on `next_token_logits` needs the last layer at the wanted positions alone.

    Its modules of `POSITION_WISE`, with what adapters put around or into them, compute those only;
    every other pass through the model stays as it is. Returns why this model does not allow it,
    found out by comparing both with `prompts`, lists of token ids, or None.
    tolerance: as for `sharing_problem`. Leaves the model in evaluation mode.
    """
    model.eval()
    hooks = []
    try:
        with torch.inference_mode():
            plain = next_token_logits(model, prompts).log_softmax(-1)
            for part in position_wise(model):
                hooks.append(part.register_forward_pre_hook(gather))
                hooks.append(part.register_forward_hook(scatter))
            pruned = next_token_logits(model, prompts).log_softmax(-1)
        problem = difference(pruned, plain, tolerance)
    except UNFIT as error:
        problem = described(error)
    if problem is not None:
        for hook in hooks:
            hook.remove()
    return problem


def divide_layers(model, processes):
    """Divide the frozen weights of the decoder layers among the processes; the share of this one.

    A layer's weights are gathered when it computes and given back afterwards, so that all processes
    must send batches through the model equally often. What is trained stays whole in each. Raises
    UserError for a model that does not name its layers.
    Source: FSDP 2, torch.distributed.fsdp.fully_shard.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kinds = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise UserError(
            f"{type(model).__name__} does not name its layers, so FSDP cannot divide them; launch "
            "with --multi_gpu"
        )
    mesh = init_device_mesh(model.device.type, (processes,))
    for layer in layers:
        trained = {p for p in layer.parameters() if p.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
        layer.unshard()  # for once outside of inference mode, whose tensors training cannot use
        layer.reshard()
    divided = [p for layer in layers for p in layer.parameters() if not p.requires_grad]
    return sum(p.to_local().numel() for p in divided) / sum(p.numel() for p in divided)


class FeatureDropout(torch.nn.Dropout):
    """Dropout that drops features of a whole row, at all its positions alike.

    A mask has one number for each row and feature, not for each token, so that drawing it costs
    next to nothing; on a CPU it took a quarter of a training step. Source: Gal and Ghahramani 2016,
    https://arxiv.org/abs/1512.05287
    """

    def forward(self, x):  # (B, T, H); (N, H) of tokens that experts were given
        if not self.training or self.p == 0:
            return x
        rows, *positions, features = x.shape
        mask = x.new_empty(rows, *(1 for _ in positions), features).bernoulli_(1 - self.p)
        return x * mask.div_(1 - self.p)


def use_feature_dropout(model):
    """Make the dropout of every LoRA layer a `FeatureDropout`."""
    for module in model.modules():
        for layer in getattr(module, "lora_dropout", {}).values():
            if type(layer) is torch.nn.Dropout:
                layer.__class__ = FeatureDropout


def fold_adapter(model):
    """Let the LoRA layers of a small float32 model multiply once, by weights that hold the adapter.

    The folded weights, of which a large model would feel the memory and not the speed, stand beside
    those of the base model, which a disabled adapter finds unchanged.
    """
    if model.num_parameters() >= LARGE:
        return
    for module in model.modules():
        if is_plain_lora(module) and type(module.base_layer) is torch.nn.Linear:
            (adapter,) = module.active_adapters
            if module.base_layer.weight.dtype == torch.float32:
                module.forward = FoldedForward(module, adapter)


def is_plain_lora(layer):
    """Whether every adapter of the layer adds B A x · scaling to a linear layer and no more."""
    from peft.tuners.lora.layer import Linear

    return type(layer) is Linear and not layer.lora_variant and not any(layer.lora_bias.values())


class FoldedForward:
    """The forward pass of a LoRA layer: x (..., in_features) → (..., out_features).

    Weights are folded again where one was changed in place. While the adapter is trained PEFT
    computes: not every optimizer leaves a trace of its changes.
    """

    def __init__(self, layer, adapter):
        self.layer, self.adapter = layer, adapter
        self.folded = None, None  # version, weight; one object, since several threads compute

    def __call__(self, x, *arguments, **named):
        layer = self.layer
        low_rank = layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight
        if layer.disable_adapters or any(part.requires_grad for part in low_rank):
            return type(layer).forward(layer, x, *arguments, **named)
        base = layer.base_layer
        present = sum(part._version for part in (base.weight, *low_rank))
        version, weight = self.folded
        if version != present:
            with torch.no_grad(), intra_op_threads(1):  # the same sums whoever computes them
                weight = base.weight + layer.get_delta_weight(self.adapter)
            self.folded = present, weight
        return linear(x, weight, base.bias)


class Float32Head(torch.nn.Linear):
    """An output head that multiplies in float32 at inference, whatever its weights are stored in.

    Logits of 20 rounded to bfloat16 are 0.06 apart, which moves a probability by up to 0.015.
    """

    def forward(self, hidden):
        if torch.is_grad_enabled():
            return super().forward(hidden)
        hidden = hidden.to(self.weight.device).float()
        parts = self.weight.split(16384)  # so that no float32 copy of the whole head is made
        logits = torch.cat([linear(hidden, part.float()) for part in parts], dim=-1)
        return logits if self.bias is None else logits + self.bias.float()


def use_float32_head(model):
    """Make the head of a model in half precision a `Float32Head`; its weights stay as they are."""
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear and head.weight.dtype in (torch.bfloat16, torch.float16):
        head.__class__ = Float32Head


def sharing_problem(model, prompts, prefix_length, tolerance):
    """Why this model cannot share a prefix, or None: compared with its plain forward pass.

    prompts: lists of token ids of different lengths; all are given the first `prefix_length` tokens
    of the shortest. tolerance: largest |Δ probability|; log-probabilities may differ by three times
    this share of what they differ between prompts. Leaves the model in evaluation mode.
    """
    model.eval()
    shortest = min(prompts, key=len)
    start = shortest[: max(1, min(prefix_length, len(shortest) - 1))]
    sequences = [start + ids[len(start) :] for ids in prompts]
    try:
        with torch.inference_mode():
            prefix = shared_prefix(model, start)
            if prefix is None:
                return "it remembers more of a prompt than keys and values"
            shared = next_token_logits(model, sequences, prefix=prefix).log_softmax(-1)
            plain = [
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
                for ids in sequences
            ]
    except UNFIT as error:
        return described(error)
    plain = torch.stack([logits[0, -1].float() for logits in plain]).log_softmax(-1)
    return difference(shared, plain, tolerance)


def described(error):
    """An exception of `UNFIT` in one line. Raises UserError where memory ran out."""
    if out_of_memory(error):
        raise UserError(
            "out of memory with a few prompts; use --quantization 4bit or a smaller model"
        ) from error
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:150]}"


def difference(found, plain, tolerance):
    """What sets log-probabilities (N, V) apart from those of the plain pass, or None."""
    change = float((found.exp() - plain.exp()).abs().max())
    spread = float((plain - plain.roll(1, 0)).abs().max())
    furthest = float((found - plain).abs().max())
    if change <= tolerance and furthest <= 3 * tolerance * spread + 1e-5:
        return None
    return f"a probability changes by {change:.1e} and a log-probability by {furthest:.1e}"


class Engine:
    """One model and the batches that go through it; shared by all tasks of a classifier.

    check() → why the model cannot share prefixes, or None: called once, before the first is needed.
    workers: batches scored at the same time, each with `threads` threads of the CPU.
    budget: tokens of a batch, padding included; a longer row is a batch of its own.
    in_step: whether other processes wait for this one to send the same batches.
    """

    in_step = False

    def __init__(self, model, check, batch_tokens=None):
        self.model, self._check, self._prefixes = model, check, {}
        self.workers, self.threads = parallelism(model)
        self.budget = token_budget(model, self.workers, batch_tokens)

    @cached_property
    def shares_prefix(self):
        """Whether prefixes are shared: only where that was found to be exact."""
        return self._check() is None

    def prefix(self, ids, adapter_active):
        """`SharedPrefix` of token ids with the present weights, or None.

        Computed once for each state of the adapter, and again when a weight was changed in place.
        It is computed for this call alone while weights are being trained: not every optimizer
        leaves a trace of its changes.
        """
        if not ids or not self.shares_prefix:
            return None
        weights = list(self.model.parameters())
        keep = not self.model.training and not any(p.requires_grad for p in weights)
        key = (id(self.model), adapter_active, tuple(ids))
        version = sum(p._version for p in weights)
        known_version, prefix = self._prefixes.get(key, (None, None))
        if keep and known_version == version:
            return prefix
        with torch.inference_mode(), intra_op_threads(self.threads):
            prefix = shared_prefix(self.model, ids)
        if keep:
            self._prefixes[key] = (version, prefix)
            while len(self._prefixes) > KEPT_PREFIXES:
                self._prefixes.pop(next(iter(self._prefixes)))
        return prefix

    def logits(self, sequences, positions=None, prefix=None):
        """`next_token_logits` for inference; the prefix is left out where a row has another."""
        if prefix is not None and not all(map(prefix.begins, sequences)):
            prefix = None
        with torch.inference_mode(), intra_op_threads(self.threads):
            return next_token_logits(self.model, sequences, positions, prefix)

    def run(self, sequences, prefix, score):
        """Yield (row numbers, result, seconds) of batches that cover every row once.

        score(sequences, prefix): the result of a batch, a list with one item a row. Rows that begin
        otherwise than the prefix are scored without it, in batches of their own. A batch for which
        memory does not suffice is halved, and so is the budget from then on; not in step.
        """
        share = [prefix is not None and prefix.begins(ids) for ids in sequences]
        work = partial(self._score, sequences, score)
        batches = []
        for shared in (prefix, None) if prefix is not None else (None,):
            skip = len(shared.ids) if shared is not None else 0
            rows = [i for i, shares in enumerate(share) if shares == (shared is not None)]
            lengths = [len(sequences[i]) - skip for i in rows]
            for batch in self._batches(lengths):
                batches.append((shared, [rows[i] for i in batch]))
        workers = min(self.workers, len(batches))
        if workers < 2:
            for batch in batches:
                yield from work(batch)
            return
        pool = ThreadPoolExecutor(workers)
        try:
            for done in pool.map(work, batches):
                yield from done
        finally:
            pool.shutdown(cancel_futures=True)

    def divide(self, processes, budget):
        """`divide_layers` of the model; from now on in step, with batches of the same budget."""
        self.in_step, self.workers, self.budget = True, 1, budget
        return divide_layers(self.model, processes)

    def _batches(self, lengths):
        """Row numbers, longest first, in batches within the budget; enough for every worker.

        A batch also ends where the next row would mostly be padding, if it is worth a forward pass.
        """
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        budget = min(self.budget, max(256, math.ceil(sum(lengths) / self.workers)))
        batch = []
        for row in order:
            longest = lengths[batch[0]] if batch else 0
            tokens = len(batch) * longest  # padding included
            padded = tokens >= WORTH_A_PASS and lengths[row] < WORTH_PADDING * longest
            if batch and (tokens + longest > budget or padded):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _score(self, sequences, score, batch):
        prefix, rows = batch
        started = time.perf_counter()
        try:
            with torch.inference_mode(), intra_op_threads(self.threads):
                result = score([sequences[i] for i in rows], prefix)
            return [(rows, result, time.perf_counter() - started)]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(rows) == 1:
                raise UserError(
                    f"out of memory with a prompt of {len(sequences[rows[0]])} tokens; lower "
                    "--max-tokens or use --quantization 4bit"
                ) from error
            if self.in_step:
                raise UserError(
                    f"out of memory with {len(rows)} prompts at a time; lower --batch-tokens"
                ) from error
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self.budget = max(1, self.budget // 2)
        half = len(rows) // 2
        parts = ((prefix, rows[:half]), (prefix, rows[half:]))
        return [done for part in parts for done in self._score(sequences, score, part)]


def keep_freed_memory():
    """Let this process keep the memory that it frees, for what it computes next.

    glibc gives the activations of a layer back to the system as soon as they are freed, and a fifth
    of the time of small models went into getting their pages again. Other C libraries have no such
    switch. Source: mallopt(3).
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that it takes
        mallopt(M_TRIM_THRESHOLD, 512 * 2**20)


def out_of_memory(error):
    """Whether an exception says that memory ran out; a CPU has no exception of its own for it."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


@contextmanager
def intra_op_threads(number):
    """Inside the block PyTorch computes with so many threads in this thread of Python."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def parallelism(model):
    """(batches at a time, CPU threads of each).

    A model that is not large computes fastest with one thread a batch: its matrices are too small
    to be divided, and threads that wait for each other suffer most where others use the machine.
    """
    cores = torch.get_num_threads()
    if model.device.type != "cpu" or model.num_parameters() >= LARGE:
        return 1, cores
    workers = min(cores, MAX_WORKERS)
    return workers, max(1, cores // workers)


def training_bytes(model, tokens, longest):
    """What a forward pass of LoRA training keeps for the backward pass, bytes; rather too much.

    tokens: of the batch, padding included; longest: of a row. In each layer some two dozen tensors
    of the hidden size and eight of the inner one, and attention weights where they are kept.
    """
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    values = 24 * config.hidden_size + 8 * inner
    if config._attn_implementation == "eager":
        values += 3 * getattr(config, "num_attention_heads", 1) * longest
    return tokens * config.num_hidden_layers * values * model.dtype.itemsize


def token_budget(model, workers, batch_tokens=None):
    """Tokens of a batch: what was asked for or is fast, at most what fits into memory."""
    device = model.device.type
    budget = batch_tokens or (CPU_BATCH_TOKENS if device == "cpu" else GPU_BATCH_TOKENS)
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    # Float32 activations of one layer: a dozen of the hidden size, four of the inner one, and
    # attention weights over 1,024 positions.
    heads = getattr(config, "num_attention_heads", 1)
    wide = 12 * config.hidden_size + 4 * inner + 1024 * heads
    return max(1, min(budget, int(MEMORY_SHARE * free_memory(device) / (4 * wide * workers))))


def free_memory(device):
    """Bytes that are free; Apple's GPUs (mps) share the memory of the CPU."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(limit.with_name("memory.current").read_text()))
    return max(free, 0)


def seconds_per_batch(model):
    """CPU seconds of one thread for 512 tokens: the best of three."""
    ids = (torch.arange(512) % model.config.get_text_config().vocab_size).view(16, 32)
    best = math.inf
    with torch.inference_mode(), intra_op_threads(1):
        for _ in range(4):
            started = time.thread_time()
            model(input_ids=ids, logits_to_keep=1, use_cache=False)
            best = min(best, time.thread_time() - started)
    return best
