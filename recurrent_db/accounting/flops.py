"""Counts FLOPs from the model's shape and from how often each part runs. All figures are per token of the batch.

- A multiply-add is two FLOPs.
- Matrix products and attention are counted. Norms, activations, softmax, embedding lookups and the optimizer are not, as is
  usual for model FLOPs. `optim.optimizer.update_flops` counts the optimizer.
- The backward pass of a matrix product costs twice its forward pass: once for the gradient of the input, once for the
  gradient of the weight. Passes without gradient cost only their forward pass.
- Recomputation in the backward pass (checkpointed iterations, the scores of fused attention) is kept apart, because it is
  work of the hardware and not of the model.
- Attention is counted over all T x T pairs, as is usual. The part that a causal mask hides is recorded too, so that both
  counts can be printed.

Shapes: T positions, D width, H heads, G heads of keys and values, E head size, M hidden width of the MLP, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from recurrent_db.accounting.cost import Cost, part_cost
from recurrent_db.accounting.image_flops import image_cost
from recurrent_db.config import Config, ModelConfig
from recurrent_db.errors import UserError
from recurrent_db.model.passes import Passes


def cost_per_token(model: ModelConfig, length: int, passes: Passes, checkpointing: bool = False) -> dict[str, Cost]:
    """FLOPs per token by part of the model, for sequences of ``length`` tokens.

    Args:
        passes: how often each part runs.
        checkpointing: core passes with gradient keep only their input and are recomputed in the backward pass.
    """
    width, hidden = model.d_model, model.d_mlp
    mixed = model.n_heads * model.d_head
    block = width * (model.d_qkv + mixed) + (2 if model.layer == "neox" else 3) * width * hidden
    adapter = {"linear": 2 * width * width, "diagonal": width * width, "add": 0}[model.injection]
    core_layers, clean_layers = passes.core_layers or model.n_core, passes.clean_layers or model.n_core
    # (Keys that a query is multiplied with, keys that it may attend to), averaged over positions. With one stream these are
    # the keys of its own stream. Beside a second stream, they are that stream's keys and its own key.
    plain = length, (length + 1) / 2 if passes.causal else length
    beside = 2 * length, (length + 1) / 2 + 1

    def blocks(count: float, no_grad: float, grad: float, two: bool = False, checkpointed: bool = False) -> Cost:
        met, seen = beside if two else plain
        products = count * 4 * mixed
        return part_cost(count * block, products * met, products * (met - seen), no_grad, grad, checkpointed)

    def context(count: float, no_grad: float, grad: float) -> Cost:
        """A stream that runs only for its keys and values. Its last block computes only these, in one fused product."""
        if not count:
            return Cost()
        return blocks(count - 1, no_grad, grad) + part_cost(width * model.d_qkv, 0, 0, no_grad, grad)

    core_runs = passes.core_no_grad, passes.core_grad
    clean_runs = passes.clean_no_grad, passes.clean_grad
    read_runs = passes.readouts_no_grad, passes.readouts_grad
    conditioning = Cost()
    if passes.noise_levels:
        share = passes.noise_levels / length
        first = part_cost(model.d_condition**2, 0, 0, share * core_runs[0], share * core_runs[1])
        # The Fourier features need no gradient, so the first layer computes only the gradient of its weights.
        first = Cost(first.forward, 0.0, first.backward_weight)
        out = model.d_condition * core_layers * 6 * width
        conditioning = first + part_cost(out, 0, 0, share * core_runs[0], share * core_runs[1])
    injected = part_cost(adapter, 0, 0, *core_runs, checkpointing)
    injected += part_cost(adapter, 0, 0, *clean_runs) + part_cost(adapter, 0, 0, 0, passes.injections_grad)
    head = part_cost(model.vocab_size * width, 0, 0, *read_runs)
    return {
        "embedding": Cost(),  # a lookup, without matrix products
        "prelude": blocks(model.n_prelude, float(not passes.prelude_grad), float(passes.prelude_grad)),
        "adapter": injected if passes.tables_grad or model.n_prelude else replace(injected, backward_input=0.0),
        "core": blocks(core_layers, *core_runs, passes.beside, checkpointing) + context(clean_layers, *clean_runs),
        "conditioning": conditioning,
        "coda": blocks(model.n_coda, *read_runs),
        "head": head if passes.tables_grad else replace(head, backward_weight=0.0),
        "bridge": Cost(forward=passes.bridges * 2 * model.vocab_size * width),
    }


def total(parts: Mapping[str, Cost]) -> Cost:
    """The sum of the costs of all parts."""
    result = Cost()
    for cost in parts.values():
        result = result + cost
    return result


def step_cost_by_part(config: Config, passes: Passes) -> dict[str, Cost]:
    """FLOPs per token of a training step that runs ``passes``, by part of the model."""
    if config.model.network != "language":
        return image_cost(config.model, passes)
    checkpointing = config.run.activation_checkpointing
    return cost_per_token(config.model, config.data.sequence_length, passes, checkpointing)


def step_cost(config: Config, passes: Passes) -> Cost:
    """FLOPs per token of a training step that runs ``passes``."""
    return total(step_cost_by_part(config, passes))


def inference_cost(model: ModelConfig, length: int, passes: Passes) -> float:
    """Forward FLOPs per token of scoring sequences of ``length`` tokens."""
    return total(cost_per_token(model, length, passes)).forward


def cached_cost(model: ModelConfig, passes: Passes, first: int, stop: int, read: bool = True) -> float:
    """Forward FLOPs of running positions ``first`` to ``stop`` (exclusive) of one sequence, with earlier positions cached.

    Attention is counted over all ``stop`` keys for each position. The head runs only for the last position, and only if
    ``read`` is True.
    """
    count, width, mixed = stop - first, model.d_model, model.n_heads * model.d_head

    def each(runs: Passes) -> float:
        parts = cost_per_token(model, stop, runs)
        return total(parts).forward - parts["conditioning"].forward

    cost = count * each(passes) + stop * cost_per_token(model, stop, passes)["conditioning"].forward
    if passes.beside:  # a query attends to the other stream's keys and to the keys of its own stream in this call
        layers = (passes.core_layers or model.n_core) * passes.core_no_grad
        cost -= count * layers * 4 * mixed * (stop - count)
    return cost - (count - read) * 2 * model.vocab_size * width


def visited_cost(model: ModelConfig, visits: Mapping[tuple[bool, int], int], reads: int) -> float:
    """Forward FLOPs of a loop without noise levels, from counts of `generation.slot_cache` by block.

    Args:
        visits: (whether the block is in the core, number of keys attended to) -> number of positions.
        reads: number of positions that went through the head.
    """
    once = Passes(core_no_grad=1, core_grad=0, readouts_no_grad=1, readouts_grad=0, prelude_grad=False)
    cost = reads * cost_per_token(model, 1, once)["head"].forward
    for (core, keys), positions in visits.items():
        parts = cost_per_token(model, keys, once)
        each = parts["core"].forward + core * parts["adapter"].forward
        cost += positions * each / model.n_core
    return cost


CACHE_POLICIES = "full, last or modulo-S (S slots per layer)"


def visits_kept(policy: str) -> int | None:
    """Number of visits per layer and position whose keys and values a cache policy keeps. None means all.

    Raises:
        UserError: the policy is unknown.
    """
    if policy == "full":
        return None
    found = re.fullmatch(r"modulo-([1-9][0-9]{0,17})", policy)
    if policy != "last" and found is None:
        raise UserError(f"the cache policy must be {CACHE_POLICIES}, not {policy!r}")
    return int(found[1]) if found is not None else 1


def cache_numbers_per_token(model: ModelConfig, passes: Passes, policy: str = "full") -> int:
    """Numbers per token in a key-value cache.

    The cache keeps a key and a value for each visit to each layer, in the streams that later positions attend to.
    """
    core, coda = passes.clean_no_grad or passes.core_no_grad, passes.readouts_no_grad
    most = visits_kept(policy) or max(core, coda)
    in_core = model.n_core * min(core, most)
    if model.n_blocks:  # each layer is visited once, by its block's clean stream
        in_core = round(passes.clean_layers * passes.clean_no_grad)
    layers = model.n_prelude + in_core + model.n_coda * min(coda, most)
    return model.kv_heads * model.d_head * 2 * layers
